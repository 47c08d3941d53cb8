"""Strips of rows: the same numbers as whole maps, at borders and for batches, and only where they suit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsgformer_arch import ops
from dsgformer_arch.archs.layers import strips
from dsgformer_arch.archs.nafnet_arch import NAFNet
from dsgformer_arch.archs.restormer_arch import Restormer
from dsgformer_arch.archs.tlc import use_local_pooling
from tests.conformance.check import fill_state_dict

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    'NAFNet': lambda: NAFNet(width=8, enc_blk_nums=(1, 2), dec_blk_nums=(1, 1)),
    'Restormer': lambda: Restormer(dim=8, num_blocks=[1, 2, 1, 1], num_refinement_blocks=1),
    'Restormer with biases': lambda: Restormer(
        dim=8, num_blocks=[1, 1, 1, 1], num_refinement_blocks=1, bias=True, LayerNorm_type='BiasFree'
    ),
}


@pytest.fixture(params=[1, 2], ids=['one thread', 'two threads'])
def threads(request: pytest.FixtureRequest) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of the least height."""
    monkeypatch.setattr(strips, 'STRIP_BYTES', 1)
    monkeypatch.setattr(strips, 'LEAST_ROWS', 3)


def network(name: str) -> nn.Module:
    return fill_state_dict(NETWORKS[name](), seed=3, gain=0.7).eval()


@pytest.mark.usefixtures('short')
@pytest.mark.parametrize('height', [1, 2, 3, 4, 7, 12])
@pytest.mark.parametrize('batch', [1, 2])
def test_a_convolution_in_strips_is_that_of_the_whole_map(height: int, batch: int) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(batch, 4, height, 5), torch.randn(batch, 2, height, 5)
    kernels = torch.randn(6, 4, 5, 5)

    def function(x: Tensor, y: Tensor) -> Tensor:
        return F.conv2d(x, kernels, padding=2) * y[:, :1]

    found = strips.in_strips(function, [x, y], widest=6, halo=2)
    torch.testing.assert_close(found, function(x, y), rtol=1e-5, atol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)
    rows = [strip.rows for strip in strips.strips([x], 6, halo=2) if strip.image == batch - 1]
    assert [row for part in rows for row in range(height)[part]] == list(range(height))
    assert all(part.stop - part.start <= 3 for part in rows)


@pytest.mark.usefixtures('short', 'threads')
@pytest.mark.parametrize('name', NETWORKS)
def test_networks_in_strips_compute_what_their_modules_compute(name: str) -> None:
    found = network(name)
    x = torch.rand(2, 3, 40, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        with ops.use('plain'):
            expected = found(x)
        torch.testing.assert_close(found(x), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(found(x[1:]), expected[1:], rtol=0, atol=1e-5)
        with torch.autocast('cpu', torch.bfloat16):
            half = found(x)
            with ops.use('plain'):
                whole = found(x)
    # Both are rounded, each in its own order: neither may be farther from float32 than the other by much.
    assert (half - expected).abs().mean() < 1.5 * (whole - expected).abs().mean()
    assert half.dtype == whole.dtype


@pytest.mark.parametrize('name', NETWORKS)
def test_strips_are_short_for_large_maps_and_whole_for_small_ones(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    heights: list[int] = []
    taken = strips.strips

    def noting(*arguments: Any, **named: Any) -> Any:
        for strip in taken(*arguments, **named):
            heights.append(strip.inner.stop - strip.inner.start)
            yield strip

    monkeypatch.setattr(strips, 'strips', noting)
    with torch.no_grad():
        network(name)(torch.rand(1, 3, 32, 32))
        assert set(heights) == {32, 16, 8, 4} - ({4} if name == 'NAFNet' else set())
        heights.clear()
        monkeypatch.setattr(strips, 'STRIP_BYTES', 1 << 14)
        network(name)(torch.rand(1, 3, 64, 32))
    assert max(heights) < 64


def test_strips_are_for_inference_on_a_cpu_with_values() -> None:
    x = torch.rand(1, 4, 8, 8)
    assert not strips.suit(x), 'gradients are recorded'
    with torch.no_grad():
        assert strips.suit(x)
        assert not strips.suit(x.double())
        assert not strips.suit(x.half())
        assert not strips.suit(x.to('meta'))
        with ops.use('plain'):
            assert not strips.suit(x)
        assert strips.channels_last(x).is_contiguous(memory_format=torch.channels_last)
        assert strips.channels_last(x.double()).is_contiguous()


@pytest.mark.usefixtures('threads')
@pytest.mark.parametrize('name', NETWORKS)
def test_hooks_and_local_pooling_are_not_passed_over(name: str) -> None:
    found = network(name)
    x = torch.rand(1, 3, 32, 32)
    called = []
    hooked = [module for module in found.modules() if not isinstance(module, nn.ModuleList)]
    for module in hooked:
        module.register_forward_hook(lambda module, inputs, output: called.append(module))
    with torch.no_grad():
        found(x)
        unused = {found.skip_conv} if getattr(found, 'dual_pixel_task', False) else set()
        assert {id(module) for module in called} == {id(module) for module in hooked if module not in unused}
        use_local_pooling(found, 8)
        with ops.use('plain'):
            expected = found(x)
        torch.testing.assert_close(found(x), expected, rtol=0, atol=1e-5)
