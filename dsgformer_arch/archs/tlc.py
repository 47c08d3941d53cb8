"""Local statistics at test time (TLC), for networks trained on crops and run on whole images.

Chu X., Chen L., Chen C., Lu X., "Improving Image Restoration by Revisiting Global Information
Aggregation", ECCV 2022, arXiv 2112.04491.  Official implementations: megvii-research/TLC (MPRNet,
Restormer), megvii-research/NAFNet (NAFNet) and Tombs98/MHNet (MHNet), each without approximation
(`fast_imp=False`).

A mean over all pixels, or a channel attention whose scores are sums over all pixels, is trained on crops
and tested on whole images.  With TLC both are computed over a window of about the crop's size instead:

- each mean (`nn.AdaptiveAvgPool2d(1)`) becomes the mean over a window around each pixel; windows are
  shifted inwards at the border;
- each channel attention runs on a grid of windows that cover the map, spread evenly and overlapping
  where they do not fit, and the results are averaged where windows overlap.

A window is `base_size / train_size` times the size that the feature map has in training, so a layer
at half the resolution has windows of half the size.

There is no official TLC for DRSformer and DSGformer; theirs follows the two rules above.  DRSformer's
experts are then weighted for each pixel.

An image that is restored in tiles has its windows of attention at the same places as the whole image
(`placed`); those that a tile cuts are computed from the part that it holds, or taken from a tile before it
that knows them better (`SharedMaps`; DSGformer only).

A network declares its attentions over all pixels in `RestorationNetwork.windowed_attentions`.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsgformer_arch.archs.layers.network import RestorationNetwork, meta_copy
from dsgformer_arch.ops.eager import Grid, Span
from dsgformer_arch.utils.errors import UserError

Window = tuple[int, int]
"""Height and width in pixels of a feature map."""


class Place(NamedTuple):
    """Where a tile lies in its image along one axis, in pixels.

    Attributes:
        start: of the tile.
        length: of the tile.
        whole: length of the image.
        multiple: to which the network pads both.
    """

    start: int
    length: int
    whole: int
    multiple: int


class SharedMaps:
    """What tiles of one image, restored one after the other, tell each other about the windows they share.

    A tile knows the map of an attention well in windows far from the edges where it cuts the image.  Each
    window takes the map from the tile that knows it best so far.
    """

    def __init__(self) -> None:
        self._maps: dict[tuple[int, ...], tuple[float, int, Tensor]] = {}

    def best(self, key: tuple[int, ...], margin: float, bottom: int, own: Tensor) -> Tensor:
        """`own`, or the map of a tile that knew it better; what is best is kept if it is finite.

        Args:
            key: of the attention and the window.
            margin: from the window to the nearest edge at which the tile cuts the image, in pixels.
            bottom: where the window ends in the image, in pixels.
            own: the map as this tile knows it.
        """
        known = self._maps.get(key)
        if known is not None and known[0] > margin:
            return known[2]
        if bool(own.isfinite().all()):
            self._maps[key] = margin, bottom, own.clone()
        return own

    def forget(self, top: int) -> None:
        """Drop the windows above a row of pixels: no later tile has them."""
        self._maps = {key: value for key, value in self._maps.items() if value[1] > top}


class _Tile(NamedTuple):
    vertical: Place
    horizontal: Place
    shared: SharedMaps | None


_tile: ContextVar[_Tile | None] = ContextVar('_tile', default=None)


@contextlib.contextmanager
def placed(
    vertical: Span,
    horizontal: Span,
    size: tuple[int, int],
    multiple: int = 1,
    shared: SharedMaps | None = None,
) -> Iterator[None]:
    """Say which part of an image the networks that are called inside this `with` statement are given.

    Windows of attention then lie where they lie in the whole image.  Within another `placed`, the image is
    the tile of that one.

    Args:
        vertical, horizontal: the tile, in pixels of the image.
        size: height and width of the image.
        multiple: the network's `pad_multiple`.
        shared: one for all tiles of the image; that of the outer `placed` comes first.
    """
    outer = _tile.get()
    places = []
    for i, (start, end) in enumerate((vertical, horizontal)):
        around = (
            Place(0, size[i], size[i], multiple) if outer is None else (outer.vertical, outer.horizontal)[i]
        )
        places.append(Place(around.start + start, end - start, around.whole, multiple))
    if outer is not None and outer.shared is not None:
        shared = outer.shared
    token = _tile.set(_Tile(places[0], places[1], shared))
    try:
        yield
    finally:
        _tile.reset(token)


def use_local_pooling(
    network: nn.Module, train_size: int | Sequence[int], base_size: int | Sequence[int] | None = None
) -> nn.Module:
    """Make a network's global statistics local, in place.

    Keys and values of the state dict stay as they are.  Images that are no larger than the windows are
    restored exactly as before.  Called again, it sets other windows.  A network that is to be compiled
    is compiled after this.

    Args:
        network: a `RestorationNetwork`, wrapped or bare, or another whose only global statistics are
            `nn.AdaptiveAvgPool2d(1)` modules.  MHNet's channel attention stays global, as in its official
            implementation.
        train_size: side, or height and width, of the crops that it was trained on, in pixels.
        base_size: side, or height and width, of the windows at full resolution, in pixels; 1.5 times
            `train_size` by default, which all official implementations use.

    Returns:
        `network`.

    Raises:
        UserError: a size is not a positive number, or the network has no statistics to make local.
    """
    train = _pair(train_size, 'train_size')
    base = (train[0] * 3 // 2, train[1] * 3 // 2) if base_size is None else _pair(base_size, 'base_size')
    statistics = [*_local_pools(network), *_local_attentions(network)]
    if not statistics:
        raise UserError(
            f'local pooling: {type(network).__name__} has no global statistics that could be made local; '
            'switch local pooling off for it.'
        )
    sizes = _training_sizes(network, train)
    for name, local in statistics:
        height, width = sizes[name]
        local.window = (max(1, height * base[0] // train[0]), max(1, width * base[1] // train[1]))
    network.pooling_window = max(base)  # type: ignore[assignment]
    return network


class LocalAvgPool2d(nn.Module):
    """The mean over a window around each pixel; in place of `nn.AdaptiveAvgPool2d(1)`.

    Args:
        window: height and width of the window; None for the whole map.
    """

    def __init__(self, window: Window | None = None) -> None:
        super().__init__()
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same, or to (N, C, 1, 1) where the window covers the map."""
        height, width = x.shape[-2:]
        rows, columns = self.window or (height, width)
        if rows >= height and columns >= width:
            return F.adaptive_avg_pool2d(x, 1)
        # Running sums need more bits than the half precisions have.
        mean = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = _sliding_mean(_sliding_mean(mean, min(columns, width), -1), min(rows, height), -2)
        left, top = width - mean.shape[-1], height - mean.shape[-2]
        mean = F.pad(mean, (left // 2, left - left // 2, top // 2, top - top // 2), mode='replicate')
        return mean.to(x.dtype)

    def extra_repr(self) -> str:
        return f'window={self.window}'


def _sliding_mean(x: Tensor, length: int, dim: int) -> Tensor:
    """Means of `length` neighbours along `dim`, which loses `length - 1`."""
    # One dimension at a time: the sums stay smaller, and more exact, than those of an integral image.
    total = x.cumsum(dim)
    zero = torch.zeros_like(total.narrow(dim, 0, 1))
    total = torch.cat([zero, total], dim)
    count = total.shape[dim] - length
    return (total.narrow(dim, length, count) - total.narrow(dim, 0, count)) / length


def windowed(core: Callable[..., Tensor], maps: Sequence[Tensor], window: Window) -> Tensor:
    """Apply a function of whole feature maps to windows, and average where they overlap.

    The windows cover the map with as few rows and columns of them as possible, spread evenly (TLC's
    Restormer).  One window's worth of memory is needed at a time, besides the result.  Within `placed`,
    the windows are those of the whole image, cut to the tile.

    Args:
        core: takes maps of shape (N, ·, h, w), as many as there are in `maps`; returns one, (N, C, h, w).
        maps: of shape (N, ·, H, W), all with the same N, H and W.
        window: height and width of the windows; larger ones than the map are cut to it.

    Returns:
        (N, C, H, W); exactly `core(*maps)` if one window covers the map.
    """
    height, width = maps[0].shape[-2:]
    rows, columns = ([one.span for one in axis] for axis in _grid(height, width, window))
    if rows == [(0, height)] and columns == [(0, width)]:
        return core(*maps)
    total: Tensor | None = None
    for (top, bottom), (left, right) in itertools.product(rows, columns):
        inside = (..., slice(top, bottom), slice(left, right))
        part = core(*(x[inside] for x in maps))
        if total is None:
            total = part.new_zeros(*part.shape[:-2], height, width)
        total[inside] += part
    assert total is not None
    return total / (_covers(rows, total, -2)[:, None] * _covers(columns, total, -1))


class _PlacedWindow(NamedTuple):
    """A window along one axis.

    Attributes:
        span: the part of it that is in the tile, in pixels of the tile's map.
        number: counted from the start of the image.
        margin: from it to the edges at which the tile cuts the image, in pixels of the image; negative where
            the tile cuts the window.
        end: in pixels of the image.
    """

    span: Span
    number: int
    margin: float
    end: int


def _grid(height: int, width: int, window: Window) -> tuple[list[_PlacedWindow], list[_PlacedWindow]]:
    """The windows along both axes of a map."""
    tile = None if torch.compiler.is_compiling() else _tile.get()
    return (
        _windows(height, window[0], tile and tile.vertical),
        _windows(width, window[1], tile and tile.horizontal),
    )


def _windows(size: int, window: int, place: Place | None) -> list[_PlacedWindow]:
    """The windows along one axis of a map of `size`, which is that of a tile at `place`."""
    whole, offset, scale = size, 0, 1
    if place is not None:
        shrunk, rest = divmod(_padded(place.length, place.multiple), size)
        if not rest and place.start % shrunk == 0:
            scale = shrunk
            whole, offset = _padded(place.whole, place.multiple) // scale, place.start // scale
    window = min(window, whole)
    found: dict[Span, _PlacedWindow] = {}
    for number, start in enumerate(_starts(whole, window)):
        start, end = start - offset, start - offset + window
        if start < size and end > 0:
            before = start if offset else math.inf
            after = size - end if offset + size < whole else math.inf
            # The statistics of a sliver say little: at least half a window counts.
            span = max(0, min(start, size - window // 2)), min(size, max(end, window // 2))
            margin = scale * min(before, after)
            found.setdefault(span, _PlacedWindow(span, number, margin, scale * (offset + end)))
    return list(found.values())


def _padded(length: int, multiple: int) -> int:
    return length + -length % multiple


def _starts(size: int, window: int) -> list[int]:
    """Where windows start that cover `size`: the fewest, spread evenly, the last one flush with the end."""
    number = -(-size // window)
    step = -(-(size - window) // (number - 1)) if number > 1 else 1
    return sorted({min(i * step, size - window) for i in range(number)})


def _covers(spans: Sequence[Span], like: Tensor, dim: int) -> Tensor:
    """How many windows cover each position along `dim`, (size,)."""
    position = torch.arange(like.shape[dim], device=like.device)
    inside = [(start <= position) & (position < end) for start, end in spans]
    return torch.stack(inside).sum(0).to(like.dtype)


class Windowed:
    """`windowed` of one function, with windows that are set later.

    Args:
        core: as in `windowed`.
        window: as in `windowed`; None for the whole map.
    """

    def __init__(self, core: Callable[..., Tensor], window: Window | None = None) -> None:
        self.core = core
        self.window = window

    def __call__(self, *maps: Tensor) -> Tensor:
        return self.core(*maps) if self.window is None else windowed(self.core, maps, self.window)

    def grid(self, height: int, width: int) -> Grid:
        """The windows of a map of this size."""
        rows, columns = _grid(height, width, self.window or (height, width))
        tile = _tile.get()
        shared = tile and tile.shared

        def exchange(image: int, maps: Tensor) -> Tensor:
            if shared is not None:
                for (i, row), (j, column) in itertools.product(enumerate(rows), enumerate(columns)):
                    key = id(self), image, row.number, column.number
                    maps[i, j] = shared.best(key, min(row.margin, column.margin), row.end, maps[i, j])
            return maps

        return Grid([row.span for row in rows], [column.span for column in columns], exchange)


def window_method(module: Any, name: str) -> Windowed:
    """Replace a method of one module by a `Windowed`, and return that.

    Args:
        module: the instance; its class is not changed.
        name: of a method that takes and returns maps as `windowed` asks of its `core`.
    """
    local = Windowed(MethodType(getattr(type(module), name), module))
    setattr(module, name, local)
    return local


Local = tuple[str, LocalAvgPool2d | Windowed]
"""The name of a module whose input has the size of the feature map, and what takes the window."""


def _local_pools(network: nn.Module) -> list[Local]:
    """Replace every pooling to one pixel by a `LocalAvgPool2d`."""
    for parent in network.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.AdaptiveAvgPool2d) and child.output_size in (1, (1, 1)):
                setattr(parent, name, LocalAvgPool2d())
    return [(name, module) for name, module in network.named_modules() if isinstance(module, LocalAvgPool2d)]


def _local_attentions(network: nn.Module) -> list[Local]:
    """Give windows to every attention that a network in `network` declares."""
    return [
        (f'{prefix}.{name}' if prefix else name, local)
        for prefix, module in network.named_modules()
        if isinstance(module, RestorationNetwork)
        for name, local in module.windowed_attentions()
    ]


def _training_sizes(network: nn.Module, train: Sequence[int]) -> dict[str, Window]:
    """Height and width of what each module takes in for an image of `train` pixels, by the module's name.

    A module that runs several times, on parts of the image (MPRNet), has the size of the first.
    """
    sizes: dict[str, Window] = {}

    def noting(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and isinstance(inputs[0], Tensor) and inputs[0].ndim == 4:
                sizes.setdefault(name, (inputs[0].shape[-2], inputs[0].shape[-1]))

        return note

    shapes = meta_copy(network)
    for name, module in shapes.named_modules():
        module.register_forward_pre_hook(noting(name))
    parameter = next(shapes.parameters())
    with torch.no_grad():
        shapes(parameter.new_empty(1, _image_channels(network), *train))
    return sizes


def _image_channels(network: nn.Module) -> int:
    known = (module for module in network.modules() if isinstance(module, RestorationNetwork))
    convolutions = (module for module in network.modules() if isinstance(module, nn.Conv2d))
    found = next(known, None)
    return found.image_channels if found else next(convolutions).in_channels


def _pair(size: int | Sequence[int], name: str) -> Window:
    """A size as height and width."""
    pair = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise UserError(
            f'local pooling: {name} is {size!r}; give a number of pixels or a height and a width.'
        )
    return pair
