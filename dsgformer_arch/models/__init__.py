"""Training and validation of networks.  Every module `*_model.py` registers its model in MODEL_REGISTRY."""

import importlib
import pkgutil

for module in pkgutil.iter_modules(__path__):
    if module.name.endswith('_model'):
        importlib.import_module(f'{__name__}.{module.name}')
