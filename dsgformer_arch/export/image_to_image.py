"""The interface of exported files, the same for all systems, and the module that is exported."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from dsgformer_arch import ops
from dsgformer_arch.archs.layers.network import RGB, RestorationNetwork
from dsgformer_arch.archs.layers.padding import padded_size
from dsgformer_arch.export.substitutes import substitute
from dsgformer_arch.utils.errors import UserError

Precision = Literal['fp32', 'fp16']

INPUT, OUTPUT = 'image', 'restored'
"""Names of the graph's input and output."""

SIDE = 48
"""Approximate least side, in pixels, of the images for export and verification."""


@dataclass(frozen=True)
class Interface:
    """How an exported file is called; it is stored in the file's metadata.

    The input is an RGB image, (N, 3, H, W), float32 in [0, 1]; the output has the same shape, type and
    range but is not clipped.  H and W are multiples of `pad_multiple` and at least `min_size`.
    """

    system: str
    """Name of the system, see `zoo.names`, or of the architecture"""
    settings: dict[str, Any]
    """Keyword arguments of the architecture"""
    precision: Precision
    """Type of the weights and of the arithmetic; input and output are float32 in any case"""
    pad_multiple: int
    min_size: int
    tile_multiple: int = 0
    """Side in pixels of the largest blocks into which the network cuts its maps; 0 if it cuts none"""

    @classmethod
    def of(cls, network: RestorationNetwork, system: str, precision: Precision) -> Interface:
        """The interface of a network."""
        return cls(
            *(system, network.settings, precision),
            *(network.pad_multiple, network.min_size, network.tile_multiple),
        )

    def metadata(self) -> dict[str, str]:
        """Keys and values of a file's metadata, as text."""
        from dsgformer_arch import __version__

        return {
            'system': self.system,
            'settings': json.dumps(self.settings, sort_keys=True),
            'precision': self.precision,
            'pad_multiple': str(self.pad_multiple),
            'min_size': str(self.min_size),
            'color_order': 'RGB',
            'layout': 'NCHW',
            'input_range': '[0, 1]',
            'output_range': '[0, 1], not clipped',
            'dsgformer_version': __version__,
        }

    def side(self, steps: int = 0, least: int = SIDE) -> int:
        """A side in pixels that the file takes, `steps` multiples above the smallest one from `least` up."""
        return padded_size(least, self.pad_multiple, self.min_size) + steps * self.pad_multiple

    @property
    def several_blocks(self) -> int:
        """Least side in pixels at which every map is cut into more than one block.

        Compilers take a number of blocks that is one in the example for one in every image.
        """
        return max(SIDE, self.tile_multiple + 1)

    def export_shape(self) -> tuple[int, int, int, int]:
        """(N, 3, H, W) of the image that the network is traced with."""
        return 2, RGB, self.side(0, self.several_blocks), self.side(1, self.several_blocks)

    def verification_shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """(N, 3, H, W) of the images that a file is verified with; none has a side of `export_shape`'s.

        The first is cut into as few blocks as possible, the second into several.
        """
        least, small = self.several_blocks, 0 if self.tile_multiple else 2
        return (
            (1, RGB, self.side(small + 1), self.side(small)),
            (2, RGB, self.side(2, least), self.side(4, least)),
        )


class ImageToImage(nn.Module):
    """A network with the inputs and outputs of `Interface`.

    Padding is not part of the graph: tools that cut images into tiles pad them anyway.  The network is
    copied; with `exported`, modules of the copy are replaced by their forms for export.

    Raises:
        UserError: the network takes no RGB images.
    """

    def __init__(self, network: RestorationNetwork, exported: bool) -> None:
        super().__init__()
        if network.image_channels != RGB:
            raise UserError(
                f'{type(network).__name__} takes images of {network.image_channels} channels; '
                f'only networks of RGB images can be exported'
            )
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        if exported:
            substitute(self.network)

    def forward(self, image: Tensor) -> Tensor:
        """(N, 3, H, W) to the same; PyTorch's operators only, no compiled kernels."""
        offset = self.network.input_offset
        with ops.use('plain'):
            outputs = self.network.forward_padded(image - offset if offset else image)
        restored = outputs if isinstance(outputs, Tensor) else outputs[self.network.final_output]
        return restored + offset if offset else restored
