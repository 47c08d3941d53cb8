"""Reading, checking and cutting the image pairs of a split: what the writers of LMDBs and of streams share.

A file is read once: its check and its copy share that reading.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from dsgformer_arch.data import png_crop
from dsgformer_arch.data.image_files import (
    JPEG_START,
    BadImageError,
    Shape,
    check_image,
    decode_bgr,
    raw_image,
    read_file,
)
from dsgformer_arch.data.prepare.layouts import Pair, Split
from dsgformer_arch.utils.errors import UserError

T = TypeVar('T')
R = TypeVar('R')

SIDES = ('lq', 'gt')
PNG_LEVEL = 1  # BasicSR's default for LMDBs; for whole images a filler, since their level cannot be known


@dataclass(frozen=True)
class CropGrid:
    """Overlapping square crops, placed as BasicSR's `extract_subimages` does with a threshold of 0.

    Crops start at multiples of `step`; where that leaves a rest at the right or the bottom, one more crop
    ends at the border.  With a step up to the size, every pixel is in some crop.

    Attributes:
        size: height and width of a crop in pixels.
        step: distance between two crops' starts in pixels.
    """

    size: int
    step: int

    def corners(self, height: int, width: int) -> list[tuple[int, int]]:
        """(top, left) of each crop, row by row; none where the image is smaller than a crop."""
        return [(top, left) for top in self._starts(height) for left in self._starts(width)]

    def _starts(self, length: int) -> list[int]:
        last = length - self.size
        starts = list(range(0, last + 1, self.step))
        return starts if not starts or starts[-1] == last else [*starts, last]


@dataclass(frozen=True)
class Image:
    """What is stored under one key."""

    key: str
    data: bytes
    shape: Shape


@dataclass
class Prepared:
    """A pair that is ready to be stored, or what is wrong with it."""

    images: dict[str, list[Image]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def prepare(pair: Pair, crop: CropGrid | None, raw: bool, dry: Event) -> Prepared:
    """Read and check a pair, and cut or decode it where that is asked for.

    Args:
        pair: the files.
        crop: cut both images into PNGs of these crops.
        raw: store decoded pixels instead of the files' bytes.
        dry: when set, images are checked and not encoded.
    """
    prepared = Prepared()
    whole: dict[str, Image] = {}
    for side, path in zip(SIDES, (pair.lq, pair.gt), strict=True):
        image = load(pair.key, path)
        if isinstance(image, str):
            prepared.problems.append(image)
        else:
            whole[side] = image
    if prepared.problems:
        return prepared
    shape, partner = whole['lq'].shape, whole['gt'].shape
    if shape.size != partner.size:
        prepared.problems.append(
            f'{pair.lq}: is {in_pixels(shape)}, but its partner {pair.gt} is {in_pixels(partner)}'
        )
    elif crop is None and not raw:
        prepared.images = {side: [image] for side, image in whole.items()}
    elif crop is not None and min(shape.size) < crop.size:
        prepared.problems.append(
            f'{pair.lq}: is {in_pixels(shape)}, smaller than crops of {crop.size}x{crop.size}'
        )
    else:
        for side, path in zip(SIDES, (pair.lq, pair.gt), strict=True):
            pixels = decode(whole[side].data)
            if pixels is None:
                prepared.problems.append(f'{path}: cannot be decoded')
            elif raw and (pixels.dtype != np.uint8 or pixels.shape[2:] != (3,)):
                prepared.problems.append(f'{path}: is not an 8-bit RGB image, which --raw asks for')
            elif not dry.is_set():
                prepared.images[side] = list(encoded(pair.key, pixels, crop, raw))
    return prepared


def load(key: str, path: Path) -> Image | str:
    """Read and check a file; return what is wrong with it instead, if anything is."""
    try:
        data = read_file(path)
        image = Image(key, data, check_image(data))
        _require_whole_jpeg(data)
        return image
    except OSError as error:
        return f'{path}: cannot be read ({error.strerror})'
    except BadImageError as error:
        return f'{path}: {error}'


def in_pixels(shape: Shape) -> str:
    """The size as `<width>x<height>`."""
    return f'{shape.width}x{shape.height}'


def decode(data: bytes) -> NDArray[Any] | None:
    """Decode with all channels and bits; None where OpenCV cannot."""
    try:
        return decode_bgr(data, cv2.IMREAD_UNCHANGED)
    except BadImageError:
        return None


def _require_whole_jpeg(data: bytes) -> None:
    """Refuse a JPEG whose image data end before the last row: decoders fill the rest with grey.

    Only decoding tells, and OpenCV does not say it; without libvips nothing is refused.

    Raises:
        BadImageError: its image data end early.
    """
    vips = png_crop.library() if data.startswith(JPEG_START) else None
    if vips is None:
        return
    try:
        vips.Image.new_from_buffer(data, '', access='sequential', fail_on='warning').avg()
    except vips.Error as error:
        if 'premature end' in str(error).lower():
            raise BadImageError('is damaged: its image data end before its last row') from None


def shape_of(pixels: NDArray[Any]) -> Shape:
    """The shape of a decoded image, (H, W) or (H, W, C)."""
    return Shape(pixels.shape[0], pixels.shape[1], 1 if pixels.ndim == 2 else pixels.shape[2])


def encoded(key: str, pixels: NDArray[Any], crop: CropGrid | None, raw: bool) -> Iterator[Image]:
    """What is stored of a decoded image: itself or its crops, as PNG or uncompressed."""
    for name, part in cut(key, pixels, crop) if crop else [(key, pixels)]:
        if raw:
            data = raw_image(part)
        else:
            data = cv2.imencode('.png', part, [cv2.IMWRITE_PNG_COMPRESSION, PNG_LEVEL])[1].tobytes()
        yield Image(name, data, shape_of(part))


def cut(key: str, pixels: NDArray[Any], crop: CropGrid) -> Iterator[tuple[str, NDArray[Any]]]:
    """Each crop of an image, with its key `<key>_s001` …."""
    for number, (top, left) in enumerate(crop.corners(*pixels.shape[:2]), 1):
        cut = np.ascontiguousarray(pixels[top : top + crop.size, left : left + crop.size])
        yield f'{key}_s{number:03d}', cut


def in_order(work: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """Like `Executor.map`, but with a bounded number of results waiting."""
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def fingerprint(split: Split) -> tuple[str, dict[str, int]]:
    """What a split's files are now.

    Returns:
        A digest of keys, file sizes and modification times, and the bytes of each side.
    """
    digest = hashlib.sha256()
    sizes = dict.fromkeys(SIDES, 0)
    for pair in split.pairs:
        digest.update(pair.key.encode())
        for side, path in zip(SIDES, (pair.lq, pair.gt), strict=True):
            try:
                status = path.stat()
            except OSError:
                continue  # reading it will fail too, and say why
            digest.update(f' {side} {status.st_size} {status.st_mtime_ns}'.encode())
            sizes[side] += status.st_size
    return digest.hexdigest(), sizes


def raise_problems(problems: Sequence[str], what: str) -> None:
    """Refuse images.

    Args:
        problems: one sentence each.
        what: what was not written, such as `'LMDB'`.

    Raises:
        UserError: there are problems.
    """
    if problems:
        count = f'{len(problems)} problems' if len(problems) > 1 else '1 problem'
        listed = '\n  '.join(problems)
        raise UserError(
            f'{count} with the images, so no {what} was written; fix or remove what is named here:'
            f'\n  {listed}'
        )


def in_words(size: int) -> str:
    """A number of bytes in MB or GB."""
    return f'{size / 1e9:.1f} GB' if size >= 1e9 else f'{size / 1e6:.1f} MB'
