"""Stripformer equals its official implementation, trains every weight and is rebuilt from its state dict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsgformer_arch.archs.stripformer_arch import InterStripBlock, IntraStripBlock, Stripformer
from dsgformer_arch.utils.errors import UserError
from tests.conformance.check import check, fill_state_dict

CONFORMANCE = Path(__file__).resolve().parents[1] / 'conformance'
SMALL: dict[str, Any] = {'channels': (8, 12, 128), 'decoder_channels': 64, 'num_blocks': (3, 2)}


def small() -> Stripformer:
    network = Stripformer(**SMALL)
    fill_state_dict(network, seed=5, gain=0.7)
    return network


def test_conforms_to_the_official_implementation() -> None:
    assert check(Stripformer(), str(CONFORMANCE / 'stripformer.npz')) == []


def reference_strip_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """One sequence of tokens, (L, E), head by head."""
    out = []
    for a, b, c in zip(q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1), strict=True):
        out.append(torch.softmax(a @ b.T / a.shape[1] ** 0.5, dim=-1) @ c)
    return torch.cat(out, dim=1)


def test_intra_attends_within_each_row_and_column() -> None:
    block = IntraStripBlock(128).double()
    horizontal, vertical = torch.randn(2, 2, 64, 5, 7, dtype=torch.float64, generator=torch.manual_seed(0))
    got_h, got_v = block.attention(horizontal, vertical)
    for n in range(2):
        for y in range(5):
            q, k, v = block.qkv_local_h(horizontal[n, :, y].T).chunk(3, dim=1)
            torch.testing.assert_close(got_h[n, :, y].T, reference_strip_attention(q, k, v, 2))
        for x in range(7):
            q, k, v = block.qkv_local_v(vertical[n, :, :, x].T).chunk(3, dim=1)
            torch.testing.assert_close(got_v[n, :, :, x].T, reference_strip_attention(q, k, v, 2))


def test_inter_attends_between_rows_and_between_columns() -> None:
    block = InterStripBlock(128).double()
    horizontal, vertical = torch.randn(2, 2, 64, 5, 7, dtype=torch.float64, generator=torch.manual_seed(0))
    got_h, got_v = block.attention(horizontal, vertical)
    for n in range(2):
        rows = block.conv_h(horizontal[n : n + 1])[0].unbind(1)
        q, k, v = torch.stack([row.reshape(3, -1) for row in rows], dim=1)
        want = reference_strip_attention(q, k, v, 2).reshape(5, 64, 7).transpose(0, 1)
        torch.testing.assert_close(got_h[n], want)
        columns = block.conv_v(vertical[n : n + 1])[0].unbind(2)
        q, k, v = torch.stack([column.reshape(3, -1) for column in columns], dim=1)
        want = reference_strip_attention(q, k, v, 2).reshape(7, 64, 5).permute(1, 2, 0)
        torch.testing.assert_close(got_v[n], want)


@pytest.mark.parametrize('training', [True, False])
def test_gradients_reach_every_parameter(training: bool) -> None:
    network = small().train(training)
    network(torch.randn(2, 3, 16, 24)).square().sum().backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize('size', [(8, 8), (8, 20), (36, 12)])
def test_takes_square_and_other_sizes(size: tuple[int, int]) -> None:
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        y = small()(x)
    assert y.shape == x.shape
    assert torch.isfinite(y).all()


def test_an_image_of_a_batch_does_not_depend_on_the_others() -> None:
    network, x = small().double(), torch.randn(3, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        together, alone = network(x), torch.cat([network(image[None]) for image in x])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)


def test_channels_last_and_bfloat16_autocast() -> None:
    network, x = small().eval(), torch.randn(1, 3, 16, 24)
    with torch.no_grad():
        want = network(x)
        last = network.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))  # type: ignore[call-overload]
        with torch.autocast('cpu', torch.bfloat16):
            low = network(x)
    torch.testing.assert_close(last, want, rtol=1e-4, atol=1e-4)
    assert F.mse_loss(low.float(), want) < 1e-3 * want.var()


def test_compiles_into_one_graph() -> None:
    network, x = small(), torch.rand(2, 3, 16, 24)
    compiled = torch.compile(network, backend='eager', fullgraph=True)
    torch.testing.assert_close(compiled(x), network(x))
    compiled(x).sum().backward()


@pytest.mark.parametrize('settings', [{}, SMALL, {'channels': (16, 32, 64), 'num_blocks': (1, 4)}])
def test_settings_follow_from_the_state_dict(settings: dict[str, Any]) -> None:
    with torch.device('meta'):
        state = Stripformer(**settings).state_dict()
        rebuilt = Stripformer(**Stripformer.settings_from_state(state)).state_dict()
    assert {key: value.shape for key, value in rebuilt.items()} == {key: v.shape for key, v in state.items()}


def test_recognises_its_own_checkpoints_only() -> None:
    for fixture in sorted(CONFORMANCE.glob('*.npz')):
        keys = dict.fromkeys(np.load(fixture, allow_pickle=False)['names'].tolist())
        assert Stripformer.recognises(keys) == (fixture.stem == 'stripformer'), fixture.stem


def test_impossible_widths_are_a_user_error() -> None:
    with pytest.raises(UserError, match='multiple of 64'):
        Stripformer(decoder_channels=100)
