"""DSGformer and the systems it is compared with, as a plug-in of BasicSR.

Importing this package repairs BasicSR where today's PyTorch breaks it
(`compat`), and registers the networks, data sets, losses, metrics and models
in BasicSR's registries.
"""

from dsgformer_arch import compat

compat.apply()

__version__ = '0.1.0'
