"""DRSformer equals its official implementation, trains every weight and is rebuilt from its state dict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsgformer_arch.archs.drsformer_arch import DRSformer, ExpertCompensator, LayerNorm, TopKSparseAttention
from dsgformer_arch.utils.errors import UserError
from tests.conformance.check import check, fill_state_dict, make_input

CONFORMANCE = Path(__file__).resolve().parents[1] / 'conformance'
SMALL: dict[str, Any] = {'dim': 8, 'num_blocks': [1, 2, 1, 1], 'heads': [1, 2, 2, 4]}
OTHER: dict[str, Any] = {**SMALL, 'bias': True, 'LayerNorm_type': 'BiasFree', 'ffn_expansion_factor': 2.0}


def small(**settings: Any) -> DRSformer:
    network = DRSformer(**{**SMALL, **settings})
    fill_state_dict(network, seed=7, gain=1.0)
    return network


def test_conforms_to_the_official_implementation() -> None:
    assert check(DRSformer(), str(CONFORMANCE / 'drsformer.npz')) == []


@pytest.mark.parametrize(
    ('settings', 'mean', 'std', 'pixel'),
    [
        (OTHER, 0.8245197980519564, 1.2244843530912741, [2.3499869255, 0.4018823052, 2.4258066346]),
        (
            {'moe': False},
            -0.1663797610768683,
            2.598957558596911,
            [-4.2351142808, -1.1836970554, -0.3448122745],
        ),
    ],
    ids=['biases and bias-free norm', 'no experts'],
)
def test_other_settings_equal_the_official_implementation(
    settings: dict[str, Any], mean: float, std: float, pixel: list[float]
) -> None:
    # Computed by the two official files, in float64, from the same weights and input.
    network = DRSformer(**{**SMALL, **settings}).double().eval()
    fill_state_dict(network, seed=7, gain=1.0)
    with torch.no_grad():
        out = network(make_input(7, 16, 24))
    assert out.mean().item() == pytest.approx(mean, rel=1e-9)
    assert out.std().item() == pytest.approx(std, rel=1e-9)
    assert out[0, :, 3, 5].tolist() == pytest.approx(pixel, rel=1e-9)


def test_without_experts_only_their_keys_are_missing() -> None:
    names = np.load(CONFORMANCE / 'drsformer.npz', allow_pickle=False)['names'].tolist()
    with torch.device('meta'):
        state = DRSformer(moe=False).state_dict()
    assert set(state) == {name for name in names if not name.startswith(('encoder_level0.', 'refinement.'))}


def reference_attention(attention: TopKSparseAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head of one image, (c, pixels) each: row by row, one softmax over the kept scores for each k."""
    c = q.shape[0]
    out = torch.zeros_like(v)
    weights = [attention.attn1, attention.attn2, attention.attn3, attention.attn4]
    for i in range(c):
        scores = [float(F.cosine_similarity(q[i], k[j], dim=0)) for j in range(c)]
        order = sorted(range(c), key=lambda j: -scores[j])
        for weight, kept in zip(weights, [c // 2, 2 * c // 3, 3 * c // 4, 4 * c // 5], strict=True):
            exps = {j: torch.exp(torch.tensor(scores[j])).double() for j in order[:kept]}
            total = sum(exps.values())
            out[i] += weight.item() * sum(exps[j] / total * v[j] for j in exps)
    return out


def test_attention_keeps_the_largest_scores() -> None:
    attention = TopKSparseAttention(14, 2, bias=False).double()
    with torch.no_grad():
        for n, weight in enumerate((attention.attn1, attention.attn2, attention.attn3, attention.attn4)):
            weight.fill_(0.1 + n)
        qkv = torch.randn(2, 42, 3, 5, dtype=torch.float64, generator=torch.manual_seed(0))
        got = attention.attend(qkv)
        for image, out in zip(qkv, got, strict=True):
            heads = image.reshape(3, 2, 7, 15).unbind(1)
            want = torch.cat([reference_attention(attention, *head) for head in heads])
            torch.testing.assert_close(out.reshape(14, 15), want, rtol=1e-5, atol=1e-5)


def test_temperature_scales_the_scores() -> None:
    attention = TopKSparseAttention(8, 2, bias=False).double()
    q, v = torch.eye(4, dtype=torch.float64), torch.arange(4, dtype=torch.float64)
    # Each row's own score is 1 and the others 0: a large temperature leaves the row's own value alone.
    qkv = torch.cat([q, q, q, q, v.diag(), v.diag()]).reshape(1, 24, 2, 2)
    with torch.no_grad():
        attention.temperature.fill_(1e3)
        got = attention.attend(qkv)
    torch.testing.assert_close(got, 0.8 * qkv[:, 16:])


def test_norms() -> None:
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64, generator=torch.manual_seed(0))
    scale = (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    for kind, centred in (('BiasFree', x), ('WithBias', x - x.mean(1, keepdim=True))):
        norm = LayerNorm(6, kind).double()  # type: ignore[arg-type]
        fill_state_dict(norm, seed=1, gain=1.0)
        weight, bias = norm.body.weight, getattr(norm.body, 'bias', torch.zeros(6))
        want = centred / scale * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)
        torch.testing.assert_close(norm(x), want, rtol=1e-12, atol=1e-12)


class Spread(nn.Module):
    """The mean over the image at every pixel, or the pixels as they are: two local means."""

    def __init__(self, mean: bool) -> None:
        super().__init__()
        self.mean = mean

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True).expand_as(x) if self.mean else x


