"""Every system by name, and which system a checkpoint belongs to.

Public functions are in `registry`; those for folders and repositories of Hugging Face are in `hub`.
"""

from dsgformer_arch.zoo.hub import from_pretrained, push_to_hub, save_pretrained
from dsgformer_arch.zoo.registry import *  # noqa: F403
from dsgformer_arch.zoo.registry import __all__ as _of_registry

__all__ = [*_of_registry, 'from_pretrained', 'push_to_hub', 'save_pretrained']
