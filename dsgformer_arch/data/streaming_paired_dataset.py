"""Image pairs in shards, read from a folder or from an S3-compatible object store while training.

`tools/create_stream.py` writes the shards.  The order of the samples is the training loop's, so that a run
that is resumed, or has another number of loader workers, reads the same samples (`data/sampler.py`).
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from basicsr.utils.registry import DATASET_REGISTRY
from numpy.typing import NDArray
from torch.utils.data import Dataset, get_worker_info

from dsgformer_arch.data import paired_crops
from dsgformer_arch.data.image_files import BadImageError, decode_bgr
from dsgformer_arch.data.paired_images import check_size
from dsgformer_arch.data.sampler import PASS, SAMPLE, derived_seed
from dsgformer_arch.data.stream_cache import DEFAULT_FOLDER, GIGABYTE, Shards
from dsgformer_arch.data.stream_files import AGAIN, Bucket, Listing, open_stream, read_item
from dsgformer_arch.utils.errors import UserError

AHEAD = 2
"""Shards that are downloaded before they are needed."""
WINDOW, CACHE = 32, 50.0
"""Defaults of `shuffle_shards` and `max_cache_size`."""


Order = tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]


@DATASET_REGISTRY.register()
class StreamingPairedDataset(Dataset[dict[str, Any]]):
    """Pairs of a stream: random crops in the phase `train`, whole images otherwise.

    Crops, flips and turns are `PairedCropDataset`'s, bit for bit.  Options:

        dataroot: the stream's folder, or its address `s3://bucket/prefix`.
        shuffle_shards: the samples of a pass are drawn from so many shards at a time (see `ShardOrder`).
        cache_dir: folder for downloaded shards, which all processes of a machine share.
        max_cache_size: most gigabytes of shards in it.
        gt_size, use_hflip, use_rot, pad_to_gt_size: as `PairedCropDataset`.

    Raises:
        UserError: there is no finished stream, it cannot be reached, or an option does not fit to it.
    """

    required = ('name', 'type', 'dataroot')
    """Keys of an option file that this data set cannot do without."""

    def __init__(self, opt: dict[str, Any]) -> None:
        self.opt = opt
        listing = check(opt)
        self.entries = listing.entries
        self.paths = [{'lq_path': entry.key, 'gt_path': entry.key} for entry in listing.entries]
        sizes = [shard.chunk_size for shard in listing.index.chunks]
        self.starts = np.cumsum([0, *sizes])
        self.shard_order = ShardOrder(sizes, window(opt))
        limit = int((opt.get('max_cache_size') or CACHE) * GIGABYTE)
        most_open = in_use(opt, len(sizes))
        self.shards = Shards(listing, opt.get('cache_dir') or DEFAULT_FOLDER, limit, most_open)

    @classmethod
    def check_options(cls, opt: Mapping[str, Any], where: str) -> None:
        """Check options against the stream's index, without reading a shard.

        Raises:
            UserError: see the class.
        """
        try:
            check(opt)
        except UserError as error:
            raise UserError(f'{where}: {error}') from None

    def order(self, seed: int) -> list[int]:
        """The order of the samples in a pass, which follows from the pass's seed."""
        order: list[int] = self.shard_order(seed)[0].tolist()
        return order

    def at(self, index: int, position: int, seed: int) -> dict[str, Any]:
        """The sample at a position of the stream of samples.

        Shards that follow are downloaded in the background, in loader workers only: downloads draw random
        numbers of their own from the module `random`, so the crop is drawn from a generator of its own.

        Args:
            index: of the pair.
            position: of the sample.
            seed: of the run.
        """
        if get_worker_info() is not None:
            self.shards.expect(self.shard_order.following(position, seed, AHEAD))
        return self.sample(index, random.Random(derived_seed(seed, SAMPLE, position)))

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.sample(index)

    def sample(self, index: int, rng: random.Random | None = None) -> dict[str, Any]:
        """A random crop of a pair, or the whole pair.

        Args:
            index: of the pair.
            rng: draws the crop; the module `random` by default.

        Raises:
            UserError: the shard or the image is missing or damaged, or cannot be downloaded.
        """
        entry, address = self.entries[index], self.shards.listing.place.address
        number = int(np.searchsorted(self.starts, index, side='right')) - 1
        shard = self.shards.listing.index.chunks[number]
        key, lq, gt = read_item(
            self.shards.descriptor(number), shard, index - int(self.starts[number]), address
        )
        place = f'{address}/{shard.filename}'
        if key != entry.key.encode():
            raise UserError(f'the shard {place} holds another image in the place of {entry.key}; {AGAIN}')
        stored = {'lq': lq, 'gt': gt}
        if self.opt.get('phase') != 'train':
            images = {which: whole(data, entry.size, entry.key, place) for which, data in stored.items()}
            tensors = {which: paired_crops.as_tensor(image) for which, image in images.items()}
            return {**tensors, 'lq_path': entry.key, 'gt_path': entry.key}

        def read(side: str, top: int, left: int, length: int) -> NDArray[np.uint8]:
            return paired_crops.decode(stored[side], entry.size, top, left, length, entry.key, place, AGAIN)

        return paired_crops.draw(read, entry.size, entry.key, place, self.opt, rng)


