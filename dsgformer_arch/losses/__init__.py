"""The losses that BasicSR lacks.  Each `*_loss.py` registers its own in LOSS_REGISTRY when imported."""

import importlib
import pkgutil

for module in pkgutil.iter_modules(__path__):
    if module.name.endswith('_loss'):
        importlib.import_module(f'{__name__}.{module.name}')
