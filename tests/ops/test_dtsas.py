"""One selection and one step function against the direct sum over N maps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dsgformer_arch.archs.dsgformer_arch import DTSAS, Attention, Score
from dsgformer_arch.ops import dtsas

EVERY_SCORE = pytest.mark.parametrize('score', ['relu2', 'relu', 'softmax'])
EVERY_ATTENTION = pytest.mark.parametrize('attention', ['dtsas', 'mdta'])


def _module(channels: int, heads: int, attention: Attention = 'dtsas', score: Score = 'relu2') -> DTSAS:
    module = DTSAS(channels, heads, attention, score).double()
    torch.nn.init.uniform_(module.temperature, 0.5, 2)
    if module.top_k:
        torch.nn.init.normal_(module.weights)
    return module


def _map(module: DTSAS, A: torch.Tensor) -> torch.Tensor:
    return dtsas.sparse_map(A, module.weights if module.top_k else None, module.top_k, module.score)


@EVERY_SCORE
@EVERY_ATTENTION
@pytest.mark.parametrize('width', [2, 5, 48])
def test_map_equals_the_direct_sum(score: Score, attention: Attention, width: int) -> None:
    module = _module(2 * width, 2, attention, score)
    A = torch.randn(3, 2, width, width, dtype=torch.float64)
    torch.testing.assert_close(_map(module, A), module.attend(A), rtol=1e-12, atol=1e-14)


@EVERY_SCORE
def test_ties_at_every_threshold_are_kept(score: Score) -> None:
    module = _module(12, 1, score=score)
    A = torch.randint(1, 4, (2, 1, 12, 12), dtype=torch.float64)  # three values: thresholds fall among equals
    kept = module.attend(A) != 0
    assert (kept.sum(-1) > module.top_k[-1]).any()
    torch.testing.assert_close(_map(module, A), module.attend(A), rtol=1e-12, atol=1e-14)


@EVERY_SCORE
@EVERY_ATTENTION
def test_gradients_of_the_map(score: Score, attention: Attention) -> None:
    module = _module(12, 2, attention, score)
    A = torch.randn(2, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    seed = torch.randn_like(A)
    inputs = [A, module.weights] if module.top_k else [A]
    fast = torch.autograd.grad(_map(module, A), inputs, seed)
    reference = torch.autograd.grad(module.attend(A), inputs, seed)
    for ours, theirs in zip(fast, reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_scores_of_the_gram_matrix_are_those_of_normalised_rows() -> None:
    Q, K = torch.randn(2, 2, 3, 4, 50, dtype=torch.float64)
    Q[0, 0, 0] = 0  # a row without a norm
    temperature = torch.rand(3, 1, 1, dtype=torch.float64) + 0.5
    A = dtsas.scores(Q @ K.mT, Q.square().sum(-1), K.square().sum(-1), temperature)
    expected = F.normalize(Q, dim=-1) @ F.normalize(K, dim=-1).mT / temperature
    torch.testing.assert_close(A, expected, rtol=1e-12, atol=1e-14)


def test_gradient_of_a_row_without_a_norm_is_finite() -> None:
    Q = torch.zeros(1, 1, 2, 9, dtype=torch.float64, requires_grad=True)
    K = torch.randn(1, 1, 2, 9, dtype=torch.float64)
    A = dtsas.scores(
        Q @ K.mT, Q.square().sum(-1), K.square().sum(-1), torch.ones(1, 1, 1, dtype=torch.float64)
    )
    assert torch.autograd.grad(A.sum(), Q)[0].isfinite().all()
