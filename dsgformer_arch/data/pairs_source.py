"""Real pairs as a source of crops."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from dsgformer_arch.data.image_files import read_image
from dsgformer_arch.data.paired_crop_dataset import PairedCropDataset
from dsgformer_arch.data.prepare.blur.array_cache import ArrayCache
from dsgformer_arch.data.prepare.blur.sources import (
    Sample,
    Source,
    check_candidates,
    detailed_region,
    part,
    random_region,
)
from dsgformer_arch.data.prepare.layouts import read_pairs
from dsgformer_arch.utils.errors import UserError


@dataclass
class PairsSource(Source):
    """Real pairs, from two folders or two LMDBs (`*.lmdb`).

    Attributes:
        dataroot_lq: the blurred images.
        dataroot_gt: the sharp ones, of the same names.
        match: pattern of the names without suffix, to take some of them.
        candidates: number of crops that are drawn from folders; the one with most detail is used.
        memory: megabytes for decoded images of folders; LMDBs are not cached.
    """

    dataroot_lq: str
    dataroot_gt: str
    match: str = '*'
    candidates: int = 1
    memory: float = 2048.0

    def __post_init__(self) -> None:
        check_candidates(self.candidates)

    def prepare(self, preload: bool = True) -> None:
        lq, gt = (Path(root).expanduser().absolute() for root in (self.dataroot_lq, self.dataroot_gt))
        self.lmdb = None
        if lq.suffix == gt.suffix == '.lmdb':
            options = {'phase': 'train', 'scale': 1, 'io_backend': {'type': 'lmdb'}}
            self.lmdb = PairedCropDataset({**options, 'dataroot_lq': str(lq), 'dataroot_gt': str(gt)})
            self.keys = sorted(key for key in self.lmdb.sizes if fnmatch(key, self.match))
        else:
            split = read_pairs(lq.parent, 'pairs', lq, gt)
            if split.problems:
                raise UserError(split.problems[0])
            self.pairs = {pair.key: pair for pair in split.pairs if fnmatch(pair.key, self.match)}
            self.keys = list(self.pairs)
            self.cache: ArrayCache[Path] = ArrayCache(read_image, self.memory)
        if not self.keys:
            raise UserError(f'{lq} holds no image that matches {self.match!r}; give another pattern')
        if self.lmdb is None and preload:
            self.cache.fill((p for pair in self.pairs.values() for p in (pair.lq, pair.gt)), 'reading pairs')

    def sample(self, rng: np.random.Generator, side: int | None = None, number: int | None = None) -> Sample:
        drawn = int(rng.integers(len(self.keys)))
        key = self.keys[drawn if number is None else number % len(self.keys)]
        if self.lmdb is not None:
            if side is None:
                raise UserError(f'{self.dataroot_lq}: whole images of LMDBs are read by PairedImageDataset')
            region = random_region(rng, *self.lmdb.sizes[key], side, key)
            lq, gt = (
                self.lmdb.read(folder, key, region.top, region.left, side)
                for folder in (self.lmdb.lq_folder, self.lmdb.gt_folder)
            )
            return Sample(lq, gt, key)
        lq, gt = (self.cache[path] for path in (self.pairs[key].lq, self.pairs[key].gt))
        if lq.shape != gt.shape:
            raise UserError(f'{self.pairs[key].lq} and {self.pairs[key].gt} differ in size; remove one')
        if side is None:
            return Sample(lq, gt, key)
        region = detailed_region(rng, gt, side, key, self.candidates)
        return Sample(part(lq, region), part(gt, region), key)
