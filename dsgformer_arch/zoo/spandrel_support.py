"""Registers this project's networks in spandrel, so that `spandrel.ModelLoader` opens their files.

Importing `dsgformer_arch` calls `register`.  Networks that spandrel has itself (Restormer, MPRNet, NAFNet,
FFTformer, IPT) keep its recognition and its classes.

`ModelLoader` passes tensors only.  Settings that do not affect shapes, such as DSGformer's `score`, then have
their official values, whatever the file states.  `load_file` uses those of the file.
"""

from __future__ import annotations

import os

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
from torch import Tensor

from dsgformer_arch.archs.layers.network import RestorationNetwork
from dsgformer_arch.restore import final_output, predict
from dsgformer_arch.zoo import registry


class SystemArchitecture(Architecture[RestorationNetwork]):
    """The spandrel description of one of this project's networks.

    Args:
        architecture: its name in ARCH_REGISTRY, which is its id in spandrel's registry.
    """

    def __init__(self, architecture: str) -> None:
        super().__init__(
            id=architecture, detect=lambda state: registry.network_class(architecture).recognises(state)
        )

    def load(self, state_dict: StateDict) -> ImageModelDescriptor[RestorationNetwork]:
        """The network of a state dict, with its weights.

        Raises:
            CheckpointError: entries that tell the settings are missing.
        """
        settings = registry.settings_of(self.id, state_dict)
        return self.describe(registry.network_class(self.id)(**settings), state_dict)

    def describe(
        self, network: RestorationNetwork, state: StateDict
    ) -> ImageModelDescriptor[RestorationNetwork]:
        """A network of this architecture; it pads its images itself, so spandrel need not."""
        return ImageModelDescriptor(
            network,
            state,
            architecture=self,
            purpose='Restoration',
            tags=[],
            supports_half=False,
            supports_bfloat16=True,
            scale=1,
            input_channels=3,
            output_channels=3,
            size_requirements=SizeRequirements(),
            tiling=ModelTiling.DISCOURAGED if network.sees_whole_image else ModelTiling.SUPPORTED,
            call_fn=_restored,
        )


def register() -> None:
    """Add our architectures, and spandrel_extra_arches', to spandrel's main registry; again does nothing."""
    spandrel_extra_arches.install(ignore_duplicates=True)
    supports = (ArchSupport.from_architecture(SystemArchitecture(name)) for name in own_architectures())
    MAIN_REGISTRY.add(*supports, ignore_duplicates=True)


def own_architectures() -> list[str]:
    """The architectures that spandrel does not have itself."""
    return [
        name
        for name in registry.architectures()
        if registry.network_class(name).spandrel_architecture is None
    ]


def load_file(path: str | os.PathLike[str]) -> ImageModelDescriptor[RestorationNetwork]:
    """Open a checkpoint of any system for spandrel, with the settings that the file states.

    Raises:
        UserError: as `zoo.load`.
    """
    network = registry.load(path)
    architecture = SystemArchitecture(type(network).__name__)
    return architecture.describe(network, network.state_dict())


def _restored(network: RestorationNetwork, image: Tensor) -> Tensor:
    """A network's final image in [0, 1], whatever range its official implementation works in."""
    return final_output(network, predict(network, image, network.input_offset))
