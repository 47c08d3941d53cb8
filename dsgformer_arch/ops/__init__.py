"""Fast forms of DTSAS, DFGB and the block, beside the literal ones that they must equal.

One switch says which form runs: automatic by default, the literal one with
`DSGFORMER_PLAIN=1` in the environment or inside `with ops.use('plain')`.
"""

from __future__ import annotations

from torch import Tensor

from dsgformer_arch.ops import dsga, memory, steps
from dsgformer_arch.ops.switch import Path, path, use

__all__ = ['Path', 'dsga', 'fast', 'memory', 'path', 'steps', 'use']


def fast(X: Tensor) -> bool:
    """Whether a fast form of the block runs for X of shape (N, C, H, W)."""
    return path() != 'plain' and X.is_floating_point() and not X.is_meta
