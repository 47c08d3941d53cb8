"""DTSAS from the Gram matrix of the unnormalised Q and K, with one selection for every threshold.

Reference implementation: `dsgformer_arch.archs.dsgformer_arch.DTSAS`.  Two identities make
this one cheaper:

    (Q/‖Q‖)(K/‖K‖)ᵀ = (Q Kᵀ) / (‖Q‖ ‖K‖ᵀ)      so Q and K are read once and never written normalised
    Σ_n W_n φ(T_{k_n}(A)) = φ(A) · Σ_n W_n [A ≥ τ_n]    as the sets that T_{k_n} keeps are nested
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EPSILON = 1e-12
"""Lower bound of the norms of Q and K, as in `torch.nn.functional.normalize`."""


def scores(gram: Tensor, q_squares: Tensor, k_squares: Tensor, temperature: Tensor) -> Tensor:
    """A = Q Kᵀ / α of the rows of Q and K normalised over the pixels.

    Args:
        gram: Q Kᵀ of the rows as they are, (N, heads, c, c).
        q_squares: sums of squares of the rows of Q, (N, heads, c).
        k_squares: the same of K.
        temperature: α, (heads, 1, 1).

    Returns:
        (N, heads, c, c).
    """
    # The square root has no derivative at 0, so its argument is bounded.
    q_norm = q_squares.clamp_min(EPSILON**2).sqrt().unsqueeze(-1)
    k_norm = k_squares.clamp_min(EPSILON**2).sqrt().unsqueeze(-2)
    return gram / q_norm / k_norm / temperature


def sparse_map(
    A: Tensor, weights: Tensor | None, top_k: Sequence[int], score: str, ranked_by: Tensor | None = None
) -> Tensor:
    """Σ_n W_n φ(T_{k_n}(A)), equal to `DTSAS.attend` (ties at a threshold are all kept).

    Args:
        A: scores, (N, heads, c, c).
        weights: W_n, (N,); None for the dense map of MDTA.
        top_k: k_n, increasing; empty for the dense map.
        score: φ: `'relu2'`, `'relu'` or `'softmax'` (over the kept entries).
        ranked_by: scores that decide which entries T_k keeps; by default A.  A backward pass passes those of
            its forward pass, as rounding could resolve near ties differently.

    Returns:
        The map, of the shape of A.
    """
    if score == 'softmax':
        positive = (A - A.detach().amax(dim=-1, keepdim=True)).exp()
    else:
        positive = A.relu().square() if score == 'relu2' else A.relu()
    if weights is None or not top_k:
        return positive / positive.sum(dim=-1, keepdim=True) if score == 'softmax' else positive
    order = A.detach() if ranked_by is None else ranked_by
    ranked = order.topk(top_k[-1], dim=-1).values
    step = torch.zeros_like(A)
    for W_n, k_n in zip(weights.unbind(), top_k, strict=True):
        kept = (ranked[..., k_n - 1 : k_n] <= order).to(A.dtype)
        if score == 'softmax':
            kept = kept / (kept * positive).sum(dim=-1, keepdim=True)
        step = step + W_n * kept
    return positive * step