def test_a_local_mean_may_replace_the_experts_global_one() -> None:
    experts = ExpertCompensator(6).double()
    fill_state_dict(experts, seed=2, gain=1.0)
    x = torch.randn(2, 6, 9, 7, dtype=torch.float64, generator=torch.manual_seed(0))
    with torch.no_grad():
        want = experts(x)
        weigh: Any = experts.layers[0]
        weigh.avg_pool = Spread(mean=True)
        torch.testing.assert_close(experts(x), want, rtol=1e-12, atol=1e-12)
        weigh.avg_pool = Spread(mean=False)
        weights = weigh(x)
        pixel = weigh.ca_fc(x[1, :, 4, 2]).reshape(4, 8).softmax(1)
    torch.testing.assert_close(weights[:, 1, :, 4, 2], pixel)


@pytest.mark.parametrize('settings', [{}, OTHER, {'moe': False}], ids=['default', 'other', 'no experts'])
@pytest.mark.parametrize('training', [True, False])
def test_gradients_reach_every_parameter(settings: dict[str, Any], training: bool) -> None:
    network = small(**settings).train(training)
    network(make_input(1, 16, 24).float()).square().sum().backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


def test_attention_gradients_equal_finite_differences() -> None:
    attention = TopKSparseAttention(8, 2, bias=False).double()
    qkv = torch.randn(1, 24, 2, 3, dtype=torch.float64, generator=torch.manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(attention.attend, (qkv,))


@pytest.mark.parametrize('size', [(8, 8), (8, 40), (24, 16)])
def test_takes_every_multiple(size: tuple[int, int]) -> None:
    x = make_input(2, *size).float()
    with torch.no_grad():
        y = small()(x)
    assert y.shape == x.shape
    assert torch.isfinite(y).all()


def test_an_image_of_a_batch_does_not_depend_on_the_others() -> None:
    network, x = small().double(), torch.cat([make_input(seed, 16, 16) for seed in range(3)])
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
    network, x = small().double(), make_input(3, 16, 24)
    want = network(x).detach()
    got = run(network, x)
    torch.testing.assert_close(got.detach(), want, rtol=1e-9, atol=1e-9)
    got.sum().backward()


def test_trains_under_bfloat16_autocast() -> None:
    network, x = small(), make_input(3, 16, 24).float()
    want = network(x).detach()
    with torch.autocast('cpu', torch.bfloat16):
        got = network(x)
    # A score that rounds to the other side of a threshold changes more than a rounding.
    assert F.mse_loss(got.detach().float(), want) < 0.02 * want.var()
    got.float().square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


@pytest.mark.parametrize(
    'settings',
    [
        {},
        SMALL,
        {**OTHER, 'moe': False},
        {'inp_channels': 1, 'out_channels': 1, 'dim': 16, 'heads': [2, 1, 4, 16], 'ffn_expansion_factor': 3},
        {'dim': 24, 'num_blocks': [1, 1, 2, 11], 'ffn_expansion_factor': 1.37},
    ],
)
def test_settings_follow_from_the_state_dict(settings: dict[str, Any]) -> None:
    with torch.device('meta'):
        state = DRSformer(**settings).state_dict()
        found = DRSformer.settings_from_state(state)
        rebuilt = DRSformer(**found).state_dict()
    assert {key: value.shape for key, value in rebuilt.items()} == {key: v.shape for key, v in state.items()}
    assert {key: found[key] for key in settings} == settings
    assert DRSformer.recognises(state)


def test_recognises_its_own_checkpoints_only() -> None:
    for fixture in sorted(CONFORMANCE.glob('*.npz')):
        keys: dict[str, Any] = dict.fromkeys(np.load(fixture, allow_pickle=False)['names'].tolist())
        assert DRSformer.recognises(keys) == (fixture.stem == 'drsformer'), fixture.stem


def test_heads_that_do_not_divide_the_width_are_a_user_error() -> None:
    with pytest.raises(UserError, match='3 heads do not divide 8 channels'):
        DRSformer(**{**SMALL, 'heads': [3, 2, 2, 4]})
