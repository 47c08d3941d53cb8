"""ConvIR equals its official implementation, trains every weight and is rebuilt from its state dict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsgformer_arch.archs.convir_arch import BatchNorm, ConvIR, DynamicFilter, SquareFilter
from dsgformer_arch.utils.errors import UserError
from tests.conformance.check import check, fill_state_dict

CONFORMANCE = Path(__file__).resolve().parents[1] / 'conformance'
SMALL: dict[str, Any] = {'num_res': 2, 'base_channel': 8, 'dilations': (1, 2, 3)}


def small() -> ConvIR:
    network = ConvIR(**SMALL)
    fill_state_dict(network, seed=5, gain=0.7)
    return network


@pytest.mark.parametrize(
    ('fixture', 'num_res'),
    [
        ('convir_s', 4),
        pytest.param('convir_b', 8, marks=pytest.mark.long),
        pytest.param('convir_l', 16, marks=pytest.mark.long),
    ],
)
def test_conforms_to_the_official_implementation(fixture: str, num_res: int) -> None:
    assert check(ConvIR(num_res=num_res), str(CONFORMANCE / f'{fixture}.npz')) == []


def reflected(i: int, size: int) -> int:
    return -i if i < 0 else min(i, 2 * (size - 1) - i)


def reference_filter(module: DynamicFilter, x: Tensor, kernels: Tensor) -> Tensor:
    """The docstring's formula, pixel by pixel.  `kernels` is (N, 8, kh, kw)."""
    n, c, h, w = x.shape
    kh, kw = module.kernel
    out = torch.empty_like(x)
    for image, channel in np.ndindex(n, c):
        plane, kernel = x[image, channel], kernels[image, channel // (c // 8)]
        low = torch.zeros_like(plane)
        for y, z, i, j in np.ndindex(h, w, kh, kw):
            row = reflected(y + (i - kh // 2) * module.dilation, h)
            column = reflected(z + (j - kw // 2) * module.dilation, w)
            low[y, z] += kernel[i, j] * plane[row, column]
        mean = {
            (3, 3): plane.mean(),
            (1, 3): plane.mean(1, keepdim=True),
            (3, 1): plane.mean(0, keepdim=True),
        }
        weight = module.inside_all[channel]
        low = low * (1 + weight) - weight * mean[module.kernel]
        out[image, channel] = low * module.lamb_l[channel] + plane * (1 + module.lamb_h[channel])
    return out


@pytest.mark.parametrize('kernel', [(1, 3), (3, 1)])
def test_strip_filters_follow_their_formula(kernel: tuple[int, int]) -> None:
    module = DynamicFilter(16, kernel, dilation=2).double()
    fill_state_dict(module, seed=1, gain=1.0)
    x = torch.randn(2, 16, 4, 5, dtype=torch.float64, generator=torch.manual_seed(0))
    with torch.no_grad():
        kernels = torch.tanh(torch.einsum('oc,nc->no', module.conv.weight[:, :, 0, 0], x.mean((2, 3))))
        torch.testing.assert_close(module(x), reference_filter(module, x, kernels.reshape(2, 8, *kernel)))


@pytest.mark.parametrize('training', [True, False])
def test_square_filter_follows_its_formula(training: bool) -> None:
    module = SquareFilter(16, dilation=3).double().train(training)
    fill_state_dict(module, seed=1, gain=1.0)
    x = torch.randn(3, 16, 4, 5, dtype=torch.float64, generator=torch.manual_seed(0))
    with torch.no_grad():
        bn = module.bn
        scores = torch.einsum('oc,nc->no', module.conv.weight[:, :, 0, 0], x.mean((2, 3)))
        assert bn.running_mean is not None
        assert bn.running_var is not None
        mean = scores.mean(0) if training else bn.running_mean.clone()
        var = scores.var(0, unbiased=False) if training else bn.running_var.clone()
        kernels = torch.tanh((scores - mean) / (var + bn.eps).sqrt() * bn.weight + bn.bias)
        torch.testing.assert_close(module(x), reference_filter(module, x, kernels.reshape(3, 8, 3, 3)))


@pytest.mark.parametrize('training', [True, False])
def test_gradients_reach_every_parameter(training: bool) -> None:
    network = small().train(training)
    sum(out.square().sum() for out in network(torch.rand(2, 3, 64, 96))).backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


def test_outputs_are_a_quarter_half_and_all_of_the_size() -> None:
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        outs = small().eval()(x)
    assert [tuple(out.shape) for out in outs] == [(1, 3, 16, 24), (1, 3, 32, 48), (1, 3, 64, 96)]
    assert outs[ConvIR.final_output].shape == x.shape


def test_untrained_filters_pass_the_image_through() -> None:
    """λ, γ and w start at 0: the features keep their values whatever the filters are."""
    module = DynamicFilter(8, (3, 3), dilation=1)
    x = torch.rand(1, 8, 6, 6)
    torch.testing.assert_close(module(x), x)


def test_training_on_one_image_uses_the_running_statistics() -> None:
    norm = BatchNorm(4)
    fill_state_dict(norm, seed=0, gain=1.0)
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    x = torch.randn(1, 4, 1, 1)
    torch.testing.assert_close(norm.train()(x), norm.eval()(x))
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())
    small().train()(torch.rand(1, 3, 64, 64))[-1].sum().backward()


@pytest.mark.parametrize(('dilations', 'size'), [((7, 9, 11), 256), ((3, 7, 9), 128), ((1, 2, 3), 64)])
def test_min_size_is_the_least_that_works(dilations: tuple[int, ...], size: int) -> None:
    network = ConvIR(num_res=1, base_channel=8, dilations=dilations).eval()
    assert network.min_size == size
    assert ConvIR.min_size == 256
    with torch.no_grad():
        assert network(torch.rand(1, 3, size, size))[-1].shape == (1, 3, size, size)
        with pytest.raises(RuntimeError, match=r'[Pp]adding'):
            network.forward_padded(torch.rand(1, 3, size - 32, size))


def test_channels_last_and_bfloat16_autocast() -> None:
    network, x = small().eval(), torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        want = network(x)[-1]
        last = network.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))[-1]  # type: ignore[call-overload]
        with torch.autocast('cpu', torch.bfloat16):
            low = network(x)[-1]
    torch.testing.assert_close(last, want, rtol=1e-4, atol=1e-4)
    assert F.mse_loss(low.float(), want) < 1e-3 * want.var()


@pytest.mark.long
def test_compiles_into_one_graph() -> None:
    network, x = small(), torch.rand(2, 3, 64, 96)
    compiled = torch.compile(network, backend='eager', fullgraph=True)
    torch.testing.assert_close(compiled(x)[-1], network(x)[-1])
    compiled(x)[-1].sum().backward()


@pytest.mark.parametrize('settings', [{}, {'num_res': 4}, {'num_res': 1, 'base_channel': 24}])
def test_settings_follow_from_the_state_dict(settings: dict[str, Any]) -> None:
    with torch.device('meta'):
        state = ConvIR(**settings).state_dict()
        rebuilt = ConvIR(**ConvIR.settings_from_state(state)).state_dict()
    assert {key: value.shape for key, value in rebuilt.items()} == {key: v.shape for key, v in state.items()}


def test_recognises_its_own_checkpoints_only() -> None:
    for fixture in sorted(CONFORMANCE.glob('*.npz')):
        keys = dict.fromkeys(np.load(fixture, allow_pickle=False)['names'].tolist())
        assert ConvIR.recognises(keys) == fixture.stem.startswith('convir'), fixture.stem


@pytest.mark.parametrize('settings', [{'num_res': 0}, {'base_channel': 12}, {'dilations': (1, 2)}])
def test_impossible_settings_are_a_user_error(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match='ConvIR'):
        ConvIR(**settings)
