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
import re
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import lmdb
import numpy as np
import torch
from basicsr.data.paired_image_dataset import PairedImageDataset
from basicsr.utils.registry import DATASET_REGISTRY
from numpy.typing import NDArray
from torch import Tensor

from dsgformer_arch.data import png_crop
from dsgformer_arch.data.image_files import RAW_HEADER
from dsgformer_arch.utils.errors import UserError


@DATASET_REGISTRY.register()
class PairedCropDataset(PairedImageDataset):
    """`PairedImageDataset` for `io_backend: lmdb`, faster in training.

    Validation and folders of images are left to BasicSR's own code.  Takes no
    option that `PairedImageDataset` lacks; `scale` has to be 1, and `mean`,
    `std` and `color` to be absent.
    """

    def __init__(self, opt: dict[str, Any]) -> None:
        super().__init__(opt)
        self.direct = opt['phase'] == 'train' and self.io_backend_opt['type'] == 'lmdb'
        if not self.direct:
            return
        for key, expected in (('scale', 1), ('mean', None), ('std', None), ('color', None)):
            if opt.get(key, expected) != expected:
                raise UserError(f'PairedCropDataset: {key} is {opt[key]!r}; use PairedImageDataset for that')
        self.sizes = read_sizes(Path(self.gt_folder))

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not self.direct:
            return super().__getitem__(index)
        key = self.paths[index]['lq_path']
        height, width = self.sizes[key]
        side = self.opt['gt_size']
        if min(height, width) < side:
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
        with environment(folder).begin(buffers=True) as transaction:
            stored = transaction.get(key.encode('ascii'))
            if stored is None:
                raise UserError(
                    f'{folder} has no image {key}, though its meta_info.txt lists it; make it again'
                )
            header = RAW_HEADER.match(bytes(stored[:32]))
            if header is not None:
                width, height = int(header[1]), int(header[2])
                pixels = np.frombuffer(stored, np.uint8, offset=header.end()).reshape(height, width, 3)
                # A copy: the memory map is gone with the transaction.
                return pixels[top : top + side, left : left + side].copy()
            crop = png_crop.read_crop(stored, top, left, side)
            if crop is not None:
                return crop
            image = cv2.imdecode(np.frombuffer(stored, np.uint8), cv2.IMREAD_COLOR)
        if image is None:
            raise UserError(f'{folder}: the image {key} cannot be decoded; make the LMDB again')
        return np.asarray(image[top : top + side, left : left + side, ::-1], dtype=np.uint8)


@cache
def environment(folder: str) -> lmdb.Environment:
    """The open LMDB, one a process: LMDB refuses to open a folder twice.

    Workers made by forking use their parent's; without locks that is only a memory map.
    """
    # Random crops of a large set gain nothing from reading ahead.
    return lmdb.open(folder, readonly=True, lock=False, readahead=False)


def read_sizes(folder: Path) -> dict[str, tuple[int, int]]:
    """(height, width) of an LMDB's images by key, from its meta_info.txt."""
    sizes = {}
    for line in (folder / 'meta_info.txt').read_text().splitlines():
        found = re.fullmatch(r'([^.]+)\.\w+ \((\d+),(\d+),\d+\) \d+', line)
        if found is None:
            raise UserError(f'{folder}/meta_info.txt has the unreadable line {line!r}; make the LMDB again')
        sizes[found[1]] = (int(found[2]), int(found[3]))
    return sizes


def as_tensor(crop: NDArray[np.uint8]) -> Tensor:
    """uint8 RGB (H, W, 3) to float32 (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1))).float().div_(255)
