"""MB-TaylorFormer V2: conformance to the official implementation, gradients, recognition of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dsgformer_arch.archs.convir_arch import ConvIR
from dsgformer_arch.archs.mb_taylorformer_v2_arch import (
    Attention,
    BranchConv,
    BranchNorm,
    MBTaylorFormerV2,
    SelectiveFusion,
)
from dsgformer_arch.utils.errors import UserError
from tests.conformance.check import check, condition, fill_state_dict, make_input

FIXTURES = Path(__file__).parents[1] / 'conformance'

RELEASES: dict[str, dict[str, Any]] = {
    'mbt_b': {'num_blocks': (2, 3, 3, 4), 'num_path': (2, 2, 2, 2)},
    'mbt_l': {'num_blocks': (4, 6, 6, 8), 'num_path': (2, 3, 3, 3)},
    'mbt_xl': {'dim': (28, 56, 112, 160), 'num_blocks': (4, 6, 6, 8), 'num_path': (2, 3, 3, 3)},
}

SMALL: dict[str, Any] = {
    'dim': (8, 16, 24, 32),
    'num_blocks': (1, 2, 1, 1),
    'num_path': (1, 2, 3, 2),
    'heads': (1, 2, 2, 4),
}


LONG_VARIANTS = [pytest.param(name, marks=pytest.mark.long) for name in ('mbt_l', 'mbt_xl')]


@pytest.mark.parametrize('fixture', ['mbt_b', *LONG_VARIANTS])
def test_conforms_to_the_official_implementation(fixture: str) -> None:
    network = MBTaylorFormerV2(**RELEASES[fixture], offset_clamp=(-3, 3))
    assert check(network, str(FIXTURES / f'{fixture}.npz')) == []


@pytest.mark.parametrize('fixture', ['mbt_b', *LONG_VARIANTS])
def test_the_fixture_is_well_conditioned(fixture: str) -> None:
    """Otherwise rounding, which differs between processors, would decide about conformance."""
    network = MBTaylorFormerV2(**RELEASES[fixture], offset_clamp=(-3, 3))
    assert condition(network, str(FIXTURES / f'{fixture}.npz')) < 100


def test_a_wrong_constant_in_one_block_does_not_conform() -> None:
    network = MBTaylorFormerV2(**RELEASES['mbt_b'], offset_clamp=(-3, 3))
    network.latent.mhca_blk['MHCA_layers'][3].attn.focusing_factor = 7
    (fault,) = check(network, str(FIXTURES / 'mbt_b.npz'))
    assert 'relative error' in fault


def test_attention_is_the_formula() -> None:
    """Pixel by pixel, in one branch: Taylor's expansion of softmax with its remainder."""
    attention = Attention(6, 2, 1, 8).double()
    fill_state_dict(attention, 0, 1.0)
    q, k, v = (make_input(seed, 4, 5).repeat(1, 2, 1, 1) - 0.4 for seed in (1, 2, 3))
    position = make_input(4, 4, 5)[:, :2]
    result = attention.attend(q, k, v, position, 1).view(2, 3, 20)
    heads = [t.view(2, 3, 20) for t in (q, k, v)]
    scale, temperature = torch.sigmoid(attention.scale[0]), attention.temperature[0]
    for h in range(2):
        qh, kh, vh = (t[h] for t in heads)
        for pixel in range(20):
            total, weights = torch.zeros(3, dtype=torch.float64), 0.0
            for other in range(20):
                a, b = qh[:, pixel], kh[:, other]
                first = a @ b / (a.norm() * b.norm())
                ar, br = a.relu() ** 8, b.relu() ** 8
                rest = ar @ br / ((ar.norm() + 1e-8) * (br.norm() + 1e-8))
                weight = 1 + first + scale[h].item() * rest
                weights = weights + weight - 1 + attention.one_M.item()
                total = total + weight * vh[:, other]
            expected = total / weights * temperature[h].item() + torch.sigmoid(position.view(2, 20)[h, pixel])
            torch.testing.assert_close(result[h, :, pixel], expected, rtol=1e-6, atol=1e-6)


