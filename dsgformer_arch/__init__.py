"""DSGformer and the systems it is compared with, as a plug-in of BasicSR.

Importing this package fixes BasicSR where today's PyTorch breaks it
(`compat`), registers the networks, data sets, losses, metrics and models in
BasicSR's registries, and the networks in spandrel's.

`Deblurrer` restores images; `zoo` has every system by name; `restore` takes a
network and a tensor.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsgformer_arch import archs, compat, data, losses, metrics, models, zoo
    from dsgformer_arch.inference.deblurrer import Deblurrer

__all__ = [
    'Deblurrer',
    'archs',
    'compat',
    'data',
    'losses',
    'metrics',
    'models',
    'register',
    'zoo',
]
__version__ = '0.1.0'

_LAZY = {'Deblurrer': 'dsgformer_arch.inference.deblurrer'}
"""What is imported when it is first used, and the module that has it."""


def register() -> None:
    """Fix BasicSR and register everything that this package has; a second call does nothing.

    Importing the package calls it.  Only the command `dsgformer` waits until it needs a network, for that
    takes seconds, which `dsgformer --help` should not.
    """
    global _registered
    if _registered:
        return
    _registered = True  # what is imported below asks for attributes of this module, see __getattr__
    try:
        importlib.import_module(f'{__name__}.compat').apply()
        for name in ('archs', 'data', 'losses', 'metrics', 'models'):
            importlib.import_module(f'{__name__}.{name}')
        importlib.import_module(f'{__name__}.archs').register_all()
        importlib.import_module(f'{__name__}.zoo.spandrel_support').register()
        importlib.import_module(f'{__name__}.ops.flops')
    except BaseException:
        _registered = False
        raise


_registered = False


def register_dsgformer() -> None:
    """Register DSGformer and nothing else, in a third of the time of `register`.

    It needs neither spandrel nor torchvision, nor more of BasicSR than its registries.  Only for a process
    that restores with it, such as the command `dsgformer deblur`; `register` can follow.
    """
    if not _registered:
        importlib.import_module(f'{__name__}.compat').load_registries()
        importlib.import_module(f'{__name__}.archs.dsgformer_arch')


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    if not _runs_the_command():  # which registers what it needs
        register()
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    return importlib.import_module(f'{__name__}.{name}')


def _runs_the_command() -> bool:
    """Whether the console script `dsgformer`, which registers by itself, is what imports the package."""
    return os.path.basename(sys.argv[0] if sys.argv else '') in ('dsgformer', 'dsgformer.exe')


if not _runs_the_command():
    register()
