"""DSGformer and the systems it is compared with, as a plug-in of BasicSR.

Importing this package repairs BasicSR where today's PyTorch breaks it
(`compat`), registers the networks, data sets, losses, metrics and models in
BasicSR's registries, and the networks in spandrel's.
"""

from dsgformer_arch import compat

compat.apply()

from dsgformer_arch import archs, data, losses, metrics, models  # noqa: E402
from dsgformer_arch.zoo import spandrel_support  # noqa: E402

spandrel_support.register()

__all__ = ['archs', 'compat', 'data', 'losses', 'metrics', 'models']
__version__ = '0.1.0'
