"""Our networks in spandrel's registry, so that `spandrel.ModelLoader` opens their files.

Importing `dsgformer_arch` calls `register`.  Restormer, MPRNet, NAFNet, FFTformer and IPT are
spandrel's own (the first two in spandrel_extra_arches) and keep its recognition and its classes.
"""

from __future__ import annotations

from typing import Any

import spandrel_extra_arches
from spandrel import (
    MAIN_REGISTRY,
    Architecture,
    ArchSupport,
    ImageModelDescriptor,
    ModelTiling,
    SizeRequirements,
    StateDict,
)
from torch import Tensor, nn

from dsgformer_arch import zoo
from dsgformer_arch.restore import final_output, predict

WHOLE_IMAGE = {'DSGformer', 'MHNet', 'DRSformer', 'MBTaylorFormerV2', 'Stripformer'}
"""Networks whose attention sees the whole image: cut into tiles they compute something else."""

ARCHITECTURES = ('DSGformer', 'MHNet', 'Stripformer', 'ConvIR', 'MBTaylorFormerV2', 'DRSformer')
"""Their names in ARCH_REGISTRY, which are their ids in spandrel's."""


class Release(Architecture[nn.Module]):
    """One of our networks as spandrel knows networks.

    Args:
        architecture: its name in ARCH_REGISTRY.
    """

    def __init__(self, architecture: str) -> None:
        super().__init__(
            id=architecture, detect=lambda state: zoo.network_class(architecture).recognises(state)
        )

    def load(self, state_dict: StateDict) -> ImageModelDescriptor[nn.Module]:
        """The network of a state dict, with its weights.

        Raises:
            CheckpointError: entries that tell the settings are missing.
        """
        settings = zoo.settings_of(self.id, state_dict)
        network: Any = zoo.network_class(self.id)(**settings)
        return ImageModelDescriptor(
            network,
            state_dict,
            architecture=self,
            purpose='Restoration',
            tags=[],
            supports_half=False,
            supports_bfloat16=True,
            scale=1,
            input_channels=3,
            output_channels=3,
            size_requirements=SizeRequirements(minimum=network.min_size, multiple_of=network.pad_multiple),
            tiling=ModelTiling.DISCOURAGED if self.id in WHOLE_IMAGE else ModelTiling.SUPPORTED,
            call_fn=_restored,
        )


def register() -> None:
    """Add our architectures, and spandrel_extra_arches', to spandrel's main registry; again does nothing."""
    spandrel_extra_arches.install(ignore_duplicates=True)
    ours = (ArchSupport.from_architecture(Release(architecture)) for architecture in ARCHITECTURES)
    MAIN_REGISTRY.add(*ours, ignore_duplicates=True)


def _restored(network: nn.Module, image: Tensor) -> Tensor:
    """A network's final image in [0, 1], whatever range its release works in."""
    return final_output(network, predict(network, image, getattr(network, 'input_offset', 0.0)))
