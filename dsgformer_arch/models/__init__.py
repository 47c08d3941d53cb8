"""How networks are trained.  Each module `*_model.py` registers its own in MODEL_REGISTRY when imported."""

import importlib
import pkgutil

for module in pkgutil.iter_modules(__path__):
    if module.name.endswith('_model'):
        importlib.import_module(f'{__name__}.{module.name}')
