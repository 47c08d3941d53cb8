"""Networks that take images of any size, made of networks that take some."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

from torch import Tensor, nn

from dsgformer_arch.archs.layers.padding import pad_to_multiple
from dsgformer_arch.restore import Outputs
from dsgformer_arch.utils.errors import UserError

IMAGE_CHANNELS = ('in_c', 'inp_channels', 'img_channel')
"""What the networks call the setting for the channels of their input; 3 is everyone's default."""


@cache
def padded(network_class: type[nn.Module]) -> Callable[..., nn.Module]:
    """A subclass of `network_class` that pads its input by reflection and crops its outputs.

    A subclass, not a wrapper: keys of the state dict, attributes, and number and order of the outputs
    stay as they are.  Its instances can be pickled, copied and compiled.

    Args:
        network_class: of networks that take (N, C, H, W) with H and W multiples of their `pad_multiple`
            and at least their `min_size`.
    """
    described = {
        'unpadded': network_class,
        '__doc__': network_class.__doc__,
        '__module__': network_class.__module__,
    }
    return type(network_class.__name__, (Padded, network_class), described)


class Padded(nn.Module):
    """What `padded` puts before a network's class; of no use by itself."""

    unpadded: ClassVar[type[nn.Module]]
    pad_multiple: int
    min_size: int

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        given = (settings[name] for name in IMAGE_CHANNELS if name in settings)
        self.image_channels: int = next(given, 3)

    def forward(self, x: Tensor) -> Outputs:
        """Images of any size to what the network makes of them.

        Args:
            x: (N, C, H, W).

        Returns:
            What the network returns; an output at a fraction of the size is cropped to that fraction of H
            and W, rounded up.

        Raises:
            UserError: `x` has another shape or number of channels.
        """
        if x.ndim != 4 or x.shape[1] != self.image_channels:
            raise UserError(
                f'{type(self).__name__} takes images as (N, {self.image_channels}, H, W), '
                f'not {tuple(x.shape)}; convert them to {self.image_channels} channels'
            )
        larger = pad_to_multiple(x, self.pad_multiple, self.min_size)
        outputs = super().forward(larger)
        if larger is x:
            return outputs
        if isinstance(outputs, Tensor):
            return _cropped(outputs, x, larger)
        return type(outputs)(_cropped(output, x, larger) for output in outputs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced: Any = super().__reduce_ex__(2)
        return (_blank, (self.unpadded,), *reduced[2:])


def _cropped(output: Tensor, image: Tensor, larger: Tensor) -> Tensor:
    """The part of `output`, made of `larger`, that belongs to `image`."""
    height, width = (-(-image.shape[i] * output.shape[i] // larger.shape[i]) for i in (-2, -1))
    return output[..., :height, :width]


def _blank(network_class: type[nn.Module]) -> nn.Module:
    """An instance without content, for `pickle` and `copy` to fill."""
    subclass: Any = padded(network_class)  # type: ignore[arg-type]
    return subclass.__new__(subclass)
