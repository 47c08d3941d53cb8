"""The base class of all networks, which declares the properties that other packages use.

The zoo, spandrel, local pooling and the benchmark read these attributes instead of naming networks.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from dsgformer_arch.archs.layers.padding import crop_padding, pad_to_multiple
from dsgformer_arch.utils.errors import UserError

if TYPE_CHECKING:
    from spandrel import Architecture

Outputs = Tensor | list[Tensor] | tuple[Tensor, ...]
"""What a network returns: an image, or several of which one is the result."""

RGB = 3

Network = TypeVar('Network', bound='RestorationNetwork')


class Hub(Protocol):
    """Networks as folders and repositories of Hugging Face; the zoo has the implementation."""

    def from_pretrained(self, source: str | os.PathLike[str], kind: type[Network], **options: Any) -> Network:
        """See `zoo.from_pretrained`."""

    def save_pretrained(
        self, network: RestorationNetwork, folder: str | os.PathLike[str], **options: Any
    ) -> Path:
        """See `zoo.save_pretrained`."""

    def push_to_hub(self, network: RestorationNetwork, repo_id: str, **options: Any) -> str:
        """See `zoo.push_to_hub`."""


class RestorationNetwork(nn.Module):
    """A network of (N, C, H, W) to the same size, for images of any size.

    A subclass implements `forward_padded`, `recognises` and `settings_from_state`, and overrides the
    attributes below that differ.  A new system is such a class in `archs/`, an entry in `zoo.systems` and
    an option file.

    Attributes:
        pad_multiple: heights and widths that `forward_padded` takes are multiples of this,
        min_size: and at least this.
        input_offset: subtracted from an image in [0, 1] before the network, and added to its output.
        final_output: index of the restored image if the network returns several.
        bytes_per_pixel: memory for each pixel of an image in float32; 0 if it must be counted by
            `restore.memory_per_pixel`.
        channels_last: whether it computes in this memory format, and takes images in it without a conversion.
        tile_multiple: tiles of a larger image start at multiples of this; 0 for `pad_multiple`.
        tile_context: width in pixels of the margin of a tile in which its result differs from that of the
            whole image by what convolutions see beyond the tile; 0 where it is negligible.
        shares_windows: whether its attentions with local pooling take part in `archs.tlc.SharedMaps`.
        pooling_window: side of the windows of local pooling (`archs.tlc`), in pixels; 0 without.
        sees_whole_image: whether a pixel of the result depends on the whole image, so that tiles change it.
        channel_settings: names of the settings for channels of images, the input's first; 3 is the default.
        width_settings: names of the settings for numbers of features, which are scaled together.
        depth_settings: names of the settings for numbers of repeated blocks, each with weights of its own.
        spandrel_architecture: spandrel's own description of this network, if it has one.
        hub: what `from_pretrained`, `save_pretrained` and `push_to_hub` call; the zoo sets it, because they
            need its table and this module knows no network by name.
        settings: keyword arguments that build this network again; defaults are included.
    """

    pad_multiple: int = 1
    min_size: int = 1
    input_offset: float = 0.0
    final_output: int = -1
    bytes_per_pixel: float = 0.0
    channels_last: ClassVar[bool] = False
    tile_multiple: int = 0
    tile_context: int = 0
    shares_windows: ClassVar[bool] = False
    pooling_window: int = 0
    sees_whole_image: ClassVar[bool] = False
    channel_settings: ClassVar[tuple[str, ...]] = ()
    width_settings: ClassVar[tuple[str, ...]] = ()
    depth_settings: ClassVar[tuple[str, ...]] = ()
    spandrel_architecture: ClassVar[Architecture[Any] | None] = None
    hub: ClassVar[Hub]
    settings: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> RestorationNetwork:
        """Record the arguments before `__init__` of a subclass or of a library's class receives them."""
        network = super().__new__(cls)
        bound = inspect.signature(cls.__init__).bind_partial(network, *args, **kwargs)
        given = {name: value for name, value in bound.arguments.items() if name in cls.default_settings()}
        # Not by attribute: nn.Module's own __init__ has not run yet.
        network.__dict__['settings'] = {**cls.default_settings(), **given, **kwargs}
        return network

    def forward(self, x: Tensor) -> Outputs:
        """Pad images by reflection to a size that the network takes, run it, and crop its outputs.

        Args:
            x: (N, C, H, W), H and W at least 1.

        Returns:
            What `forward_padded` returns; an output at a fraction of the size is cropped to that fraction
            of H and W, rounded up.

        Raises:
            UserError: `x` has another number of dimensions or channels.
        """
        if x.ndim != 4 or x.shape[1] != self.image_channels:
            raise UserError(
                f'{type(self).__name__} takes images as (N, {self.image_channels}, H, W), '
                f'not {tuple(x.shape)}; convert them to {self.image_channels} channels'
            )
        padded = pad_to_multiple(x, self.pad_multiple, self.min_size)
        outputs = self.forward_padded(padded)
        if padded is x:
            return outputs
        if isinstance(outputs, Tensor):
            return crop_padding(outputs, x, padded)
        return type(outputs)(crop_padding(output, x, padded) for output in outputs)

    def forward_padded(self, x: Tensor) -> Outputs:
        """The network, for images whose sides are multiples of `pad_multiple` and at least `min_size`.

        Where a class combines this one with a library's network, it is that network's `forward`.
        """
        return super().forward(x)

    def join_batches(self) -> None:
        """Compute in one batch what `forward_padded` computes in several to save memory.

        For counting operators on tensors without data, where every call costs time and memory costs nothing.
        """

    @classmethod
    def from_pretrained(cls: type[Network], source: str | os.PathLike[str], **options: Any) -> Network:
        """The network in a folder or a repository of Hugging Face; see `zoo.from_pretrained`."""
        return cls.hub.from_pretrained(source, cls, **options)

    def save_pretrained(self, folder: str | os.PathLike[str], **options: Any) -> Path:
        """Write `config.json`, `model.safetensors` and a model card; see `zoo.save_pretrained`."""
        return self.hub.save_pretrained(self, folder, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what `save_pretrained` writes; see `zoo.push_to_hub`."""
        return self.hub.push_to_hub(self, repo_id, **options)

    @property
    def image_channels(self) -> int:
        """Channels of the images that the network takes."""
        names = self.channel_settings
        return self.settings.get(names[0], RGB) if names else RGB

    @classmethod
    def recognises(cls, state: Mapping[str, Tensor]) -> bool:
        """Whether `state`, a bare state dict, belongs to this kind of network."""
        if cls.spandrel_architecture is None:
            raise NotImplementedError
        return cls.spandrel_architecture.detect(dict(state))

    @classmethod
    def settings_from_state(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """The settings that follow from the shapes of a state dict; others are left out."""
        raise NotImplementedError

    @classmethod
    def default_settings(cls) -> dict[str, Any]:
        """The keyword arguments of the class with their defaults.

        If `__init__` takes `**kwargs`, the arguments of its base class are included.
        """
        found: dict[str, Any] = {}
        for kind in cls.__mro__:
            if '__init__' in vars(kind):
                parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]  # type: ignore[misc]
                named = {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}
                found = {**named, **found}
                if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                    break
        # Functions, such as a constructor of convolutions, are no settings that a file could hold.
        return {name: default for name, default in found.items() if not callable(default)}

    @classmethod
    def scaled_widths(cls, settings: Mapping[str, Any], width: int) -> dict[str, Any]:
        """The `width_settings`, scaled together so that the first becomes `width`.

        Args:
            settings: what differs from the defaults.
            width: features at the first level.

        Returns:
            Settings to build a narrower or wider network with; empty where no width is declared.
        """
        values = {name: {**cls.default_settings(), **settings}[name] for name in cls.width_settings}
        if not values:
            return {}
        lead = next(iter(values.values()))
        factor = width / (lead if isinstance(lead, int) else lead[0])
        return {name: _scaled(value, factor) for name, value in values.items()}

    def lean_memory(self, itemsize: int) -> float:
        """Bytes for each pixel of an image by an implementation without gradients that needs few of them.

        Args:
            itemsize: bytes of a number in a feature map.

        Returns:
            0 where there is no such implementation, or it does not run.
        """
        return 0.0

    def windowed_attentions(self) -> Iterator[tuple[str, Any]]:
        """Give each attention over all pixels a window, for local pooling at test time (see `archs.tlc`).

        Yields:
            The name of a submodule whose input has the size of the feature map, and the
            `archs.tlc.Windowed` that replaces the attention.
        """
        return iter(())


def meta_copy(network: nn.Module) -> Any:
    """A copy of a network whose tensors have shapes but no data: running it costs neither time nor memory."""
    memo: dict[int, Any] = {}
    for parameter in network.parameters():
        memo[id(parameter)] = nn.Parameter(_meta(parameter), parameter.requires_grad)
    for buffer in network.buffers():
        memo[id(buffer)] = _meta(buffer)
    return copy.deepcopy(network, memo)


def _scaled(value: Any, factor: float) -> int | tuple[int, ...]:
    if isinstance(value, int):
        return max(1, round(value * factor))
    return tuple(max(1, round(v * factor)) for v in value)


def _meta(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device='meta')
