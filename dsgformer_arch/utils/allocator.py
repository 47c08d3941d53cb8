"""Makes the C library's allocator keep the memory of large tensors.

By default glibc maps fresh memory for each tensor of more than 32 MB and gives
it back when the tensor dies, so that the system zeroes pages for each layer of a
network on a CPU.  Without that, Restormer restores a 256×256 image in half the time.
"""

from __future__ import annotations

import ctypes

# <malloc.h>
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4

_keeps = False


def keep_freed_memory() -> bool:
    """Let this process keep freed memory for its next tensors until it ends.

    For programs that restore images on a CPU; a library should leave it to them.

    Returns:
        Whether the allocator does so now; only glibc's can.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    global _keeps
    _keeps = bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
    return _keeps


def keeps_freed_memory() -> bool:
    """Whether `keep_freed_memory` is active in this process."""
    return _keeps
