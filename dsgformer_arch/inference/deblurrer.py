"""Restore images from Python: `Deblurrer().restore(image)`.

Takes NumPy arrays, PIL images, tensors, batches and iterators of frames, and returns the same kind.
The command line is built on it.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from dsgformer_arch.cuda_graphs import CudaGraphs
from dsgformer_arch.inference import guard, weights
from dsgformer_arch.restore import (
    PRECISIONS,
    SMALLEST_TILE,
    TILE_OVERLAP,
    Halving,
    Tiling,
    automatic_tile,
    evaluating,
    is_out_of_memory,
    memory_budget,
    restore_rows,
    tile_shape,
    whole_image,
)
from dsgformer_arch.utils.errors import UserError

Pixels = NDArray[Any]
"""An image or a batch: (H, W), (H, W, C) or (N, H, W, C) with C of 1 to 4; the second or fourth is alpha."""

BAND_BYTES = 300_000_000
"""What a row of tiles may take beside the tile that is being restored, without making that smaller."""

BAND_SHARE = 0.5
"""Share of the tile's memory that a row of tiles may take besides."""

MOST_BAND_SHARE = 0.6
"""The same where tiles would not be twice as high as they overlap."""

BYTES_OF_A_BAND = 40
"""Bytes for each of its pixels: three float32 copies of three channels, and the pixels themselves."""

STRIP_VALUES = 1 << 18
"""Numbers that are converted at once: in float32 1 MiB, which a processor's cache holds."""

FRAMES_AT_ONCE = 8
"""Frames of a video in one batch on a GPU."""

PILLOW_MODES = ('L', 'LA', 'RGB', 'RGBA')


@dataclass
class Report:
    """What happened while images were restored.

    Attributes:
        notes: sentences about what did not go as asked, such as blocks that were restored again.
        tiles: number of tiles that were restored.
        network_seconds: wall time of the forward passes alone.
    """

    notes: list[str] = field(default_factory=list)
    tiles: int = 0
    network_seconds: float = 0.0

    def note(self, text: str) -> None:
        """Add a sentence, once."""
        if text not in self.notes:
            self.notes.append(text)


