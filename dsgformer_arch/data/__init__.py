"""Data sets.  Each module `*_dataset.py` registers its own in DATASET_REGISTRY when imported."""

import importlib
import pkgutil

for module in pkgutil.iter_modules(__path__):
    if module.name.endswith('_dataset'):
        importlib.import_module(f'{__name__}.{module.name}')
