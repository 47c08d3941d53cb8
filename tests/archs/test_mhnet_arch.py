"""MHNet equals its official implementation, trains every weight in use, is rebuilt from its state dict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsgformer_arch import zoo
from dsgformer_arch.archs.mhnet_arch import AdaptiveFeatureFusion, LayerNorm2d, MHNet, NAFBlock
from dsgformer_arch.utils.errors import UserError
from tests.conformance.check import check, fill_state_dict, make_input

CONFORMANCE = Path(__file__).resolve().parents[1] / 'conformance'
SMALL: dict[str, Any] = {'width': 16, 'num_cab': 1, 'enc_blk_nums': [1, 1, 2, 1]}
OTHER: dict[str, Any] = {**SMALL, 'num_cab': 2, 'bias': True, 'dec_blk_nums': [1, 1, 1, 2]}
WIDER: dict[str, Any] = {'width': 32, 'num_cab': 1, 'enc_blk_nums': [1, 1, 1, 1], 'middle_blk_num': 2}

UNUSED = ('intro.', 'stage1.ending.', 'stage2.conv_dnc2.', 'stage2.conv_dnc3.', 'stage2.conv_dnc4.')
"""Parameters that no output of the official implementation depends on."""


def small(**settings: Any) -> MHNet:
    network = MHNet(**{**SMALL, **settings})
    fill_state_dict(network, seed=7, gain=1.0)
    return network


def test_conforms_to_the_official_implementation() -> None:
    assert check(MHNet(), str(CONFORMANCE / 'mhnet.npz')) == []


@pytest.mark.parametrize(
    ('settings', 'size', 'mean', 'std', 'pixel'),
    [
        (
            OTHER,
            (32, 48),
            0.5000280164901733,
            0.37517435391964826,
            [0.3343700957, 1.1777145061, 1.0917808721],
        ),
        (
            WIDER,
            (48, 32),
            0.5055462890178452,
            0.3002609016523334,
            [0.1650212237, 0.7700782281, 0.9071105774],
        ),
    ],
    ids=['biases', 'wider'],
)
def test_other_settings_equal_the_official_implementation(
    settings: dict[str, Any], size: tuple[int, int], mean: float, std: float, pixel: list[float]
) -> None:
    # Computed by the official modules, in float64, from the same weights and input.
    network = MHNet(**settings).double().eval()
    fill_state_dict(network, seed=7, gain=1.0)
    with torch.no_grad():
        out = network(make_input(7, *size))
    assert out.mean().item() == pytest.approx(mean, rel=1e-9)
    assert out.std().item() == pytest.approx(std, rel=1e-9)
    assert out[0, :, 3, 5].tolist() == pytest.approx(pixel, rel=1e-8)


def test_norm_is_over_the_channels() -> None:
    norm = LayerNorm2d(6).double()
    fill_state_dict(norm, seed=1, gain=1.0)
    x = 1e-3 * torch.randn(2, 6, 3, 4, dtype=torch.float64, generator=torch.manual_seed(0))
    centred = x - x.mean(1, keepdim=True)
    normal = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    want = normal * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
    torch.testing.assert_close(norm(x), want, rtol=1e-12, atol=1e-12)


def test_fusion_weighs_channels_by_a_softmax_of_their_own() -> None:
    fusion: Any = AdaptiveFeatureFusion(16).double()
    fill_state_dict(fusion, seed=1, gain=1.0)
    maps = torch.randn(3, 2, 16, 5, 4, dtype=torch.float64, generator=torch.manual_seed(0))
    want = torch.zeros_like(maps[0])
    for n in range(2):
        mean = maps[:, n].sum(0).mean((1, 2))
        z = fusion.conv_du[0].weight[:, :, 0, 0] @ mean
        z = z[:2] * z[2:]
        for fc, m in zip(fusion.fcs, maps[:, n], strict=True):
            want[n] += (fc.weight[:, :, 0, 0] @ z).softmax(0).view(-1, 1, 1) * m
    torch.testing.assert_close(fusion(*maps), want, rtol=1e-12, atol=1e-12)


class Spread(nn.Module):
    """The mean over the image at every pixel, or the pixels as they are: two local means."""

    def __init__(self, mean: bool) -> None:
        super().__init__()
        self.mean = mean

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True).expand_as(x) if self.mean else x


def replace_means(network: nn.Module, pool: nn.Module) -> int:
    names = [name for name, module in network.named_modules() if isinstance(module, nn.AdaptiveAvgPool2d)]
    for name in names:
        parent, _, child = name.rpartition('.')
        setattr(network.get_submodule(parent), child, pool)
    return len(names)


def test_local_means_may_replace_all_global_ones() -> None:
    network, x = small().double(), make_input(2, 32, 48)
    keys = set(network.state_dict())
    with torch.no_grad():
        want = network(x)
        # One a block, 5 in the encoder, 4 in the decoder and 4 in stage 2, and one a fusion.
        assert replace_means(network, Spread(mean=True)) == 5 + 4 + 4 + 4
        torch.testing.assert_close(network(x), want, rtol=1e-9, atol=1e-9)
    assert set(network.state_dict()) == keys


def test_a_local_mean_gates_each_pixel_by_its_surroundings() -> None:
    block: Any = NAFBlock(4).double()
    fill_state_dict(block, seed=3, gain=1.0)
    assert replace_means(block, Spread(mean=False)) == 1
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64, generator=torch.manual_seed(0))
    weight, bias = block.sca[1].weight[:, :, 0, 0], block.sca[1].bias
    gated = block.sg(block.conv2(block.conv1(block.norm1(x))))
    gates = torch.einsum('oc,nchw->nohw', weight, gated) + bias.view(-1, 1, 1)
    y = x + block.conv3(gated * gates) * block.beta
    want = y + block.conv5(block.sg(block.conv4(block.norm2(y)))) * block.gamma
    torch.testing.assert_close(block(x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('settings', [{}, OTHER], ids=['default', 'other'])
@pytest.mark.parametrize('training', [True, False])
def test_gradients_reach_every_parameter_that_the_official_implementation_uses(
    settings: dict[str, Any], training: bool
) -> None:
    network = small(**settings).train(training)
    network(make_input(1, 32, 48).float()).square().sum().backward()
    without = {name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {name for name in network.state_dict() if name.startswith(UNUSED)}
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize('size', [(16, 16), (16, 48), (48, 32)])
def test_takes_every_multiple(size: tuple[int, int]) -> None:
    x = make_input(2, *size).float()
    with torch.no_grad():
        y = small()(x)
    assert y.shape == x.shape
    assert torch.isfinite(y).all()


def test_other_sizes_take_the_padding() -> None:
    x = make_input(2, 40, 32).float()
    with torch.no_grad():
        with pytest.raises(RuntimeError):
            small().forward_padded(x)
        assert small()(x).shape == x.shape


def test_an_image_of_a_batch_does_not_depend_on_the_others() -> None:
    network, x = small().double(), torch.cat([make_input(seed, 32, 32) for seed in range(3)])
    with torch.no_grad():
        together, alone = network(x), torch.cat([network(image[None]) for image in x])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)


def channels_last(network: nn.Module, x: Tensor) -> Tensor:
    last = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return last(x.to(memory_format=torch.channels_last))


def compiled(network: nn.Module, x: Tensor) -> Tensor:
    torch.compiler.reset()
    return torch.compile(network, fullgraph=True, backend='eager')(x)


@pytest.mark.parametrize('run', [channels_last, pytest.param(compiled, marks=pytest.mark.long)])
def test_runs_the_same(run: Callable[[nn.Module, Tensor], Tensor]) -> None:
    network, x = small().double(), make_input(3, 32, 48)
    want = network(x).detach()
    got = run(network, x)
    torch.testing.assert_close(got.detach(), want, rtol=1e-9, atol=1e-9)
    got.sum().backward()


def test_trains_under_bfloat16_autocast() -> None:
    network, x = small(), make_input(3, 32, 48).float()
    want = network(x).detach()
    with torch.autocast('cpu', torch.bfloat16):
        got = network(x)
    assert F.mse_loss(got.detach().float(), want) < 1e-3 * want.var()
    got.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    'settings',
    [
        {},
        OTHER,
        {**SMALL, 'affm': False, 'smam': False},
        {**WIDER, 'in_c': 1, 'out_c': 1, 'enc_blk_nums': [0, 1, 12, 2], 'dec_blk_nums': [3, 0, 1, 2]},
    ],
)
def test_settings_follow_from_the_state_dict(settings: dict[str, Any]) -> None:
    with torch.device('meta'):
        state = MHNet(**settings).state_dict()
        found = MHNet.settings_from_state(state)
        rebuilt = MHNet(**found).state_dict()
    assert {key: value.shape for key, value in rebuilt.items()} == {key: v.shape for key, v in state.items()}
    assert {key: found[key] for key in settings} == settings
    assert MHNet.recognises(state)


def test_recognises_its_own_checkpoints_only() -> None:
    for fixture in sorted(CONFORMANCE.glob('*.npz')):
        keys: dict[str, Any] = dict.fromkeys(np.load(fixture, allow_pickle=False)['names'].tolist())
        assert MHNet.recognises(keys) == fixture.stem.startswith('mhnet'), fixture.stem


def test_impossible_settings_are_a_user_error() -> None:
    with pytest.raises(UserError, match='multiple of 16'):
        MHNet(**{**SMALL, 'width': 40})
    with pytest.raises(UserError, match='4 entries'):
        MHNet(**{**SMALL, 'enc_blk_nums': [1, 1, 1]})


# The switches of the paper's ablation.

ABLATION: list[dict[str, bool]] = [
    {'affm': affm, 'smam': smam} for affm in (True, False) for smam in (True, False)
]


@pytest.mark.parametrize('switches', ABLATION)
def test_variants_of_the_ablation_restore_and_train(switches: dict[str, bool]) -> None:
    network = small(**switches)
    x = make_input(4, 32, 48).float()
    y = network(x)
    assert y.shape == x.shape
    y.square().sum().backward()
    without = {name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {name for name in network.state_dict() if name.startswith(UNUSED)}


def test_variants_of_the_ablation_differ_in_their_modules_alone() -> None:
    def size(**switches: bool) -> int:
        with torch.device('meta'):
            return sum(p.numel() for p in MHNet(**switches).parameters())

    c = 64  # four fusions: C to C/8, and from half of it to C three times
    fusions = 4 * (c * c // 8 + 3 * (c // 16) * c)
    m = 16 * c  # Q, K, V by 1×1 and depthwise 3×3; the projection; 8 temperatures and 4 weights
    attention = 3 * m * m + 9 * 3 * m + m * m + 8 + 4
    # Two norms; C to 2C, depthwise 3×3, channel attention, C to C; C to 2C and C to C; beta and gamma.
    block = 4 * m + (2 * m * m + 2 * m) + (18 * m + 2 * m) + 2 * (m * m + m)
    block += (2 * m * m + 2 * m) + (m * m + m) + 2 * m
    assert size() == 67_543_311
    assert size(affm=False) == size() - fusions
    assert size(smam=False) == size() - attention + block
    assert size(affm=False, smam=False) == size() - fusions - attention + block


def test_without_fusion_the_maps_are_added() -> None:
    fusion: Any = MHNet(**SMALL, affm=False).stage2.skff1
    maps = torch.randn(3, 2, 16, 5, 4, generator=torch.manual_seed(0))
    torch.testing.assert_close(fusion(*maps), maps.sum(0))
    assert not [*fusion.parameters()]


@pytest.mark.parametrize('switches', ABLATION)
def test_the_switches_travel_in_the_checkpoint(switches: dict[str, bool], tmp_path: Path) -> None:
    network = small(**switches)
    bare, told = tmp_path / 'bare.pth', tmp_path / 'told.pth'
    torch.save(network.state_dict(), bare)
    torch.save({'params': network.state_dict(), 'network': {'type': 'MHNet', **network.settings}}, told)
    zoo.convert(told, tmp_path / 'net.safetensors')
    x = make_input(4, 32, 32).float()
    for path in (bare, told, tmp_path / 'net.safetensors'):
        assert zoo.identify(path)[1].items() >= switches.items()
        with torch.no_grad():
            assert torch.equal(zoo.load(path)(x), network.eval()(x))
