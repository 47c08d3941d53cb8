"""DFGB's filter as two products with a real matrix.

Literal form: `dsgformer_arch.archs.dsgformer_arch.DFGB`.  With B the 64×64
orthonormal matrix whose rows are the cosines and sines of an 8×8 block,

    irfft2( M ⊙ rfft2(x) ) = Bᵀ diag(m) B x

where m holds each entry of M twice, once for the cosine and once for the sine.
The columns 0 and 4 of a half spectrum hold each frequency together with its
negative; `irfft2` drops the imaginary part that unequal entries there give,
which leaves their mean.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 8


def _frequencies() -> list[tuple[int, int, bool]]:
    """(u, v, sine) of each row of B: one of each pair ±(u, v), with no sine where they are the same."""
    rows = []
    for v in range(BLOCK // 2 + 1):
        paired = v in (0, BLOCK // 2)
        for u in range(BLOCK // 2 + 1 if paired else BLOCK):
            rows.append((u, v, False))
            if not (paired and u in (0, BLOCK // 2)):
                rows.append((u, v, True))
    return rows


def _basis() -> Tensor:
    position = torch.arange(BLOCK, dtype=torch.float64)
    rows = []
    for u, v, sine in _frequencies():
        phase = 2 * math.pi / BLOCK * (u * position[:, None] + v * position)
        row = (phase.sin() if sine else phase.cos()).flatten()
        rows.append(row / row.norm())
    return torch.stack(rows)


def _spread() -> Tensor:
    half = BLOCK // 2 + 1
    spread = torch.zeros(BLOCK, half, BLOCK * BLOCK, dtype=torch.float64)
    for column, (u, v, _) in enumerate(_frequencies()):
        spread[u, v, column] += 0.5
        spread[-u % BLOCK if v in (0, BLOCK // 2) else u, v, column] += 0.5
    return spread.flatten(0, 1)


with torch.inference_mode(False):  # a tensor of inference mode could not be used in training
    _BASIS, _SPREAD = _basis(), _spread()


def _constant(value: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    # A compiler folds the conversion of a constant by itself.
    return value.to(device, dtype) if torch.compiler.is_compiling() else _converted(value, dtype, device)


@lru_cache(maxsize=16)
def _converted(value: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return value.to(device, dtype)


def basis(dtype: torch.dtype, device: torch.device) -> Tensor:
    """B, (64, 64): a frequency a row, a pixel of the block (row by row) a column."""
    return _constant(_BASIS, dtype, device)


def diagonal(mask: Tensor) -> Tensor:
    """m of M: (C, 8, 5) to (64, C)."""
    return (mask.flatten(1) @ _constant(_SPREAD, mask.dtype, mask.device)).t()


def filtered(U: Tensor, mask: Tensor) -> Tensor:
    """P⁻¹( F⁻¹( M ⊙ F( P(U) ) ) ), channels last.

    Args:
        U: (N, H, W, C); a height or width that is no multiple of 8 is padded by repeating the border.
        mask: M, (C, 8, 5).

    Returns:
        (N, H, W, C), not always contiguous.
    """
    n, h, w, c = U.shape
    if h % BLOCK or w % BLOCK:
        U = F.pad(U.permute(0, 3, 1, 2), (0, -w % BLOCK, 0, -h % BLOCK), mode='replicate').permute(0, 2, 3, 1)
    rows, columns = U.shape[1] // BLOCK, U.shape[2] // BLOCK
    B, m = basis(U.dtype, U.device), diagonal(mask).to(U.dtype)
    blocks = U.reshape(n, rows, BLOCK, columns, BLOCK, c).transpose(2, 3).reshape(-1, BLOCK * BLOCK, c)
    blocks = B.t() @ (m * (B @ blocks))
    blocks = blocks.reshape(n, rows, columns, BLOCK, BLOCK, c).transpose(2, 3)
    return blocks.reshape(n, rows * BLOCK, columns * BLOCK, c)[:, :h, :w]
