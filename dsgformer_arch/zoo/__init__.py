"""Every system by name, and which system a checkpoint belongs to.  Public functions are in `registry`."""

from dsgformer_arch.zoo.registry import *  # noqa: F403
from dsgformer_arch.zoo.registry import __all__ as __all__
