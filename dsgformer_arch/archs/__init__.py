"""The networks.  Each module `*_arch.py` registers its own in ARCH_REGISTRY when imported."""

import importlib
import pkgutil


def register_all() -> None:
    """Import every network.  Importing `dsgformer_arch` calls this."""
    for module in pkgutil.iter_modules(__path__):
        if module.name.endswith('_arch'):
            importlib.import_module(f'{__name__}.{module.name}')
