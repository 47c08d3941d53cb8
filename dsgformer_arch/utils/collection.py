"""Programs that start without passes of Python's garbage collector."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Pause the garbage collector, and exempt all objects that exist at the end from later collections.

    For imports at the start of a program.  What importing PyTorch makes lives until the process ends, but
    the collector traverses it several times during the import and in each full collection after it.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
