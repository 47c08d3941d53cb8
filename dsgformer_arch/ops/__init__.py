"""Fast forms of DTSAS, DFGB and the block, beside the literal ones that they must equal.

`path()` says which of them runs: `'fast'` by default, `'plain'` with
`DSGFORMER_PLAIN=1` in the environment or inside `with use('plain')`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch import Tensor

from dsgformer_arch.ops import dsga

Path = Literal['fast', 'plain']

__all__ = ['Path', 'dsga', 'fast', 'path', 'use']

_forced: Path | None = None


def path() -> Path:
    """Which form of the block runs now."""
    if _forced is not None:
        return _forced
    return 'plain' if os.environ.get('DSGFORMER_PLAIN', '0') not in ('', '0') else 'fast'


@contextmanager
def use(chosen: Path) -> Iterator[None]:
    """Run one form within a `with` statement, whatever the environment says."""
    global _forced
    before, _forced = _forced, chosen
    try:
        yield
    finally:
        _forced = before


def fast(X: Tensor) -> bool:
    """Whether the fast form of a block runs for X of shape (N, C, H, W)."""
    return path() == 'fast' and X.is_floating_point()
