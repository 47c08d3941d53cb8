"""Memory that is lent again: never while anything holds it, and not for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dsgformer_arch.ops import memory
from dsgformer_arch.ops.memory import KeptMemory

SHAPE = (3, 512, 1024)
"""6 MiB in float32."""


def test_memory_is_lent_again() -> None:
    kept = KeptMemory()
    first = kept.empty(SHAPE, torch.float32)
    start, size = first.data_ptr(), kept.bytes
    assert (first.shape, first.dtype, first.is_contiguous()) == (SHAPE, torch.float32, True)
    assert start % 64 == 0
    del first
    second = kept.empty(SHAPE[1:] + SHAPE[:1], torch.int32)
    assert (second.data_ptr(), kept.bytes) == (start, size)


@pytest.mark.parametrize(
    'held',
    [
        lambda x: x,
        lambda x: x[1:, 3].permute(1, 0),
        lambda x: x.detach(),
        lambda x: x.numpy(),
        lambda x: x.untyped_storage(),
    ],
    ids=['itself', 'view', 'detached', 'array', 'storage'],
)
def test_memory_in_use_is_not_lent_again(held: Callable[[torch.Tensor], Any]) -> None:
    kept = KeptMemory()
    holder = held(kept.empty(SHAPE, torch.float32))
    start = holder.ctypes.data if isinstance(holder, np.ndarray) else holder.data_ptr()
    others = [kept.empty(SHAPE, torch.float32) for _ in range(3)]
    ranges = [range(x.data_ptr(), x.data_ptr() + x.nbytes) for x in others]
    assert not any(start in taken for taken in ranges)
    kept.release()
    del holder
    kept.release()
    assert kept.bytes == sum(x.nbytes for x in others)


def test_bfloat16_and_inference_mode() -> None:
    kept = KeptMemory()
    with torch.inference_mode():
        lent = kept.empty(SHAPE, torch.bfloat16)
        assert lent.dtype == torch.bfloat16
        del lent
    # What is lent outside takes part in gradients, though its memory was lent within.
    lent = kept.empty(SHAPE, torch.bfloat16).fill_(2)
    weight = torch.ones((), requires_grad=True, dtype=torch.bfloat16)
    (lent[0, 0] * weight).sum().backward()
    assert weight.grad is not None
    assert not lent.is_inference()


def test_small_tensors_and_much_smaller_ones_take_none() -> None:
    kept = KeptMemory()
    kept.empty((8, 8), torch.float32)
    assert kept.bytes == 0
    kept.empty((9 << 20,), torch.uint8)
    kept.empty((4 << 20,), torch.uint8)
    assert kept.bytes == 13 << 20


def test_idle_memory_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = KeptMemory()
    used = kept.empty(SHAPE, torch.float32)
    kept.empty(SHAPE, torch.float32)
    kept.trim()
    kept.empty(SHAPE, torch.float32)
    for _ in range(memory.IDLE_CALLS):
        kept.trim()
    assert kept.bytes == 2 * used.nbytes
    kept.trim()
    assert kept.bytes == used.nbytes
    kept.empty(SHAPE, torch.float32)
    monkeypatch.setattr(memory, 'IDLE_BYTES', 5 * used.nbytes // 2)
    larger = kept.empty((2, *SHAPE), torch.float32)
    assert kept.bytes == used.nbytes + larger.nbytes


def test_threads_get_memory_of_their_own() -> None:
    kept = KeptMemory()
    torn: list[int] = []

    def work(number: int) -> None:
        for _ in range(50):
            x = kept.empty((1 << 20,), torch.int32).fill_(number)
            if not bool((x == number).all()):
                torn.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not torn


def test_idle_memory_is_bounded_however_much_was_lent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, 'IDLE_BYTES', 16 << 20)
    kept = KeptMemory()
    lent = [kept.empty(SHAPE, torch.float32) for _ in range(5)]
    assert kept.bytes == 5 * lent[0].nbytes
    lent.clear()
    assert 0 < kept.idle_bytes == kept.bytes <= memory.IDLE_BYTES
    larger = kept.empty((6, *SHAPE), torch.float32)
    del larger
    assert kept.bytes <= memory.IDLE_BYTES


def test_keeps_nothing_where_the_process_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.allocator, '_keeps', True)
    kept = KeptMemory()
    kept.empty(SHAPE, torch.float32)
    assert kept.bytes == 0
