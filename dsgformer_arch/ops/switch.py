"""Which form of the block runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

Path = Literal['fast', 'eager', 'plain']

_forced: Path | None = None


def path() -> Path:
    """The form of the block that runs now.

    `'fast'` picks the fastest that suits the call.  `'eager'`
    (`DSGFORMER_EAGER=1`) does the same without compiling anything.  `'plain'`
    (`DSGFORMER_PLAIN=1`) is the literal one.
    """
    if _forced is not None:
        return _forced
    if _set('DSGFORMER_PLAIN'):
        return 'plain'
    return 'eager' if _set('DSGFORMER_EAGER') else 'fast'


def compiled_forms_take(x: Tensor) -> bool:
    """Whether a kernel may run on `x`: the path allows it, and x holds numbers of its own.

    Under a dispatch mode (fake tensors, counting of operations) tensors hold none or must be seen.
    """
    return path() == 'fast' and type(x) is Tensor and not is_in_torch_dispatch_mode()


@contextmanager
def use(chosen: Path) -> Iterator[None]:
    """Run one form within a `with` statement, whatever the environment says."""
    global _forced
    before, _forced = _forced, chosen
    try:
        yield
    finally:
        _forced = before


def _set(name: str) -> bool:
    return os.environ.get(name, '0') not in ('', '0')