def check(opt: Mapping[str, Any]) -> Listing:
    """The stream that options name, checked against them.

    Raises:
        UserError: it does not fit.
    """
    for key, expected in (('scale', 1), ('mean', None), ('std', None), ('color', None)):
        if opt.get(key, expected) != expected:
            raise UserError(f'StreamingPairedDataset has no {key} {opt[key]!r}; leave it out')
    listing = open_stream(opt['dataroot'])
    # Options that are checked before a run have no phase yet; those of training have a gt_size.
    if opt.get('phase', 'train') != 'train' or opt.get('gt_size') is None:
        return listing
    smallest = min(listing.entries, key=lambda entry: min(entry.size))
    if not opt.get('pad_to_gt_size') and min(smallest.size) < opt['gt_size']:
        raise UserError(
            f'gt_size is {opt["gt_size"]}, but the image {smallest.key} is only '
            f'{smallest.width}×{smallest.height}; lower gt_size or leave that image out'
        )
    shards = listing.index.chunks
    if isinstance(listing.place, Bucket):
        count = in_use(opt, len(shards))
        needed = count * max(shard.chunk_bytes for shard in shards)
        limit = opt.get('max_cache_size') or CACHE
        if needed > limit * GIGABYTE:
            raise UserError(
                f'max_cache_size is {limit:g}, but {count} shards take up to {needed / GIGABYTE:.2g} GB; '
                'raise it, or lower shuffle_shards'
            )
    return listing


def window(opt: Mapping[str, Any]) -> int:
    """`shuffle_shards`."""
    return int(opt.get('shuffle_shards') or WINDOW)


def in_use(opt: Mapping[str, Any], shards: int) -> int:
    """The most shards that are in use or downloaded ahead at a time (see `ShardOrder`)."""
    return min(window(opt) + 1 + AHEAD, shards)


class ShardOrder:
    """The order of the samples in a pass, which touches few shards at a time.

    The shards are shuffled.  Sample i of the shard at place r gets the key r + w·u_i, with the window w and
    u_i uniform in [0, 1), and the samples are sorted by their keys.  So the samples of a shard are spread
    over a stretch of w shards, at most w + 1 shards are in use at any time, and a new one is needed each
    time as many samples were read as a shard has.  Where the window holds all shards, every order of the
    samples is equally likely, and it is the order in which a data set without shards is read with the same
    seed.

    Args:
        sizes: number of samples of each shard.
        window: w, in shards.
    """

    def __init__(self, sizes: list[int], window: int) -> None:
        self.sizes = sizes
        self.window = window
        self._made: dict[int, Order] = {}

    def __call__(self, seed: int) -> Order:
        """The order of a pass.

        Args:
            seed: of the pass.

        Returns:
            The samples in their order, their keys, and the shards in their order; keys and shards are empty
            where the window holds all shards.
        """
        if seed not in self._made:
            # Two passes are in use at the end of one; the older is dropped.
            self._made = dict(list(self._made.items())[-1:])
            self._made[seed] = self._make(seed)
        return self._made[seed]

    def _make(self, seed: int) -> Order:
        generator = torch.Generator().manual_seed(seed)
        samples, count = sum(self.sizes), len(self.sizes)
        if self.window >= count:
            order = torch.randperm(samples, generator=generator).numpy()
            return order, np.empty(0), np.empty(0, dtype=np.int64)
        shards = torch.randperm(count, generator=generator).numpy()
        spread = torch.rand(samples, generator=generator, dtype=torch.float64).numpy()
        places = np.empty(count)
        places[shards] = np.arange(count)
        keys = np.repeat(places, self.sizes) + self.window * spread
        order = np.argsort(keys, kind='stable')
        return order, keys[order], shards

    def following(self, position: int, seed: int, count: int) -> list[int]:
        """The next shards that will be needed after a position of the stream of samples.

        Args:
            position: of a sample.
            seed: of the run.
            count: number of shards.
        """
        number, place = divmod(position, sum(self.sizes))
        _, keys, shards = self(derived_seed(seed, PASS, number))
        if not len(keys):
            return []
        first = int(keys[place]) + 1
        found = shards[first : first + count].tolist()
        if len(found) < count:  # the next pass begins with its first shards
            found += self(derived_seed(seed, PASS, number + 1))[2][: count - len(found)].tolist()
        return found


def whole(stored: bytes, size: tuple[int, int], key: str, place: str) -> NDArray[np.uint8]:
    """A stored image, uint8 RGB (H, W, 3).

    Raises:
        UserError: it is damaged or has another size.
    """
    check_size(stored, size, key, place, AGAIN)
    try:
        return decode_bgr(stored)[..., ::-1]
    except BadImageError as error:
        raise UserError(f'{place}: the image {key} {error}; {AGAIN}') from None
