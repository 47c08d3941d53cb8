"""DFGB's filter as two products with a real matrix.

Reference implementation: `dsgformer_arch.archs.dsgformer_arch.DFGB`.  With B the 64×64
orthonormal matrix whose rows are the cosines and sines of an 8×8 block,

    irfft2( M ⊙ rfft2(x) ) = Bᵀ diag(m) B x

where m holds each entry of M twice, once for the cosine and once for the sine.
The columns 0 and 4 of a half spectrum hold both a frequency and its negative.
Where their entries of M differ, `irfft2` drops the imaginary part, so their mean
remains.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from dsgformer_arch.ops.isolation import in_new_thread

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


def _basis() -> NDArray[np.float64]:
    position = np.arange(BLOCK)
    rows = []
    for u, v, sine in _frequencies():
        phase = 2 * np.pi / BLOCK * (u * position[:, None] + v * position)
        row = (np.sin(phase) if sine else np.cos(phase)).flatten()
        rows.append(row / np.linalg.norm(row))
    return np.stack(rows)


def _spread() -> NDArray[np.float64]:
    half = BLOCK // 2 + 1
    spread = np.zeros((BLOCK, half, BLOCK * BLOCK))
    for column, (u, v, _) in enumerate(_frequencies()):
        spread[u, v, column] += 0.5
        spread[-u % BLOCK if v in (0, BLOCK // 2) else u, v, column] += 0.5
    return spread.reshape(-1, BLOCK * BLOCK)


_ARRAYS = {'basis': _basis(), 'spread': _spread()}

# In a separate thread, as this module may be imported under a mode that creates tensors without values.
_TENSORS = in_new_thread(lambda: {name: torch.from_numpy(value) for name, value in _ARRAYS.items()})

_CONVERTED: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}


def _constant(name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    if is_in_torch_dispatch_mode():  # which may give a tensor without values: it must not be kept
        return torch.tensor(_ARRAYS[name], dtype=dtype, device=device)
    if torch.compiler.is_compiling():  # which folds the conversion into a constant
        return _TENSORS[name].to(device, dtype)
    key = (name, dtype, device)
    if key not in _CONVERTED:
        with torch.inference_mode(False):  # a tensor of inference mode could not be used in training
            _CONVERTED[key] = _TENSORS[name].to(device, dtype)
    return _CONVERTED[key]


def basis(dtype: torch.dtype, device: torch.device) -> Tensor:
    """B, (64, 64): one row per frequency, one column per pixel of the block (row by row)."""
    return _constant('basis', dtype, device)


def diagonal(mask: Tensor) -> Tensor:
    """m of M: (C, 8, 5) to (64, C)."""
    return (mask.flatten(1) @ _constant('spread', mask.dtype, mask.device)).t()


def filtered(U: Tensor, mask: Tensor) -> Tensor:
    """P⁻¹( F⁻¹( M ⊙ F( P(U) ) ) ), channels last.

    Args:
        U: (N, H, W, C); a height or width that is not a multiple of 8 is padded by repeating the border.
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
