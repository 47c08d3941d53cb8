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

from typing import Any

import numpy as np
from basicsr.data.paired_image_dataset import PairedImageDataset
from basicsr.utils.registry import DATASET_REGISTRY
from numpy.typing import NDArray

from dsgformer_arch.data import meta_info, paired_crops
from dsgformer_arch.data.lmdb_files import environment, read_value
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

        def read(side: str, top: int, left: int, length: int) -> NDArray[np.uint8]:
            return self.read(self.gt_folder if side == 'gt' else self.lq_folder, key, top, left, length)

        return paired_crops.draw(read, self.sizes[key], key, self.gt_folder, self.opt)

    def read(self, folder: str, key: str, top: int, left: int, side: int) -> NDArray[np.uint8]:
        """A crop of the image stored under `key`, uint8 RGB (side, side, 3)."""
        with environment(folder).begin(buffers=True) as transaction:
            return paired_crops.decode(
                read_value(transaction, key, folder), self.sizes[key], top, left, side, key, folder
            )
