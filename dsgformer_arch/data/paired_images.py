"""Whole images of a pair, read so that a damaged one is named in a sentence.

BasicSR's `PairedImageDataset` ends with `'NoneType' object has no attribute 'astype'` where an image cannot
be decoded, and crops the sharp image silently where the two differ in size.  `compat` gives it `get_pair`,
which returns the same tensors, bit for bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from basicsr.data.transforms import augment, paired_random_crop
from basicsr.utils import bgr2ycbcr, img2tensor
from numpy.typing import NDArray
from torchvision.transforms.functional import normalize

from dsgformer_arch.data.image_files import BadImageError, decode_bgr, header_shape, read_file
from dsgformer_arch.data.lmdb_files import environment, read_value
from dsgformer_arch.utils.errors import UserError


def get_pair(dataset: Any, index: int) -> dict[str, Any]:
    """`PairedImageDataset.__getitem__`: a pair, cropped and augmented in the phase `train`.

    Args:
        dataset: a `PairedImageDataset`.
        index: number of the pair.

    Returns:
        `lq` and `gt`, float32 (3, H, W) in [0, 1], and their paths or keys.

    Raises:
        UserError: an image is missing, damaged or too large, or the two differ in size.
    """
    opt, paths = dataset.opt, dataset.paths[index]
    is_lmdb = 'db_paths' in dataset.io_backend_opt
    read = read_lmdb_image if is_lmdb else read_image_file
    gt: NDArray[Any] = read(paths['gt_path'], dataset.gt_folder)
    lq: NDArray[Any] = read(paths['lq_path'], dataset.lq_folder)
    scale = opt['scale']
    if gt.shape[:2] != (lq.shape[0] * scale, lq.shape[1] * scale):
        raise UserError(
            f'{dataset.lq_folder}: the image {paths["lq_path"]} is {lq.shape[1]}×{lq.shape[0]}, and its '
            f'partner in {dataset.gt_folder} is {gt.shape[1]}×{gt.shape[0]}; pair images of one size'
        )
    gt, lq = (image.astype(np.float32) / 255.0 for image in (gt, lq))
    if opt['phase'] == 'train':
        gt, lq = paired_random_crop(gt, lq, opt['gt_size'], scale, paths['gt_path'])
        gt, lq = augment([gt, lq], opt['use_hflip'], opt['use_rot'])
    if opt.get('color') == 'y':
        gt, lq = (bgr2ycbcr(image, y_only=True)[..., None] for image in (gt, lq))
    gt, lq = img2tensor([gt, lq], bgr2rgb=True, float32=True)
    if dataset.mean is not None or dataset.std is not None:
        for image in (gt, lq):
            normalize(image, dataset.mean, dataset.std, inplace=True)
    return {'lq': lq, 'gt': gt, 'lq_path': paths['lq_path'], 'gt_path': paths['gt_path']}


def read_lmdb_image(key: str, folder: str) -> NDArray[np.uint8]:
    """The image stored under a key of an LMDB, uint8 BGR (H, W, 3).

    Raises:
        UserError: it is missing or damaged.
    """
    with environment(folder).begin(buffers=True) as transaction:
        stored = read_value(transaction, key, folder)
        try:
            return decode_bgr(stored)
        except BadImageError as error:
            raise UserError(f'{folder}: the image {key} {error}; make the LMDB again') from None


def read_image_file(path: str, folder: str = '') -> NDArray[np.uint8]:
    """An image file, uint8 BGR (H, W, 3).

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return decode_bgr(read_file(path))
    except OSError as error:
        raise UserError(f'cannot read the image {path}: {error.strerror}') from None
    except BadImageError as error:
        raise UserError(f'the image {path} {error}; replace it') from None


def check_size(
    stored: Any, size: tuple[int, int], key: str, folder: str, again: str = 'make the LMDB again'
) -> None:
    """Refuse a stored image whose header gives another size than `meta_info.txt`.

    Args:
        stored: the image's bytes.
        size: (height, width) by `meta_info.txt`.
        key: the image's key, for the message.
        folder: the LMDB or stream, for the message.
        again: how to fix it, for the message.

    Raises:
        UserError: it does, or it has no sound header.
    """
    try:
        shape = header_shape(stored)
    except BadImageError as error:
        raise UserError(f'{folder}: the image {key} {error}; {again}') from None
    if shape.size != size:
        raise UserError(
            f'{folder}: the image {key} is {shape.width}×{shape.height}, but meta_info.txt says '
            f'{size[1]}×{size[0]}; {again}'
        )
