"""Restoration of one image: padding, final output, precision and tiles.

Images that are too large for the memory are restored in tiles that overlap. `restore` takes a tensor;
`restore_rows` streams: it reads rows as it needs them and yields restored rows in order, so that an image
of any height passes through a fixed amount of memory.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from dsgformer_arch.archs.layers.network import Outputs, RestorationNetwork, meta_copy
from dsgformer_arch.archs.layers.padding import padded_size
from dsgformer_arch.archs.tlc import SharedMaps, placed
from dsgformer_arch.utils.memory import free_memory

PRECISIONS = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
"""Names of the precisions that command lines and options take."""

TILE_OVERLAP = 64
"""Pixels by which automatic tiles overlap at least."""

MIDDLE = (0.25, 0.75)
"""Where tiles are blended, as fractions of their overlap."""

AFTER_SHARING = (0.25, 0.5)
"""The same where a tile takes what cut windows hold from the tiles before it: it is good closer to its start
than to its end."""

SMALLEST_TILE = 64
"""Tiles are not halved below this side, in pixels."""

MOST_MEMORY = 2.5e9
"""Upper bound of the memory of automatic tiles in bytes on a CPU: with all else a process takes 4 GB."""

UNKNOWN_MEMORY = 20_000
"""Bytes per pixel assumed for a network whose memory cannot be computed; Restormer takes 13,000."""


@dataclass(frozen=True)
class Tiling:
    """How images are cut into tiles for a network.

    Attributes:
        multiple: the network's `pad_multiple`.
        starts: its `tile_multiple`.
        wanted: overlap in pixels beyond which tiles hardly come closer to the whole image.
        most: the least number of overlaps in a tile.
        blend: the part of an overlap in which one tile replaces the other, as fractions of it.
    """

    multiple: int = 1
    starts: int = 0
    wanted: int = 0
    most: int = 2
    blend: tuple[float, float] = MIDDLE

    @classmethod
    def of(cls, network: nn.Module) -> Tiling:
        """The tiling of a network, as it declares it."""
        if not isinstance(network, RestorationNetwork):
            return cls(getattr(network, 'pad_multiple', 1))
        multiple, starts, window = network.pad_multiple, network.tile_multiple, network.pooling_window
        if window and network.shares_windows:
            return cls(multiple, starts, max(2 * network.tile_context, 5 * window // 2), 2, AFTER_SHARING)
        # A window that ends at the end of a tile then lacks at most half of its pixels.
        wanted = max(2 * network.tile_context, 2 * window // 3)
        return cls(multiple, starts, wanted, 3 if window else 2)

    def overlap(self, tile: int) -> int:
        """Overlap of tiles of a side in pixels."""
        return max(min(TILE_OVERLAP, tile // 4), min(self.wanted, tile // self.most))


def final_output(network: nn.Module, outputs: Outputs) -> Tensor:
    """The restored image among the outputs of a network.

    A network that returns several images (MPRNet's stages, ConvIR's scales)
    says in its class attribute `final_output` which one counts: an index, -1
    where it says nothing.
    """
    if isinstance(outputs, (list, tuple)):
        return outputs[getattr(network, 'final_output', -1)]
    return outputs


def predict(call: Callable[[Tensor], Outputs], image: Tensor, offset: float = 0.0) -> Outputs:
    """The output of a network for an image in [0, 1]; applies the network's input offset.

    Args:
        call: the network, or whatever wraps it.
        image: (N, 3, H, W) in [0, 1].
        offset: the network's attribute `input_offset` (Stripformer: 0.5, for images in [-0.5, 0.5]).

    Returns:
        The network's outputs, shifted back.
    """
    if not offset:
        return call(image)
    outputs = call(image - offset)
    if isinstance(outputs, Tensor):
        return outputs + offset
    return [output + offset for output in outputs]


def set_memory_format(network: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    """Put a network's kernels in a memory format, in place.

    `nn.Module.to(memory_format=…)` stops at parameters of five dimensions, as FFTformer has them.
    """
    for parameter in network.parameters():
        if parameter.ndim == 4 and not parameter.is_contiguous(memory_format=memory_format):
            parameter.data = parameter.data.contiguous(memory_format=memory_format)
    return network


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; restores the mode of every module afterwards."""
    # A module may be frozen in evaluation mode inside a network in training mode.
    training = [module for module in network.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def restore(
    network: nn.Module,
    image: Tensor,
    *,
    precision: str = 'fp32',
    tile: int | str | None = None,
    tile_overlap: int = 32,
) -> Tensor:
    """Restore a batch of images.

    Args:
        network: any network of (N, 3, H, W) to the same size.  A `RestorationNetwork` takes any size, for
            it pads its images itself.
        image: (N, 3, H, W) in [0, 1], on the network's device.
        precision: `'fp32'`, or `'bf16'` or `'fp16'` for autocast.
        tile: largest side of the tiles into which larger images are cut; `'auto'` for the size that
            free memory allows; None for the whole image at once.
            Tiles change the result wherever a network uses statistics of the whole image.
        tile_overlap: how far tiles overlap at least; the overlap is blended.  With `'auto'` it is that of
            `Tiling`.

    Returns:
        (N, 3, H, W), float32 (float64 for a float64 image), not clipped.

    Raises:
        ValueError: tile or overlap are out of range, or the image is not floating point.
    """
    if not image.is_floating_point():
        raise ValueError(f'the image is {image.dtype}; convert it to floating point in [0, 1]')
    tiling = Tiling.of(network)
    if tile == 'auto':
        tile = automatic_tile(network, image.device, image.shape[0], precision)
        tile_overlap = tiling.overlap(tile)
    elif isinstance(tile, str):
        raise ValueError(f'tile is {tile!r}; give a number of pixels, "auto" or None')
    if tile is not None and not 0 <= tile_overlap < tile:
        raise ValueError(
            f'tile_overlap is {tile_overlap}, but should lie between 0 and tile - 1 = {tile - 1}'
        )
    with evaluating(network):
        if tile is None or max(image.shape[-2:]) <= tile:
            restored = whole_image(network, image, precision)
        else:
            bands = restore_rows(
                lambda part: whole_image(network, part, precision),
                lambda top, bottom: image[..., top:bottom, :],
                (image.shape[-2], image.shape[-1]),
                tile,
                tile_overlap,
                tiling,
            )
            restored = torch.cat(list(bands), dim=-2)
    # An inference tensor could not be changed in place.
    return restored.clone(memory_format=torch.contiguous_format)


def whole_image(network: nn.Module, image: Tensor, precision: str) -> Tensor:
    """`restore` without tiles, for a network in evaluation mode and without gradients."""
    dtype = PRECISIONS[precision]
    # Autocast leaves float64 alone, and kernels do not take the mixture.
    enabled = dtype is not torch.float32 and image.dtype != torch.float64
    with torch.autocast(image.device.type, dtype, enabled=enabled):
        outputs = predict(network, image, getattr(network, 'input_offset', 0.0))
    restored = final_output(network, outputs)
    return restored if restored.dtype == torch.float64 else restored.float()


def restore_rows(
    call: Callable[[Tensor], Tensor],
    rows: Callable[[int, int], Tensor],
    size: tuple[int, int],
    tile: int | tuple[int, int],
    overlap: int,
    tiling: Tiling,
    tick: Callable[[float], None] = lambda fraction: None,
) -> Iterator[Tensor]:
    """Restore an image in overlapping tiles, row by row of tiles, and blend them where they overlap.

    Args:
        call: restores a tile, (N, C, h, w) to the same in floating point.
        rows: `rows(top, bottom)` returns (N, C, bottom - top, W), of any type that `call` takes; called with
            increasing `top`.
        size: height and width of the image.
        tile: largest side of a tile, or its largest height and width.
        overlap: least overlap of neighbouring tiles; see `spans`.
        tiling: how the network's images are cut.
        tick: called with the fraction that is done after each tile.

    Yields:
        Restored rows (N, C, n, W) in order, of H rows altogether.
    """
    height, width = size
    high, wide = (tile, tile) if isinstance(tile, int) else tile
    vertical, horizontal = (
        spans(whole, side, overlap, tiling.multiple, tiling.starts, tiling.wanted)
        for whole, side in ((height, high), (width, wide))
    )
    down, across = (_weights(vertical, height, tiling.blend), _weights(horizontal, width, tiling.blend))
    count, done = len(vertical) * len(horizontal), 0
    shared = SharedMaps() if count > 1 else None
    kept: Tensor | None = None
    for index, (top, bottom) in enumerate(vertical):
        source = rows(top, bottom)
        if shared is not None:
            shared.forget(top)
        total = torch.empty(0)
        for number, (left, right) in enumerate(horizontal):
            with placed((top, bottom), (left, right), size, tiling.multiple, shared):
                restored = call(source[..., left:right])
            if len(horizontal) == 1:
                total = restored
            else:
                if number == 0:
                    total = _zeros(restored, restored.shape[-2], width)
                _blend(total[..., left:right], restored, across[number], -1)
            done += 1
            tick(done / count)
        if len(vertical) == 1:
            yield total
            return
        end = (vertical[index + 1][0] if index + 1 < len(vertical) else height) - top
        before = 0 if kept is None else kept.shape[-2]
        # Rows that the next tiles restore as well stay here till then; there may be more than `before`.
        blended = _zeros(total, max(before, bottom - top), width)
        if kept is not None:
            blended[..., :before, :] = kept
        _blend(blended, total, down[index], -2)
        kept = blended[..., end:, :].clone()
        yield blended[..., :end, :]


def _zeros(like: Tensor, height: int, width: int) -> Tensor:
    """Zeros for an image of the type of `like`, channels last, as files and arrays hold pixels."""
    count, channels = like.shape[:2]
    return like.new_zeros(count, height, width, channels).permute(0, 3, 1, 2)


def _blend(total: Tensor, tile: Tensor, weight: Tensor, dim: int) -> None:
    """Add a tile, weighted along `dim`, to `total`; where nothing else is there, it is copied."""
    alone = (weight == 1).nonzero().flatten().tolist()
    first, last = (alone[0], alone[-1] + 1) if alone else (0, 0)
    if len(alone) != last - first:  # not one piece
        first = last = 0
    total.narrow(dim, first, last - first).copy_(tile.narrow(dim, first, last - first))
    weight = weight.to(tile).reshape((-1, *(1,) * (-1 - dim)))
    for start, end in ((0, first), (last, len(weight))):
        shared = tile.narrow(dim, start, end - start) * weight[start:end]
        total.narrow(dim, start, end - start).add_(shared)


def spans(
    size: int, tile: int, overlap: int, multiple: int = 1, starts: int = 0, wanted: int = 0
) -> list[tuple[int, int]]:
    """The fewest tiles that cover `size` and overlap by at least `overlap`, spread evenly.

    Args:
        size: of the image.
        tile: the largest size of a tile.
        overlap: the least overlap.
        multiple: all but the end of the last lie at multiples of this, as far as the size of the tile allows.
        starts: tiles of at least twice this size start at multiples of it: a network that cuts its image into
            blocks then cuts tiles like the whole.
        wanted: overlap that is aimed at where it takes no more tiles; with 0, tiles are as large as allowed.

    Returns:
        Start and end of each.
    """
    if size <= tile:
        return [(0, size)]
    if tile < 2 * multiple:
        multiple = 1
    tile -= tile % multiple
    grid = starts if 0 < 2 * starts <= tile else multiple
    longest = max(grid, (tile - overlap) // grid * grid)
    number = 1 + -(-(size - tile) // longest)
    aimed = max(min(-(-overlap // multiple) * multiple, tile - longest), wanted)
    step = -(-(size - tile) // (number - 1))
    if wanted:
        step = max(step, -(-(size - aimed) // number))
    step = min(longest, step + -step % grid)
    # Tiles of this size and step just reach the end; the last one may be a few pixels shorter.
    enough = -(-(size - step * (number - 1)) // multiple) * multiple
    tile = min(tile, max(enough, step + aimed))
    return [(step * i, min(step * i + tile, size)) for i in range(number)]


def tile_shape(
    size: tuple[int, int], pixels: int, highest: int, overlap: int, multiple: int = 1
) -> tuple[int, int]:
    """Height and width of the tiles that cover an image with the fewest pixels; overlaps count each time.

    Tiles of a fixed size overlap by more than they need where they do not divide the image: three tiles of
    1504 rows compute each of 3000 rows one and a half times.

    Args:
        size: height and width of the image.
        pixels: most pixels of a tile.
        highest: greatest height of a tile.
        overlap: least overlap of neighbouring tiles.
        multiple: sides are multiples of this, unless a tile is as long as the image.

    Returns:
        What `restore_rows` takes as `tile`; `highest` by what `pixels` allow where nothing else fits.
    """
    horizontal = _sides(size[1], overlap, multiple)
    choices = []
    for down, high in _sides(size[0], overlap, multiple):
        if high > highest:
            continue
        for across, wide in horizontal:
            if high * wide <= pixels:
                choices.append((down * across, -high * wide, (high, wide)))
                break  # more columns overlap more often
    return min(choices)[2] if choices else (highest, pixels // highest)


def _sides(length: int, overlap: int, multiple: int) -> list[tuple[int, int]]:
    """What one, two, … tiles along an axis take: the sum of their sides, and the side of each."""
    found = [(length, length)]
    overlap = -(-overlap // multiple) * multiple  # as in `spans`
    count = 2
    while found[-1][1] > max(3 * overlap, 2 * multiple):
        side = -(-(length + (count - 1) * overlap) // count)
        side += -side % multiple
        tiles = spans(length, side, overlap, multiple)
        found.append((sum(end - start for start, end in tiles), side))
        count += 1
    return found


def _weights(tiles: list[tuple[int, int]], size: int, blend: tuple[float, float] = MIDDLE) -> list[Tensor]:
    """Weights of tiles along their axis, on the CPU: 1 where a tile is alone, 1 in sum where tiles overlap.

    They rise smoothly over the part `blend` of what a tile shares with its neighbours: what a tile knows
    least does not count.
    """
    ramps = [torch.ones(end - start, dtype=torch.float64) for start, end in tiles]
    for (_, end), (start, _), before, after in zip(tiles, tiles[1:], ramps, ramps[1:], strict=False):
        position = (torch.arange(end - start, dtype=torch.float64) + 0.5) / max(end - start, 1)
        position = ((position - blend[0]) / (blend[1] - blend[0])).clamp(0, 1)
        rise = (position * (math.pi / 2)).sin().square()
        after[: end - start] *= rise.clamp(min=1e-6)
        before[len(before) - (end - start) :] *= (1 - rise).clamp(min=1e-6)
    total = torch.zeros(size, dtype=torch.float64)
    for (start, end), ramp in zip(tiles, ramps, strict=True):
        total[start:end] += ramp
    return [ramp / total[start:end] for (start, end), ramp in zip(tiles, ramps, strict=True)]


class Halving:
    """Restores tiles, and halves them when memory runs out; later tiles keep the smaller size.

    Args:
        call: restores a tile, (N, C, h, w) to the same.
        tiling: how the network's images are cut.

    Attributes:
        side: largest side of the tiles that `call` is given; None before memory ran out.
    """

    def __init__(self, call: Callable[[Tensor], Tensor], tiling: Tiling) -> None:
        self.call, self.tiling = call, tiling
        self.side: int | None = None

    def __call__(self, image: Tensor) -> Tensor:
        """(N, C, H, W) to the same.

        Raises:
            RuntimeError: PyTorch's own, where not even the smallest tile fits, or for other reasons.
        """
        while True:
            size = (image.shape[-2], image.shape[-1])
            if self.side is None or max(size) <= self.side:
                try:
                    return self.call(image)
                except (RuntimeError, MemoryError) as error:
                    half = -(-max(size) // 2)
                    if not is_out_of_memory(error) or half < SMALLEST_TILE:
                        raise
                    self.side = half + -half % self.tiling.multiple
                if image.is_cuda:  # outside `except`: the traceback holds the tensors
                    torch.cuda.empty_cache()
            bands = restore_rows(
                self,
                lambda top, bottom: image[..., top:bottom, :],
                size,
                self.side,
                self.tiling.overlap(self.side),
                self.tiling,
            )
            # A tile of this call may be halved again; then start over.
            side = self.side
            restored = torch.cat(list(bands), dim=-2)
            if self.side == side or restored.shape == image.shape:
                return restored


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception reports that memory ran out, on a GPU or in the C library's allocator."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        'out of memory' in text or "can't allocate memory" in text or 'not enough memory' in text
    )


def memory_budget(device: torch.device) -> float:
    """Bytes that automatic tiles may take: half of what is free, and no more than `MOST_MEMORY` on a CPU."""
    return min(free_memory(device) / 2, MOST_MEMORY if device.type == 'cpu' else math.inf)


def automatic_tile(network: nn.Module, device: torch.device, batch: int = 1, precision: str = 'fp32') -> int:
    """Side of the largest square tile whose restoration fits into `memory_budget`, in pixels."""
    side = math.isqrt(int(memory_budget(device) / batch / restoring_memory(network, device, precision)))
    multiple = getattr(network, 'pad_multiple', 1)
    return max(SMALLEST_TILE, side - side % multiple)


def restoring_memory(network: nn.Module, device: torch.device, precision: str) -> float:
    """Bytes that restoring takes for each pixel of an image, by the implementation that runs.

    Elsewhere than on a CPU memory that runs out is noticed, so that `memory_per_pixel` is always taken there.
    """
    if device.type != 'cpu' or not isinstance(network, RestorationNetwork):
        return memory_per_pixel(network)
    return network.lean_memory(2 if precision == 'bf16' else 4) or memory_per_pixel(network)


def memory_per_pixel(network: nn.Module, side: int = 256) -> float:
    """Bytes that restoring takes for each pixel of an image, in float32; an upper bound for autocast.

    The network declares it (`bytes_per_pixel`), or it is counted.
    """
    declared: float = getattr(network, 'bytes_per_pixel', 0.0)
    return declared or counted_memory(network, side)


def counted_memory(network: nn.Module, side: int = 256) -> float:
    """`memory_per_pixel` of any network, by counting.

    The network runs on an image whose tensors have shapes but no data, while the bytes of the tensors that
    are alive at the same time are added up.  Half is added for what libraries allocate in their operators.
    """
    try:
        shapes = meta_copy(network)
        side = padded_size(side, getattr(network, 'pad_multiple', 1), getattr(network, 'min_size', 1))
        image = torch.empty(1, 3, side, side, device='meta')
        with evaluating(shapes), _Alive() as alive:
            shapes(image)
    except Exception:
        return UNKNOWN_MEMORY  # the network has operators that need the values of tensors
    return 1.5 * alive.most / side**2


class _Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that operators inside it created and that are alive together."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self._now = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = operator(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                if reference.cdata not in self._alive:
                    self._alive[reference.cdata] = reference, storage.nbytes()
                    self._now += storage.nbytes()
        if self._now > self.most:  # at most: what has died since then is still counted
            self._alive = {key: value for key, value in self._alive.items() if not value[0].expired()}
            self._now = sum(size for _, size in self._alive.values())
            self.most = max(self.most, self._now)
        return result
