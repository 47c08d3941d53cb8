"""Training crops drawn from several sources with given weights.

A crop depends on (seed, epoch, index) only, not on the worker process or on earlier crops, so a resumed run
sees the same crops.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from basicsr.utils.registry import DATASET_REGISTRY
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from dsgformer_arch.data.pairs_source import PairsSource
from dsgformer_arch.data.prepare.blur.settings import from_options
from dsgformer_arch.data.prepare.blur.sources import (
    IdentitySource,
    ObjectsSource,
    ShakeSource,
    Source,
    VideoSource,
)
from dsgformer_arch.utils.errors import UserError

KINDS: dict[str, type[Source]] = {
    'pairs': PairsSource,
    'video': VideoSource,
    'shake': ShakeSource,
    'objects': ObjectsSource,
    'identity': IdentitySource,
}
"""The classes of sources by `kind`."""


@DATASET_REGISTRY.register()
class MixedDataset(Dataset[dict[str, Any]]):
    """A mixture of real pairs, averaged frames, synthetic blur and sharp images.

    Options besides those of BasicSR's data sets (`gt_size`, `use_hflip`, `use_rot` and those of the loader):

        sources: a section of sections; each has a `kind` (one of `KINDS`), a `weight`, and the settings of
            that kind's class.  A crop comes from a source with a probability proportional to its weight.
        length: number of crops in an epoch.
        seed: determines all crops.

    In the phase `val` crops are neither flipped nor rotated and are the same in every epoch, which makes a
    validation set of synthetic blur.
    """

    required = ('name', 'type', 'gt_size', 'length', 'sources')
    """Required keys of an option file."""
    options = ('sources', 'length', 'seed')
    """Keys of an option file that only this data set has."""

    def __init__(self, opt: dict[str, Any]) -> None:
        self.opt = opt
        self.check_options(opt, f'data set {opt.get("name")}')
        self.names, self.sources, weights = read_sources(self.source_options(opt), 'sources')
        self.shares = np.array(weights) / sum(weights)
        self.side = int(opt['gt_size'])
        self.seed = int(opt.get('seed') or 0)
        self.augments = opt.get('phase') == 'train'
        # In shared memory, so that worker processes see what `set_epoch` writes.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        for source in self.sources:
            source.prepare()

    @classmethod
    def source_options(cls, opt: Mapping[str, Any]) -> Mapping[str, Any]:
        """The section `sources` of the options."""
        sources: Mapping[str, Any] = opt['sources']
        return sources

    @classmethod
    def check_options(cls, opt: Mapping[str, Any], where: str) -> None:
        """Check options without reading data.

        Raises:
            UserError: a key is missing or a value is wrong.
        """
        for key in cls.required:
            if key not in opt:
                raise UserError(f'{where}: the key {key!r} is missing')
        for key in ('gt_size', 'length'):
            if not isinstance(opt[key], int) or opt[key] < 1:
                raise UserError(f'{where}: {key} is {opt[key]!r}, but should be a whole number of at least 1')
        if opt.get('scale', 1) != 1:
            raise UserError(f'{where}: scale is {opt["scale"]!r}; this data set has scale 1 only')
        if opt.get('dataset_enlarge_ratio', 1) != 1:
            raise UserError(f'{where}: dataset_enlarge_ratio would repeat crops; raise length instead')
        seed = opt.get('seed') or 0
        if not isinstance(seed, int) or seed < 0:
            raise UserError(f'{where}: seed is {seed!r}, but should be a whole number of at least 0')
        read_sources(cls.source_options(opt), f'{where}: sources')

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the crops that are drawn from now on."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return int(self.opt['length'])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.item(index, int(self._epoch))

    def item(self, index: int, epoch: int) -> dict[str, Any]:
        """The crop `index` of an epoch, independent of `set_epoch`."""
        epoch = epoch if self.augments else 0
        rng = np.random.default_rng([self.seed, epoch, index])
        number = int(rng.choice(len(self.sources), p=self.shares))
        sample = self.sources[number].sample(rng, self.side)
        hflip, vflip, transpose = rng.random(3) < 0.5
        lq, gt = sample.lq, sample.gt
        if self.augments:
            hflip &= bool(self.opt.get('use_hflip', True))
            rotate = bool(self.opt.get('use_rot', True))
            lq, gt = (augmented(image, hflip, vflip and rotate, transpose and rotate) for image in (lq, gt))
        path = f'{self.names[number]}/{sample.name}'
        return {'lq': as_tensor(lq), 'gt': as_tensor(gt), 'lq_path': path, 'gt_path': path}


def read_sources(sections: Any, where: str) -> tuple[list[str], list[Source], list[float]]:
    """Build sources from a section of an option file, without reading their data.

    Returns:
        Their names, the sources and their weights.

    Raises:
        UserError: there is none, or a section is wrong.
    """
    if not isinstance(sections, Mapping) or not sections:
        raise UserError(f'{where}: should hold one section a source, each with kind and weight')
    names, sources, weights = [], [], []
    for name, section in sections.items():
        place = f'{where}: {name}'
        if not isinstance(section, Mapping):
            raise UserError(f'{place}: should be a section of keys and values, not {section!r}')
        settings = dict(section)
        kind, weight = settings.pop('kind', None), settings.pop('weight', None)
        if kind not in KINDS:
            raise UserError(f'{place}: kind is {kind!r}; choose from {", ".join(KINDS)}')
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float('inf'):
            raise UserError(f'{place}: weight is {weight!r}, but should be a number of at least 0')
        source = from_options(KINDS[kind], settings, place)
        if weight:
            names.append(str(name))
            sources.append(source)
            weights.append(float(weight))
    if not sources:
        raise UserError(f'{where}: every weight is 0; give one source a weight above 0')
    return names, sources, weights


def augmented(image: NDArray[np.uint8], hflip: bool, vflip: bool, transpose: bool) -> NDArray[np.uint8]:
    """Flip an image and transpose it; the eight combinations are all its flips and 90° rotations."""
    image = image[:, ::-1] if hflip else image
    image = image[::-1] if vflip else image
    return image.transpose(1, 0, 2) if transpose else image


def as_tensor(image: NDArray[np.uint8]) -> Tensor:
    """uint8 RGB (H, W, 3) to float32 (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float().div_(255)
