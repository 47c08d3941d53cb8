"""Fast implementations of DSGformer's block, beside the reference implementation that they must equal.

`block.py` chooses one: automatically by default, the reference with
`DSGFORMER_PLAIN=1` in the environment or inside `with ops.use('plain')`.
"""

from __future__ import annotations

from dsgformer_arch.ops import block, memory, resampling
from dsgformer_arch.ops.block import Path, fast, path, use

__all__ = ['Path', 'block', 'fast', 'memory', 'path', 'resampling', 'use']
