from __future__ import annotations

import resource

import pytest
import torch

from dsgformer_arch.benchmark.measure import machine
from dsgformer_arch.utils.errors import UserError

CPU = torch.device('cpu')


def test_devices() -> None:
    assert machine.device('cpu') == CPU
    for name in ('tpu9', 'cuda:99', 'gpu'):
        with pytest.raises(UserError, match='--device'):
            machine.device(name)


def test_what_does_not_fit_fails_inside_and_the_process_continues() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    size = 512 * 2**20
    with pytest.raises(RuntimeError) as caught, machine.bounded(CPU, free=64 * 2**20):
        torch.empty(size, dtype=torch.uint8)
    assert machine.reason(caught.value) == machine.OUT_OF_MEMORY
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    with machine.bounded(CPU, free=4 * size):
        assert torch.empty(size, dtype=torch.uint8).numel() == size


@pytest.mark.parametrize(
    'error', [MemoryError(), torch.OutOfMemoryError('CUDA'), RuntimeError('std::bad_alloc')]
)
def test_out_of_memory_is_recognised(error: BaseException) -> None:
    assert machine.reason(error) == machine.OUT_OF_MEMORY


def test_other_reasons_are_one_line() -> None:
    assert machine.reason(RuntimeError('first\nsecond')) == 'first'
    assert machine.reason(ValueError()) == 'ValueError'
    assert len(machine.reason(RuntimeError('x' * 999))) == 160


def test_memory_is_known_on_linux() -> None:
    free = machine.available()
    assert free is not None
    assert 0 < free < 2**50
