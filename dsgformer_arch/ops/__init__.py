"""Fast implementations of DSGformer's block, beside the reference implementation that they must equal.

`block.py` chooses one for each call; `use('plain')` or `DSGFORMER_PLAIN=1` in the environment forces the
reference.  `status()` says whether the compiled kernels work on this machine.

The compiled kernel on a CPU keeps up to 1.5 GiB of idle memory for the next image;
`dsgformer_arch.ops.memory.pool.release()` frees it.
"""

from __future__ import annotations

from dsgformer_arch.ops import block, library, memory, resampling
from dsgformer_arch.ops.block import Path, fast, path, use
from dsgformer_arch.ops.status import Status, status

__all__ = ['Path', 'Status', 'block', 'fast', 'library', 'memory', 'path', 'resampling', 'status', 'use']
