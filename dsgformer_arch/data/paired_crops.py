"""Crops of a pair of stored images: where they are cut, how they are augmented, and how they are decoded.

The draws are those of BasicSR's `PairedImageDataset` in their order, so that all data sets that use them
return the same tensors for the same random state.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsgformer_arch.data import png_crop
from dsgformer_arch.data.image_files import RAW_START, BadImageError, decode_bgr, raw_pixels_of
from dsgformer_arch.data.paired_images import check_size
from dsgformer_arch.utils.errors import UserError


class Reader(Protocol):
    """Reads a square of the image `side` (`'gt'` or `'lq'`) of a pair: uint8 RGB (length, length, 3)."""

    def __call__(self, side: str, top: int, left: int, length: int) -> NDArray[np.uint8]: ...


def draw(
    read: Reader,
    size: tuple[int, int],
    key: str,
    place: str,
    opt: Mapping[str, Any],
    rng: random.Random | None = None,
) -> dict[str, Any]:
    """A random crop of a pair, augmented.

    Args:
        read: reads a crop.
        size: (height, width) of both images in pixels.
        key: the pair's key.
        place: what holds the images, for messages.
        opt: `gt_size`, `use_hflip`, `use_rot` and `pad_to_gt_size`.
        rng: draws crop, flips and turn; the module `random` by default.

    Returns:
        `gt` and `lq`, float32 RGB (3, gt_size, gt_size) in [0, 1]; `gt_path` and `lq_path`, the key.

    Raises:
        UserError: the images are smaller than a crop, and `pad_to_gt_size` is not set.
    """
    height, width = size
    side = opt['gt_size']
    if opt.get('pad_to_gt_size'):
        height, width = max(height, side), max(width, side)
    elif min(height, width) < side:
        raise UserError(f'{key} in {place} is {width}×{height}, smaller than gt_size {side}')
    # The draws of basicsr.data.transforms.paired_random_crop and augment, in their order.
    randint, uniform = (rng or random).randint, (rng or random).random
    top, left = randint(0, height - side), randint(0, width - side)
    flip_h = opt['use_hflip'] and uniform() < 0.5
    flip_v = opt['use_rot'] and uniform() < 0.5
    transpose = opt['use_rot'] and uniform() < 0.5
    tensors = []
    for which in ('gt', 'lq'):
        crop = read(which, top, left, side)
        crop = crop[:, ::-1] if flip_h else crop
        crop = crop[::-1] if flip_v else crop
        crop = crop.transpose(1, 0, 2) if transpose else crop
        tensors.append(as_tensor(crop))
    return {'gt': tensors[0], 'lq': tensors[1], 'gt_path': key, 'lq_path': key}


def decode(
    stored: Any,
    size: tuple[int, int],
    top: int,
    left: int,
    side: int,
    key: str,
    place: str,
    again: str = 'make the LMDB again',
) -> NDArray[np.uint8]:
    """A square of a stored image.

    Args:
        stored: the bytes of a PNG, a JPEG or an uncompressed image, as any buffer.
        size: (height, width) by `meta_info.txt`, in pixels.
        top, left, side: the square.  Where it reaches beyond the image, this is reflected.
        key: the image's key, for messages.
        place: the LMDB or stream, for messages.
        again: how to fix it, for messages.

    Returns:
        A copy, uint8 RGB (side, side, 3).

    Raises:
        UserError: the image is damaged or has another size.
    """
    height, width = size
    check_size(stored, size, key, place, again)
    try:
        if bytes(stored[: len(RAW_START)]) == RAW_START:
            image = raw_pixels_of(stored)[1]
        else:
            if min(height, width) >= side:
                crop = png_crop.read_crop(stored, top, left, side)
                if crop is not None:
                    return crop
            image = decode_bgr(stored)[..., ::-1]
    except BadImageError as error:
        raise UserError(f'{place}: the image {key} {error}; {again}') from None
    if min(height, width) < side:
        below, right = max(0, side - height), max(0, side - width)
        image = np.pad(image, ((0, below), (0, right), (0, 0)), mode='reflect')
    # A copy: an LMDB's memory map is gone with the transaction.
    return np.array(image[top : top + side, left : left + side], dtype=np.uint8)


def as_tensor(image: NDArray[np.uint8]) -> Tensor:
    """uint8 RGB (H, W, 3) to float32 (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float().div_(255)
