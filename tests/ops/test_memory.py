"""Memory that is lent again: never while anything holds it, and not for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dsgformer_arch.ops import memory
from dsgformer_arch.ops.memory import MemoryPool

SHAPE = (3, 512, 1024)
"""6 MiB in float32."""


def test_memory_is_reused() -> None:
    pool = MemoryPool()
    first = pool.empty(SHAPE, torch.float32)
    start, size = first.data_ptr(), pool.bytes
    assert (first.shape, first.dtype, first.is_contiguous()) == (SHAPE, torch.float32, True)
    assert start % 64 == 0
    del first
    second = pool.empty(SHAPE[1:] + SHAPE[:1], torch.int32)
    assert (second.data_ptr(), pool.bytes) == (start, size)


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
def test_memory_in_use_is_not_reused(held: Callable[[torch.Tensor], Any]) -> None:
    pool = MemoryPool()
    holder = held(pool.empty(SHAPE, torch.float32))
    start = holder.ctypes.data if isinstance(holder, np.ndarray) else holder.data_ptr()
    others = [pool.empty(SHAPE, torch.float32) for _ in range(3)]
    ranges = [range(x.data_ptr(), x.data_ptr() + x.nbytes) for x in others]
    assert not any(start in taken for taken in ranges)
    pool.release()
    del holder
    pool.release()
    assert pool.bytes == sum(x.nbytes for x in others)


def test_bfloat16_and_inference_mode() -> None:
    pool = MemoryPool()
    with torch.inference_mode():
        lent = pool.empty(SHAPE, torch.bfloat16)
        assert lent.dtype == torch.bfloat16
        del lent
    # What is lent outside takes part in gradients, though its memory was lent within.
    lent = pool.empty(SHAPE, torch.bfloat16).fill_(2)
    weight = torch.ones((), requires_grad=True, dtype=torch.bfloat16)
    (lent[0, 0] * weight).sum().backward()
    assert weight.grad is not None
    assert not lent.is_inference()


def test_small_tensors_and_much_smaller_ones_take_none() -> None:
    pool = MemoryPool()
    pool.empty((8, 8), torch.float32)
    assert pool.bytes == 0
    pool.empty((9 << 20,), torch.uint8)
    pool.empty((4 << 20,), torch.uint8)
    assert pool.bytes == 13 << 20


def test_idle_memory_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = MemoryPool()
    used = pool.empty(SHAPE, torch.float32)
    pool.empty(SHAPE, torch.float32)
    pool.trim()
    pool.empty(SHAPE, torch.float32)
    for _ in range(memory.IDLE_CALLS):
        pool.trim()
    assert pool.bytes == 2 * used.nbytes
    pool.trim()
    assert pool.bytes == used.nbytes
    pool.empty(SHAPE, torch.float32)
    monkeypatch.setattr(memory, 'IDLE_BYTES', 5 * used.nbytes // 2)
    larger = pool.empty((2, *SHAPE), torch.float32)
    assert pool.bytes == used.nbytes + larger.nbytes


def test_threads_get_memory_of_their_own() -> None:
    pool = MemoryPool()
    torn: list[int] = []

    def work(number: int) -> None:
        for _ in range(50):
            x = pool.empty((1 << 20,), torch.int32).fill_(number)
            if not bool((x == number).all()):
                torn.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not torn


def test_idle_memory_is_bounded_however_much_was_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, 'IDLE_BYTES', 16 << 20)
    pool = MemoryPool()
    lent = [pool.empty(SHAPE, torch.float32) for _ in range(5)]
    assert pool.bytes == 5 * lent[0].nbytes
    lent.clear()
    assert 0 < pool.idle_bytes == pool.bytes <= memory.IDLE_BYTES
    larger = pool.empty((6, *SHAPE), torch.float32)
    del larger
    assert pool.bytes <= memory.IDLE_BYTES


def test_keeps_nothing_where_the_process_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.allocator, '_keeps', True)
    pool = MemoryPool()
    pool.empty(SHAPE, torch.float32)
    assert pool.bytes == 0