def test_attention_stays_within_half_precision() -> None:
    """Eighth powers of queries near 8 are beyond float16, what comes of them is not."""
    torch.manual_seed(0)
    attention = Attention(8, 2, 2, 8)
    branches = [40 * torch.randn(1, 8, 6, 7) for _ in range(2)]
    expected = attention(branches)
    with torch.autocast('cpu', torch.float16):
        found = attention(branches)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float16
        assert (a - b).norm() < 0.05 * b.norm()


@pytest.mark.parametrize(
    ('changes', 'culprit'),
    [
        ({'heads': (1, 2, 3, 4)}, 'heads'),
        ({'heads': (1, 2, 2, 8), 'dim': (8, 16, 24, 36)}, 'heads'),
        ({'dim': (8, 24, 24, 32)}, 'dim'),
        ({'dim': (8, 16, 24, 34)}, 'dim'),
    ],
)
def test_widths_that_cannot_be_are_refused(changes: dict[str, Any], culprit: str) -> None:
    with pytest.raises(UserError, match=f'^{culprit}:'):
        MBTaylorFormerV2(**{**SMALL, **changes})


def test_branches_do_not_mix() -> None:
    """Norm and convolutions treat each branch with its own weights."""
    for module in (BranchNorm(4, 3), BranchConv(3, 4, 5), BranchConv(3, 4, 4, 3)):
        fill_state_dict(module.double(), 0, 1.0)
        branches = [
            make_input(seed, 6, 7)[:, :1].repeat(1, 4, 1, 1) + torch.rand(1, 4, 1, 1) for seed in range(3)
        ]
        before = module(branches)
        after = module([branches[0], branches[1] + 1 + torch.rand(1, 4, 1, 1), branches[2]])
        assert torch.equal(before[0], after[0])
        assert torch.equal(before[2], after[2])
        assert not torch.equal(before[1], after[1])


def test_fusion_of_equal_branches_is_that_branch() -> None:
    fusion = SelectiveFusion(8, 3).double()
    x = torch.rand(2, 8, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(fusion([x, x, x]), x)


@pytest.mark.parametrize('bf16', [False, True])
@pytest.mark.parametrize('train', [False, True])
def test_gradients_reach_every_parameter(train: bool, bf16: bool) -> None:
    torch.manual_seed(0)
    network = MBTaylorFormerV2(**SMALL).train(train)
    with torch.autocast('cpu', torch.bfloat16, enabled=bf16):
        y = network(torch.rand(2, 3, 16, 24))
    assert y.shape == (2, 3, 16, 24)
    y.float().square().mean().backward()
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        else:
            assert name.endswith('one_M')


@pytest.mark.parametrize('changes', [{}, {'bias': True}, {'dual_pixel_task': True}, {'heads': (1, 1, 4, 8)}])
def test_settings_are_read_from_a_state_dict(changes: dict[str, Any]) -> None:
    settings = {**SMALL, **changes}
    state = MBTaylorFormerV2(**settings).state_dict()
    assert MBTaylorFormerV2.recognises(state)
    found = MBTaylorFormerV2.settings_from_state(state)
    assert {key: found[key] for key in settings} == settings
    MBTaylorFormerV2(**found).load_state_dict(state)


def test_other_networks_are_not_recognised() -> None:
    assert not MBTaylorFormerV2.recognises(ConvIR(num_res=1).state_dict())


def test_traces_without_graph_breaks() -> None:
    torch.manual_seed(0)
    network = MBTaylorFormerV2(**SMALL).eval()
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        compiled = torch.compile(network, backend='eager', fullgraph=True)(x)
        torch.testing.assert_close(compiled, network(x), rtol=1e-3, atol=1e-4)
