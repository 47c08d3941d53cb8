"""BasicSR's paired data set for training, reading no more than a crop needs.

`PairedImageDataset` decodes two whole images and turns both into float32
before it cuts a crop out of them.  `PairedCropDataset` takes the same options,
draws the same random numbers in the same order and returns the same tensors,
bit for bit, but cuts first.  From images stored uncompressed
(`tools/create_lmdb.py --raw`) it reads only the crop's rows, straight from the
LMDB's memory map; of PNGs it decodes no row below the crop, where libvips is
installed.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from basicsr.data.paired_image_dataset import PairedImageDataset
from basicsr.utils.registry import DATASET_REGISTRY
from numpy.typing import NDArray
from torch import Tensor

from dsgformer_arch.data import meta_info, png_crop
from dsgformer_arch.data.image_files import RAW_START, BadImageError, decode_bgr, raw_pixels_of
from dsgformer_arch.data.lmdb_files import environment, read_value
from dsgformer_arch.data.paired_images import check_size
from dsgformer_arch.utils.errors import UserError


@DATASET_REGISTRY.register()
class PairedCropDataset(PairedImageDataset):
    """`PairedImageDataset` for `io_backend: lmdb`, faster in training.

    Validation and folders of images are left to BasicSR's own code.  `scale` has
    to be 1, and `mean`, `std` and `color` to be absent.  With `pad_to_gt_size`,
    images smaller than a crop are reflected at their lower and right border, as
    the loaders of MPRNet and Restormer do with Rain13K.
    """

    def __init__(self, opt: dict[str, Any]) -> None:
        super().__init__(opt)
        self.direct = opt['phase'] == 'train' and self.io_backend_opt['type'] == 'lmdb'
        if not self.direct:
            return
        for key, expected in (('scale', 1), ('mean', None), ('std', None), ('color', None)):
            if opt.get(key, expected) != expected:
                raise UserError(f'PairedCropDataset: {key} is {opt[key]!r}; use PairedImageDataset for that')
        self.sizes = {key: entry.size for key, entry in meta_info.read(self.gt_folder).items()}

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not self.direct:
            return super().__getitem__(index)
        key = self.paths[index]['lq_path']
        height, width = self.sizes[key]
        side = self.opt['gt_size']
        if self.opt.get('pad_to_gt_size'):
            height, width = max(height, side), max(width, side)
        elif min(height, width) < side:
            raise UserError(f'{key} in {self.gt_folder} is {width}×{height}, smaller than gt_size {side}')
        # The draws of basicsr.data.transforms.paired_random_crop and augment, in their order.
        top, left = random.randint(0, height - side), random.randint(0, width - side)
        flip_h = self.opt['use_hflip'] and random.random() < 0.5
        flip_v = self.opt['use_rot'] and random.random() < 0.5
        transpose = self.opt['use_rot'] and random.random() < 0.5
        tensors = []
        for folder in (self.gt_folder, self.lq_folder):
            crop = self.read(folder, key, top, left, side)
            crop = crop[:, ::-1] if flip_h else crop
            crop = crop[::-1] if flip_v else crop
            crop = crop.transpose(1, 0, 2) if transpose else crop
            tensors.append(as_tensor(crop))
        return {'gt': tensors[0], 'lq': tensors[1], 'gt_path': key, 'lq_path': key}

    def read(self, folder: str, key: str, top: int, left: int, side: int) -> NDArray[np.uint8]:
        """A crop of the image stored under `key`, uint8 RGB (side, side, 3)."""
        height, width = self.sizes[key]
        with environment(folder).begin(buffers=True) as transaction:
            stored = read_value(transaction, key, folder)
            check_size(stored, self.sizes[key], key, folder)
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
                raise UserError(f'{folder}: the image {key} {error}; make the LMDB again') from None
            if min(height, width) < side:
                below, right = max(0, side - height), max(0, side - width)
                image = np.pad(image, ((0, below), (0, right), (0, 0)), mode='reflect')
            # A copy: the memory map is gone with the transaction.
            return np.array(image[top : top + side, left : left + side], dtype=np.uint8)


def as_tensor(crop: NDArray[np.uint8]) -> Tensor:
    """uint8 RGB (H, W, 3) to float32 (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1))).float().div_(255)
