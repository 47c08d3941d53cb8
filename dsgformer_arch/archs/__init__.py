"""The networks.  Each module `*_arch.py` registers its own in ARCH_REGISTRY when imported."""

import importlib
import pkgutil

for module in pkgutil.iter_modules(__path__):
    if module.name.endswith('_arch'):
        importlib.import_module(f'{__name__}.{module.name}')