class Deblurrer:
    """A network with its weights, and the settings with which it restores.

    Args:
        model: a name of `zoo.names()`, or a network of (N, 3, H, W) in [0, 1] to the same; by default the
            system whose weights come with the package.
        weights: a checkpoint; the system is detected from the file.
        device: `'auto'` (a GPU where there is one), `'cpu'`, `'cuda'`, `'cuda:1'` or `'mps'`.
        precision: `'fp32'`; `'bf16'` or `'fp16'` for autocast; `'auto'` for bf16 where the device computes
            in it, the system tolerates it and the image has 8 bits, and fp32 otherwise.
        tile: largest side of the tiles into which images are cut; `'auto'` for what free memory allows;
            None for whole images.
        tlc: local pooling at test time (Chu et al., ECCV 2022): True, or the side of the crops that the
            network was trained on (256 for True).
        strength: 0 returns the image, 1 the restored one, values between them blend.

    Attributes:
        name: the name of the network.
        network: the network, in evaluation mode, on the device.
        report: what happened since it was last replaced; see `Report`.

    Raises:
        UserError: unknown model, no weights, or a setting that is out of range or not possible here.
    """

    def __init__(
        self,
        model: str | nn.Module | None = None,
        *,
        weights: str | Path | None = None,
        device: str | torch.device = 'auto',
        precision: str = 'auto',
        tile: int | str | None = 'auto',
        tlc: bool | int = False,
        strength: float = 1.0,
    ) -> None:
        _check(precision, tile, strength)
        self.device = choose_device(device)
        self.precision, self.tile, self.strength = precision, tile, strength
        self.report = Report()
        self._plain: Callable[[], nn.Module] | None = None
        if isinstance(model, nn.Module):
            if weights is not None or tlc:
                raise UserError(
                    'a network was given; load its weights and switch local pooling on beforehand '
                    '(zoo.load(…, tlc=…))'
                )
            self.network, self.name = model, type(model).__name__
        else:
            self.network, self.name = _load(model, weights, tlc)
            if tlc:
                self._plain = lambda: _load(model, weights, False)[0]
        self.network = self.network.to(self.device)
        self._automatic: dict[str, int] = {}  # sides of automatic tiles, by precision
        self._graphs: dict[str, CudaGraphs] = {}
        self._replay = False  # True while frames of one size are replayed as CUDA graphs
        self._unrecordable = False  # True once recording the network has failed
        self._halving: dict[str, Halving] = {}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the network's weights, in hexadecimal digits."""
        digest = hashlib.sha256()
        for name, tensor in self.network.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @overload
    def restore(self, image: Image.Image) -> Image.Image: ...
    @overload
    def restore(self, image: NDArray[Any]) -> NDArray[Any]: ...
    @overload
    def restore(self, image: Tensor) -> Tensor: ...
    @overload
    def restore(self, image: list[Any]) -> list[Any]: ...
    @overload
    def restore(self, image: Iterator[Any]) -> Iterator[Any]: ...

    def restore(self, image: Any) -> Any:
        """Restore an image, a batch, a list of images or an iterator of frames; the same kind comes back.

        Args:
            image: one of

                - NumPy array, (H, W), (H, W, C) or (N, H, W, C): uint8, uint16, or floating point in
                  [0, 1]; C is 1 (grey), 2 (grey and alpha), 3 (RGB) or 4 (RGB and alpha);
                - PIL image: modes L, LA, RGB and RGBA as they are, others converted to RGB or RGBA;
                - tensor (C, H, W) or (N, C, H, W), C of 1 or 3, floating point in [0, 1] or uint8;
                - list of any of these, of any sizes;
                - iterator or generator of any of these: restored lazily, one after the other.  On a GPU,
                  arrays of one size are restored several at once.

        Returns:
            The same kind, size and data type; alpha unchanged; values clipped to the range of the type.

        Raises:
            UserError: an array that is not an image, or has values outside [0, 1].
        """
        if isinstance(image, Image.Image):
            return self._pillow(image)
        if isinstance(image, np.ndarray):
            return self._array(image)
        if isinstance(image, Tensor):
            return self._tensor(image)
        if isinstance(image, (list, tuple)):
            return type(image)(self._frames(image))
        if isinstance(image, Iterator):
            return self._frames(image)
        raise UserError(
            f'cannot restore a {type(image).__name__}; give a NumPy array, a PIL image, a tensor, a list or '
            'an iterator of them (dsgformer deblur restores files)'
        )

    def bands(
        self,
        rows: Callable[[int, int], Pixels],
        size: tuple[int, int],
        tick: Callable[[float], None] = lambda fraction: None,
    ) -> Iterator[Pixels]:
        """Restore an image that need not be in memory: rows are read and yielded from top to bottom.

        Args:
            rows: `rows(top, bottom)` returns (bottom - top, W, C) as for `restore`; called with increasing
                `top`, and first with (0, 1).
            size: height and width.
            tick: called with the fraction that is done.

        Yields:
            Restored rows, (n, W, C), in order and of the same type.
        """
        first = rows(0, 1)
        _check_pixels(first)
        precision = self._precision(first.dtype)
        shape = self._shape(size, precision)
        tiling = Tiling.of(self.network)
        overlap = tiling.overlap(min(shape))
        pixels, order = first, self._order

        def read(top: int, bottom: int) -> Tensor:
            nonlocal pixels
            pixels = rows(top, bottom)
            return torch.from_numpy(np.require(pixels, requirements=['C', 'W'])).permute(2, 0, 1)[None]

        def call(part: Tensor) -> Tensor:
            return self._tile(to_tensor(part[0].permute(1, 2, 0).numpy(), order), precision)

        restored = restore_rows(call, read, size, shape, overlap, tiling, tick)
        # A band starts where the rows start that were read for it.
        for band in _evaluating(self.network, restored):
            yield self._finished(band, pixels[: band.shape[-2]])

    def _array(self, array: Pixels) -> Pixels:
        _check_pixels(array)
        if array.ndim == 4:
            return self._batch(array)
        pixels = array[..., None] if array.ndim == 2 else array
        result = np.empty_like(pixels)
        top = 0
        for band in self.bands(lambda a, b: pixels[a:b], (pixels.shape[0], pixels.shape[1])):
            result[top : top + len(band)] = band
            top += len(band)
        return result.reshape(array.shape)

    def _batch(self, frames: Pixels) -> Pixels:
        """(N, H, W, C) to the same: whole frames, several at once on a GPU where they fit."""
        size = (frames.shape[1], frames.shape[2])
        precision = self._precision(frames.dtype)
        high, wide = self._shape(size, precision)
        if not self._batches or size[0] > high or size[1] > wide:
            return np.stack([self._array(frame) for frame in frames])
        # What fits into one tile fits as several smaller frames.
        tile = self._automatic_side(precision) if self.tile == 'auto' else self.tile
        fitting = FRAMES_AT_ONCE if tile is None else int(tile) ** 2 // (size[0] * size[1])
        together = max(1, min(FRAMES_AT_ONCE, fitting))
        result = np.empty_like(frames)
        for start in range(0, len(frames), together):
            part = frames[start : start + together]
            image = torch.cat([to_tensor(frame, self._order) for frame in part])
            with evaluating(self.network):
                self._replay = self._records and len(part) == together
                restored = self._tile(image, precision)
                self._replay = False
            for i, frame in enumerate(part):
                result[start + i] = self._finished(restored[i : i + 1], frame)
        return result

    def _frames(self, frames: Iterable[Any]) -> Iterator[Any]:
        if not self._batches:
            yield from (self.restore(frame) for frame in frames)
            return
        for _, group in itertools.groupby(frames, _kind):
            while chunk := list(itertools.islice(group, FRAMES_AT_ONCE)):
                if isinstance(chunk[0], np.ndarray) and chunk[0].ndim == 3:
                    yield from self._array(np.stack(chunk))
                else:
                    yield from (self.restore(frame) for frame in chunk)

    @property
    def _records(self) -> bool:
        """Whether batches of one size are recorded and replayed as CUDA graphs."""
        return self.device.type == 'cuda' and not self._unrecordable

    @property
    def _batches(self) -> bool:
        """Whether frames are restored several at once: on a CPU that is no faster."""
        return self.device.type != 'cpu'

    def _pillow(self, image: Image.Image) -> Image.Image:
        if image.mode not in PILLOW_MODES:
            image = image.convert('RGBA' if image.has_transparency_data else 'RGB')
        restored = Image.fromarray(self._array(np.asarray(image)))
        restored.info = {key: image.info[key] for key in ('icc_profile', 'dpi') if key in image.info}
        return restored

    def _tensor(self, image: Tensor) -> Tensor:
        channels = image.shape[-3] if image.ndim in (3, 4) else 0
        if channels not in (1, 3) or not (image.is_floating_point() or image.dtype == torch.uint8):
            raise UserError(
                f'a tensor of shape {tuple(image.shape)} and type {image.dtype} is not an image; give '
                '(C, H, W) or (N, C, H, W) with 1 or 3 channels, floating point in [0, 1] or uint8'
            )
        batch = image.reshape(-1, *image.shape[-3:])
        kind = np.uint8 if image.dtype == torch.uint8 else np.float32
        results = [
            torch.from_numpy(self._array(one.permute(1, 2, 0).cpu().numpy().astype(kind))) for one in batch
        ]
        restored = torch.stack(results).permute(0, 3, 1, 2).contiguous()
        return restored.reshape(image.shape).to(image)

    def _precision(self, kind: np.dtype[Any]) -> str:
        if self.precision != 'auto':
            return self.precision
        if kind == np.uint8 and has_bf16(self.device) and _tolerates_bf16(self.name):
            return 'bf16'
        return 'fp32'

    @property
    def _order(self) -> torch.memory_format:
        """The memory format of images that the network takes."""
        return (
            torch.channels_last if getattr(self.network, 'channels_last', False) else torch.contiguous_format
        )

    def _automatic_side(self, precision: str) -> int:
        if precision not in self._automatic:
            self._automatic[precision] = automatic_tile(self.network, self.device, 1, precision)
        return self._automatic[precision]

    def _shape(self, size: tuple[int, int], precision: str) -> tuple[int, int]:
        """The largest height and width of tiles for images of this size."""
        if isinstance(self.tile, int):
            return self.tile, self.tile
        # A wide or high image of as many pixels as a tile needs no cut.
        if self.tile is None or size[0] * size[1] <= (side := self._automatic_side(precision)) ** 2:
            return size
        # Rows of tiles are kept whole: the wider the image, the lower the tiles.
        memory = memory_budget(self.device)
        row = BYTES_OF_A_BAND * size[1]
        tiling = Tiling.of(self.network)
        high, most = (int((BAND_BYTES + share * memory) / row) for share in (BAND_SHARE, MOST_BAND_SHARE))
        high = min(side, size[0], max(4 * TILE_OVERLAP, high, min(2 * tiling.wanted, most)))
        pixels = int(side**2 * (1 - max(0, high * row - BAND_BYTES) / memory))
        pixels = max(pixels, high * min(high, 4 * TILE_OVERLAP))
        overlap = tiling.overlap(min(high, pixels // high))
        return tile_shape(size, pixels, high, overlap, tiling.starts or tiling.multiple)

    def _tile(self, image: Tensor, precision: str) -> Tensor:
        """Restore a tile; again, without local pooling or in float32, where the result fails `guard.fault`.

        Args:
            image: (N, 3, H, W) in [0, 1], float32, on the CPU.
            precision: as in `restore.PRECISIONS`.

        Returns:
            The same shape and type, on the CPU, not clipped.
        """
        self.report.tiles += 1
        on_device = image.to(self.device, non_blocking=True)
        begun = time.perf_counter()
        restored = self._call(on_device, precision)
        if restored.is_cuda:
            torch.cuda.synchronize(restored.device)
        self.report.network_seconds += time.perf_counter() - begun
        fault = guard.fault(restored, on_device)
        if fault is not None:
            restored = self._again(on_device, restored, precision, fault)
        return restored.cpu()

    def _call(self, image: Tensor, precision: str) -> Tensor:
        if precision not in self._halving:
            tiling = Tiling.of(self.network)
            self._halving[precision] = Halving(lambda part: self._whole(part, precision), tiling)
        return self._halving[precision](image)

    def _whole(self, image: Tensor, precision: str) -> Tensor:
        if self._replay:
            graphs = self._graphs.setdefault(precision, CudaGraphs(self.network, precision))
            try:
                return graphs(image)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                self._replay, self._unrecordable = False, True
                self.report.note(f'{self.name} cannot be recorded as a CUDA graph: {error}')
        return whole_image(self.network, image, precision)

    def _again(self, image: Tensor, restored: Tensor, precision: str, fault: str) -> Tensor:
        """Restore a tile again, without local pooling or in float32; return the input if that fails too."""
        how = ''
        if self._plain is not None:
            network = self._plain().to(self.device).eval()
            self._plain = lambda: network
            how, restored = 'without local pooling', whole_image(network, image, 'fp32')
        elif precision != 'fp32':
            how, restored = 'in float32', self._call(image, 'fp32')
        if how and guard.fault(restored, image) is None:
            self.report.note(f'{self.name} returned {fault}; that part was restored again {how}')
            return restored
        if not torch.isfinite(restored).all():
            self.report.note(f'{self.name} returned {fault}; that part of the image was left as it was')
            return image
        self.report.note(f'{self.name} changed colours strongly; check the result')
        return restored

    def _finished(self, band: Tensor, pixels: Pixels) -> Pixels:
        """Restored (1, 3, H, W) in the form of `pixels`, blended with them by `strength`; alpha is theirs."""
        colours, scale = 1 if pixels.shape[-1] <= 2 else 3, _scale(pixels.dtype)
        result = pixels.copy()
        height = max(1, STRIP_VALUES // (3 * pixels.shape[1]))
        for top in range(0, len(pixels), height):
            rows = slice(top, top + height)
            restored = band[0, :, rows].permute(1, 2, 0).numpy()
            if colours == 1:
                restored = restored.mean(-1, keepdims=True)
            restored = np.clip(restored, 0.0, 1.0) * np.float32(scale)
            before = pixels[rows, :, :colours]
            if self.strength != 1:
                restored = before + np.float32(self.strength) * (restored - before)
            if scale != 1:
                restored = np.rint(restored)
            result[rows, :, :colours] = restored.astype(pixels.dtype)
        return result


def choose_device(device: str | torch.device = 'auto') -> torch.device:
    """A device by name; `'auto'` is a GPU where there is one.

    Raises:
        UserError: there is no such device here.
    """
    if isinstance(device, torch.device):
        return device
    if device == 'auto':
        if torch.cuda.is_available():
            return torch.device('cuda')
        return torch.device('mps' if torch.backends.mps.is_available() else 'cpu')
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f'there is no device {device!r}; choose auto, cpu, cuda or mps') from None
    if chosen.type == 'cuda' and not torch.cuda.is_available():
        raise UserError('this machine has no GPU that PyTorch can use; choose the device cpu or auto')
    if chosen.type == 'cuda' and chosen.index is not None and chosen.index >= torch.cuda.device_count():
        raise UserError(f'there is no {device}; this machine has {torch.cuda.device_count()} GPUs')
    if chosen.type == 'mps' and not torch.backends.mps.is_available():
        raise UserError('PyTorch finds no Metal device here; choose the device cpu or auto')
    return chosen


def has_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16; without them it is slower than float32."""
    if device.type == 'cuda':
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == 'cpu':
        supported = getattr(torch.cpu, '_is_avx512_bf16_supported', lambda: False)
        return bool(supported())
    return False


def to_tensor(pixels: Pixels, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """(H, W, C) of uint8, uint16 or floating point to (1, 3, H, W), float32 in [0, 1]; alpha is left away."""
    colours, scale = 1 if pixels.shape[-1] <= 2 else 3, _scale(pixels.dtype)
    if pixels.dtype.type not in (np.uint8, np.float32):  # not every version of PyTorch converts others
        pixels = pixels.astype(np.float32)
    given = torch.from_numpy(np.require(pixels, requirements=['W']))[..., :colours].permute(2, 0, 1)[None]
    image = torch.empty(given.shape, memory_format=memory_format)
    image.copy_(given)
    return image.div_(scale).expand(-1, 3, -1, -1)


def _load(model: str | None, file: str | Path | None, tlc: bool | int) -> tuple[nn.Module, str]:
    return weights.network(model, file, _trained_on(tlc) if tlc else None)


def _trained_on(tlc: bool | int) -> int:
    return weights.TRAINED_ON if tlc is True else int(tlc)


def _scale(kind: np.dtype[Any]) -> float:
    return float(np.iinfo(kind).max) if np.issubdtype(kind, np.integer) else 1.0


def _kind(frame: Any) -> Any:
    return (frame.shape, frame.dtype) if isinstance(frame, np.ndarray) else None


def _tolerates_bf16(name: str) -> bool:
    from dsgformer_arch import zoo

    return name not in zoo.names() or zoo.get(name).bf16 == 'yes'


def _evaluating(network: nn.Module, bands: Iterator[Tensor]) -> Iterator[Tensor]:
    """Iterate over `bands` in evaluation mode; the mode of the caller is restored between items."""
    while True:
        with evaluating(network):
            band = next(bands, None)
        if band is None:
            return
        yield band


def _check(precision: str, tile: int | str | None, strength: float) -> None:
    if precision != 'auto' and precision not in PRECISIONS:
        raise UserError(f'the precision is {precision!r}; choose auto, {", ".join(PRECISIONS)}')
    if not (tile is None or tile == 'auto' or (isinstance(tile, int) and tile >= SMALLEST_TILE)):
        raise UserError(f'tile is {tile!r}; give auto or a number of pixels from {SMALLEST_TILE} up')
    if not 0 <= strength <= 1:
        raise UserError(f'strength is {strength:g}; it lies between 0 (the input) and 1 (restored)')


def _check_pixels(array: Pixels) -> None:
    """Check shape, type and range of an image.

    Raises:
        UserError: one of them is wrong.
    """
    good = array.ndim == 2 or (array.ndim in (3, 4) and 1 <= array.shape[-1] <= 4)
    if not good or 0 in array.shape:
        raise UserError(
            f'an array of shape {array.shape} is not an image; give (H, W), (H, W, C) or (N, H, W, C) with 1 '
            'to 4 channels'
        )
    if array.dtype not in (np.uint8, np.uint16) and not np.issubdtype(array.dtype, np.floating):
        raise UserError(
            f'an array of {array.dtype} is not an image; give uint8, uint16 or floating point in [0, 1]'
        )
    if np.issubdtype(array.dtype, np.floating) and not (array.min() >= 0 and array.max() <= 1):
        raise UserError('the floating-point image has values outside [0, 1]; scale it to that range first')
