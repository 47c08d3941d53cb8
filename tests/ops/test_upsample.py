"""The kernel for upsampling against the modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from dsgformer_arch import ops
from dsgformer_arch.archs.dsgformer_arch import DSGformer
from dsgformer_arch.ops import memory
from dsgformer_arch.ops.cpu import binding
from tests.ops import kernel

with torch.random.fork_rng():
    torch.manual_seed(0)
    NETWORK = DSGformer(width=16, num_blocks=(1, 1, 1, 1), heads=(1, 1, 1, 1)).eval()


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


CASES: dict[str, tuple[nn.Sequential, Callable[[int, int, int], tuple[Tensor, Tensor | None]]]] = {
    'no skip': (cast(nn.Sequential, NETWORK.up[2]), lambda n, h, w: (_random(n, 32, h, w), None)),
    'skip': (
        cast(nn.Sequential, NETWORK.up[1]),
        lambda n, h, w: (_random(n, 64, h, w), _random(n, 32, 2 * h, 2 * w)),
    ),
}
SIZES = [(1, 8, 8), (2, 5, 3), (1, 17, 131), (1, 1, 1), (1, 40, 64)]
"""N, H and W: odd ones, one pixel, more pixels in a row than one product takes, more rows than one task."""


@pytest.fixture(autouse=True)
def _kernel() -> None:
    kernel.require()


def test_negated_views() -> None:
    """Views that negate when they are read, as `x.conj().imag` is, are computed first."""
    module, inputs = CASES['skip']
    x, skip = inputs(1, 8, 8)
    assert skip is not None
    with torch.inference_mode():
        ours = ops.resampling.up(module, torch._neg_view(-x), torch._neg_view(-skip))
        torch.testing.assert_close(ours, ops.resampling.up(module, x, skip))


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('case', CASES)
def test_float32_equals_the_modules(case: str, size: tuple[int, int, int]) -> None:
    module, inputs = CASES[case]
    tensors = inputs(*size)
    with torch.inference_mode():
        ours = ops.resampling.up(module, *tensors)
        with ops.use('plain'):
            reference = ops.resampling.up(module, *tensors)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert ours.shape == reference.shape
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('size', [size for size in SIZES if size != (1, 1, 1)])  # too few to compare errors
@pytest.mark.parametrize('case', CASES)
def test_autocast_is_as_accurate_as_the_modules(case: str, size: tuple[int, int, int]) -> None:
    module, inputs = CASES[case]
    tensors = inputs(*size)
    x, skip = tensors
    if skip is not None:
        tensors = (x.bfloat16(), skip.bfloat16())
    with torch.inference_mode():
        with torch.autocast('cpu', torch.bfloat16):
            ours = ops.resampling.up(module, *tensors)
            with ops.use('plain'):
                reference = ops.resampling.up(module, *tensors)
        exact = ops.resampling.up(module, x, skip)
    assert ours.dtype == reference.dtype
    error, theirs = ((x.float() - exact).norm() for x in (ours, reference))
    assert error <= 1.2 * theirs


def test_gradients_and_other_types_go_through_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(binding, 'upsample')
    image = _random(1, 3, 16, 16)
    NETWORK(image).sum().backward()
    with torch.inference_mode():
        with ops.use('eager'):
            NETWORK(image)
        NETWORK.double()(image.double())
    NETWORK.float().zero_grad()


def test_a_second_image_needs_no_new_memory() -> None:
    image = torch.rand(1, 3, 256, 320)
    with torch.inference_mode():
        first = NETWORK(image).clone()
        size = memory.pool.bytes
        assert size > 0
        assert torch.equal(NETWORK(image), first)
    assert memory.pool.bytes == size


def test_what_a_hook_keeps_stays_as_it_was() -> None:
    seen: list[Tensor] = []
    handle = NETWORK.encoder[0][0].register_forward_hook(lambda module, given, output: seen.append(output))
    with torch.inference_mode():
        NETWORK(torch.rand(1, 3, 256, 320))
        before = seen[0].clone()
        NETWORK(torch.rand(1, 3, 256, 320))
    handle.remove()
    assert torch.equal(seen[0], before)
    assert not torch.equal(seen[0], seen[1])
