"""The networks that come from spandrel: registered, equal to the official ones, recognised, trainable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from basicsr.archs import build_network
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

from dsgformer_arch.archs.fftformer_arch import FFTformer
from dsgformer_arch.archs.ipt_arch import IPT
from dsgformer_arch.archs.mprnet_arch import MPRNet
from dsgformer_arch.archs.nafnet_arch import LayerNorm2d, NAFNet, SpandrelLayerNorm2d
from dsgformer_arch.archs.restormer_arch import Restormer
from dsgformer_arch.restore import restore
from dsgformer_arch.utils.errors import UserError
from tests.conformance.check import check

FIXTURES = Path(__file__).resolve().parents[1] / 'conformance'

NETWORKS = {'Restormer': Restormer, 'MPRNet': MPRNet, 'NAFNet': NAFNet, 'FFTformer': FFTformer, 'IPT': IPT}

SMALL: dict[str, dict[str, Any]] = {
    'Restormer': {'dim': 8, 'num_blocks': [1, 2, 1, 1], 'num_refinement_blocks': 1},
    'MPRNet': {'n_feat': 8, 'scale_unetfeats': 4, 'scale_orsnetfeats': 4, 'num_cab': 1},
    'NAFNet': {'width': 4, 'enc_blk_nums': [1, 1], 'dec_blk_nums': [1, 1]},
    'FFTformer': {'dim': 8, 'num_blocks': [1, 2, 1], 'num_refinement_blocks': 1},
    'IPT': {'patch_size': 12, 'n_feats': 8, 'num_heads': 4, 'num_layers': 1},
}

OTHER: dict[str, list[dict[str, Any]]] = {
    'Restormer': [
        {'dim': 8, 'num_blocks': [1, 2, 3, 1], 'num_refinement_blocks': 2, 'heads': [2, 1, 4, 8]},
        {'dim': 16, 'num_blocks': [1] * 4, 'ffn_expansion_factor': 2.3, 'bias': True},
        {
            'inp_channels': 6,
            'dim': 8,
            'num_blocks': [1] * 4,
            'LayerNorm_type': 'BiasFree',
            'dual_pixel_task': True,
        },
    ],
    'MPRNet': [
        {'n_feat': 40, 'scale_unetfeats': 20, 'scale_orsnetfeats': 16, 'num_cab': 8},
        {'n_feat': 12, 'scale_unetfeats': 4, 'scale_orsnetfeats': 6, 'num_cab': 2, 'reduction': 3},
        {'n_feat': 8, 'scale_unetfeats': 4, 'kernel_size': 5, 'bias': True, 'out_c': 3},
    ],
    'NAFNet': [
        {'width': 8, 'enc_blk_nums': [1, 2], 'middle_blk_num': 3, 'dec_blk_nums': [2, 1]},
        {'img_channel': 1, 'width': 4, 'enc_blk_nums': [2, 1, 1, 1, 3], 'dec_blk_nums': [1, 1, 1, 1, 2]},
    ],
    'FFTformer': [
        {'dim': 8, 'num_blocks': [1, 2, 3], 'num_refinement_blocks': 2},
        {'dim': 16, 'num_blocks': [1, 1, 1], 'ffn_expansion_factor': 2.66, 'bias': True},
    ],
    'IPT': [
        {'n_feats': 16, 'num_layers': 2, 'scale': [2, 3, 4, 1, 1, 1], 'num_queries': 6},
        {'patch_size': 24, 'patch_dim': 2, 'n_feats': 12, 'num_layers': 1, 'rgb_range': 1, 'no_norm': True},
        {'patch_size': 24, 'n_feats': 12, 'num_layers': 1, 'mlp': False},
        {'n_feats': 12, 'num_layers': 1, 'no_pos': True},
    ],
}


def small(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = NETWORKS[name](**SMALL[name])
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.05 * torch.randn_like(parameter))
    return network


def final(network: nn.Module, y: Any) -> Tensor:
    return y[network.final_output] if isinstance(y, (list, tuple)) else y


def image(network: nn.Module, batch: int = 1) -> Tensor:
    """The smallest size and one more multiple, not square."""
    height = max(network.min_size, 16)
    width = height + max(network.pad_multiple, 7)
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


# Against the official implementations.


@pytest.mark.parametrize(
    ('fixture', 'settings'),
    [
        ('nafnet32', {}),
        ('restormer', {}),
        ('mprnet', {}),
        ('fftformer', {}),
        pytest.param('nafnet64', {'width': 64}, marks=pytest.mark.long),
    ],
)
def test_conforms_to_the_official_implementation(fixture: str, settings: dict[str, Any]) -> None:
    kind = next(kind for name, kind in NETWORKS.items() if fixture.startswith(name.lower()))
    assert check(kind(**settings), str(FIXTURES / f'{fixture}.npz')) == []


@pytest.mark.parametrize('name', NETWORKS)
def test_is_registered_and_built_by_basicsr(name: str) -> None:
    assert ARCH_REGISTRY.get(name) is NETWORKS[name]
    assert isinstance(build_network({'type': name, **SMALL[name]}), NETWORKS[name])


# Recognition.


@pytest.mark.parametrize('name', NETWORKS)
def test_settings_rebuild_the_network(name: str) -> None:
    for settings in [SMALL[name], *OTHER[name]]:
        network = NETWORKS[name](**settings)
        state = network.state_dict()
        found = NETWORKS[name].settings_from_state(state)
        rebuilt = NETWORKS[name](**found)
        rebuilt.load_state_dict(state)
        for key, value in settings.items():
            if key not in ('num_heads', 'ffn_expansion_factor'):
                assert found.get(key) == value, key
        assert NETWORKS[name].recognises(state)


def test_default_settings_are_read_back() -> None:
    with torch.device('meta'):
        restormer, fftformer = Restormer(), FFTformer()
    assert Restormer.settings_from_state(restormer.state_dict())['ffn_expansion_factor'] == 2.66
    assert FFTformer.settings_from_state(fftformer.state_dict())['ffn_expansion_factor'] == 3


def test_incomplete_state_still_gives_settings() -> None:
    state = small('Restormer').state_dict()
    del state['latent.0.ffn.dwconv.weight']
    assert Restormer.settings_from_state(state)['num_blocks'] == [1, 2, 1, 1]


def test_hidden_channels_that_no_factor_gives() -> None:
    state = small('Restormer').state_dict()
    state['latent.0.ffn.project_out.weight'] = torch.zeros(64, 9, 1, 1)
    with pytest.raises(UserError, match='no expansion factor'):
        Restormer.settings_from_state(state)


@pytest.mark.parametrize('name', NETWORKS)
def test_others_are_not_recognised(name: str) -> None:
    own = name.lower()
    for path in FIXTURES.glob('*.npz'):
        state = dict.fromkeys(np.load(path)['names'].tolist(), torch.zeros(()))
        assert NETWORKS[name].recognises(state) == path.stem.startswith(own), path.stem
    for other in NETWORKS:
        assert NETWORKS[name].recognises(small(other).state_dict()) == (other == name)
    assert not NETWORKS[name].recognises({})


# How they run.


@pytest.mark.parametrize('name', NETWORKS)
def test_takes_the_sizes_that_it_declares(name: str) -> None:
    network = small(name).eval()
    x = image(network, batch=2)
    with torch.no_grad():
        y = final(network, network(x))
        assert y.shape == x.shape
        assert torch.allclose(y[1:], final(network, network(x[1:])), atol=1e-5)
        smallest = torch.rand(1, 3, network.min_size, network.min_size)
        assert final(network, network(smallest)).shape == smallest.shape


@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('bf16', [True, False])
def test_gradients_reach_what_the_official_implementation_uses(name: str, training: bool, bf16: bool) -> None:
    network = small(name).train(training)
    with torch.autocast('cpu', torch.bfloat16, enabled=bf16):
        y = final(network, network(image(network)))
    y.float().square().mean().backward()
    without = {key for key, p in network.named_parameters() if p.requires_grad and p.grad is None}
    assert without == ({'reduce_chan_level2.weight'} if name == 'FFTformer' else set())
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize('name', NETWORKS)
def test_precisions_and_layouts(name: str) -> None:
    network = small(name).eval()
    x = image(network)
    with torch.no_grad():
        y = final(network, network(x))
        with torch.autocast('cpu', torch.bfloat16):
            half = final(network, network(x)).float()
        last = final(network, network(x.to(memory_format=torch.channels_last)))
        double = final(network.double(), network(x.double()))
    assert double.dtype == torch.float64
    assert torch.allclose(double.float(), y, atol=2e-5)
    assert torch.allclose(last, y, atol=2e-5)
    # IPT's values are 0 to 255 inside, where bfloat16 resolves 1.
    assert torch.allclose(half, y, atol=0.06)


@pytest.mark.parametrize(
    'name', [name if name == 'NAFNet' else pytest.param(name, marks=pytest.mark.long) for name in NETWORKS]
)
def test_compiles(name: str) -> None:
    network = small(name).train()
    x = image(network)
    expected = final(network, network(x))
    expected.square().mean().backward()
    gradients = {key: p.grad for key, p in network.named_parameters() if p.grad is not None}
    torch.compiler.reset()
    with torch.no_grad():
        whole = torch.compile(network, backend='eager', fullgraph=True)
        assert torch.allclose(final(network, whole(x)), expected, atol=1e-5)
    network.zero_grad()
    torch.compiler.reset()
    # NAFNet's LayerNorm breaks the graph when gradients are wanted; the others must not.
    compiled = torch.compile(network, backend='aot_eager', fullgraph=name != 'NAFNet')
    final(network, compiled(x)).square().mean().backward()
    for key, parameter in network.named_parameters():
        if key in gradients:
            assert torch.allclose(parameter.grad, gradients[key], rtol=1e-3, atol=1e-5), key


# NAFNet.


def test_nafnet_pads_to_its_own_depth() -> None:
    network = NAFNet(width=4, enc_blk_nums=[1, 1, 1], dec_blk_nums=[1, 1, 1])
    assert (network.pad_multiple, network.min_size) == (8, 8)
    assert (NAFNet.pad_multiple, NAFNet.min_size) == (16, 16)
    with torch.no_grad():
        assert network(torch.rand(1, 3, 19, 37)).shape == (1, 3, 19, 37)


# IPT.


def transformer(network: IPT) -> Callable[[Tensor], Tensor]:
    """What one patch becomes: an independent version of the official steps around its Transformer."""

    @torch.no_grad()
    def run(patch: Tensor) -> Tensor:
        index = network.scale_idx
        x = network.head[index](network.sub_mean(255 * patch))
        return network.add_mean(network.tail[index](network.body(x, index) + x)) / 255

    return run


def test_ipt_takes_one_patch_at_once() -> None:
    network = small('IPT').double().eval()
    x = torch.rand(2, 3, 12, 12, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(network(x), transformer(network)(x), atol=1e-10)


@pytest.mark.parametrize('size', [(24, 33), (30, 24), (21, 21)])
def test_ipt_averages_the_inner_halves_of_its_patches(size: tuple[int, int]) -> None:
    """Away from the border a pixel is the mean of the patches, every 3rd pixel, whose inner half has it."""
    network = small('IPT').double().eval()
    height, width = size
    x = torch.rand(1, 3, height, width, dtype=torch.float64)
    total, count = torch.zeros_like(x), torch.zeros_like(x)
    for top in range(0, height - 11, 3):
        for left in range(0, width - 11, 3):
            patch = transformer(network)(x[..., top : top + 12, left : left + 12])
            total[..., top + 3 : top + 9, left + 3 : left + 9] += patch[..., 3:9, 3:9]
            count[..., top + 3 : top + 9, left + 3 : left + 9] += 1
    inner = (..., slice(3, height - 3), slice(3, width - 3))
    with torch.no_grad():
        assert torch.allclose(network(x)[inner], (total / count)[inner], atol=1e-10)


@pytest.mark.parametrize('size', [(12, 13), (12, 40), (13, 12), (19, 26), (25, 17), (37, 38)])
def test_ipt_puts_patches_together_without_seams(size: tuple[int, int]) -> None:
    """With a Transformer and a tail that do nothing, every size comes back as it was."""
    network = small('IPT').double().eval()
    network.head[0] = nn.Identity()
    network.tail[0] = nn.Identity()

    class Nothing(nn.Module):
        def forward(self, x: Tensor, index: int) -> Tensor:
            return torch.zeros_like(x)

    network.body = Nothing()
    x = torch.rand(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(network(x), x, atol=1e-10)


def test_ipt_runs_the_first_task_that_does_not_enlarge() -> None:
    network = IPT(**{**SMALL['IPT'], 'scale': [2, 1, 1], 'num_queries': 3}).eval()
    x = torch.rand(1, 3, 12, 15)
    with torch.no_grad():
        first = network(x)
        network.set_scale(2)
        second = network(x)
    assert network.scale[1:] == [1, 1]
    assert first.shape == second.shape == x.shape
    assert not torch.allclose(first, second)


def test_ipt_batches_of_patches_change_nothing() -> None:
    x = torch.rand(1, 3, 20, 29)
    with torch.no_grad():
        network = small('IPT').eval()
        many = network(x)
        network.crop_batch_size = 3
        assert torch.allclose(network(x), many, atol=1e-5)


def test_ipt_refuses_what_it_cannot_restore() -> None:
    with pytest.raises(UserError, match='scale 1'):
        IPT(**{**SMALL['IPT'], 'scale': [2]})


def test_ipt_pads_images_smaller_than_a_patch() -> None:
    network = small('IPT').eval()
    x = torch.rand(1, 3, 12, 11)
    with torch.no_grad():
        padded = torch.cat([x, x[..., -2:-1]], dim=-1)
        assert torch.equal(network(x), network(padded)[..., :11])


@pytest.mark.parametrize('size', [(16, 16), (17, 50), (48, 31)])
def test_ipt_restores_images_smaller_than_a_patch(size: tuple[int, int]) -> None:
    network = IPT(n_feats=8, num_heads=4, num_layers=1).eval()
    x = torch.rand(1, 3, *size)
    assert restore(network, x).shape == x.shape


@pytest.mark.long
def test_ipt_at_the_official_size() -> None:
    network = IPT().eval()
    assert sum(p.numel() for p in network.parameters()) == 115_312_731
    with torch.no_grad():
        assert network(torch.rand(1, 3, 48, 53)).shape == (1, 3, 48, 53)


@pytest.mark.parametrize('order', [torch.contiguous_format, torch.channels_last])
def test_nafnet_s_norm_is_spandrel_s_with_and_without_gradients(order: torch.memory_format) -> None:
    torch.manual_seed(0)
    original = SpandrelLayerNorm2d(6, eps=1e-3)
    torch.nn.init.normal_(original.weight)
    torch.nn.init.normal_(original.bias)
    norm = LayerNorm2d(original)
    norm.load_state_dict(original.state_dict())
    x = torch.randn(2, 6, 5, 7).contiguous(memory_format=order)
    expected = original(x)
    assert torch.equal(norm(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(norm(x), expected, rtol=1e-5, atol=1e-6)
