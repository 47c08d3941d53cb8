"""The kernel's head, downsampling, upsampling and tail against the modules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dsgformer_arch import ops
from dsgformer_arch.archs.dsgformer_arch import DSGformer
from dsgformer_arch.ops import memory
from dsgformer_arch.ops import resampling as steps
from dsgformer_arch.ops.cpu import binding, build

Step = Callable[..., Tensor]

with torch.random.fork_rng():
    torch.manual_seed(0)
    NETWORK = DSGformer(width=16, num_blocks=(1, 1, 1, 1), heads=(1, 1, 1, 1)).eval()


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


CASES: dict[str, tuple[Step, nn.Module, Callable[[int, int, int], tuple[Tensor | None, ...]]]] = {
    'head': (steps.head, NETWORK.head, lambda n, h, w: (_random(n, 3, h, w),)),
    'down': (steps.down, NETWORK.down[1], lambda n, h, w: (_random(n, 32, 2 * h, 2 * w),)),
    'up': (steps.up, NETWORK.up[2], lambda n, h, w: (_random(n, 32, h, w), None)),
    'up with skip': (
        steps.up,
        NETWORK.up[1],
        lambda n, h, w: (_random(n, 64, h, w), _random(n, 32, 2 * h, 2 * w)),
    ),
    'tail': (steps.tail, NETWORK.tail, lambda n, h, w: (_random(n, 32, h, w), _random(n, 3, h, w))),
}
SIZES = [(1, 8, 8), (2, 5, 3), (1, 17, 131), (1, 1, 1), (1, 40, 64)]
"""N, H and W: odd ones, one pixel, more pixels in a row than one product takes, more rows than one task."""


@pytest.fixture(autouse=True)
def _kernel() -> None:
    try:
        build.library()
    except (OSError, RuntimeError) as reason:
        pytest.skip(f'no kernel here: {reason}')


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('case', CASES)
def test_float32_equals_the_modules(case: str, size: tuple[int, int, int]) -> None:
    step, module, inputs = CASES[case]
    tensors = inputs(*size)
    with torch.inference_mode():
        ours = step(module, *tensors)
        with ops.use('plain'):
            literal = step(module, *tensors)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert ours.shape == literal.shape
    torch.testing.assert_close(ours, literal, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('size', [size for size in SIZES if size != (1, 1, 1)])  # too few to compare errors
@pytest.mark.parametrize('case', CASES)
def test_autocast_is_no_worse_than_the_modules(case: str, size: tuple[int, int, int]) -> None:
    step, module, inputs = CASES[case]
    tensors = inputs(*size)
    if case == 'up with skip':
        tensors = tuple(tensor.bfloat16() for tensor in tensors if tensor is not None)
    with torch.inference_mode():
        with torch.autocast('cpu', torch.bfloat16):
            ours = step(module, *tensors)
            with ops.use('plain'):
                literal = step(module, *tensors)
        exact = step(module, *(None if tensor is None else tensor.float() for tensor in tensors))
    assert ours.dtype == literal.dtype
    error, theirs = ((x.float() - exact).norm() for x in (ours, literal))
    assert error <= 1.2 * theirs


def test_gradients_and_other_types_go_through_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ('convolved', 'downsampled', 'upsampled', 'summed'):
        monkeypatch.delattr(binding, name)
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
        size = memory.kept.bytes
        assert size > 0
        assert torch.equal(NETWORK(image), first)
    assert memory.kept.bytes == size


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
