"""The order and the augmentation of training samples, as functions of the seed and the position.

A run reads one endless stream of samples: each pass over the data set is a
permutation of its own.  A sample's position in that stream decides which image
it is and how it is cropped and flipped.  No state is kept anywhere, so that a
resumed run reads what an uninterrupted run would have read, with any number of
loader workers, and processes that share a batch read what one process would.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from dsgformer_arch.utils.errors import UserError

MOST_REPLACEMENTS = 10
"""Corrupt images in a row, after which a sample is given up."""


PASS, SAMPLE, ITERATION = 1, 2, 3
"""What a derived seed is for: the order of a pass, a sample's augmentation, an iteration's networks."""


def derived_seed(seed: int, purpose: int, number: int, rank: int = 0) -> int:
    """A 64-bit seed that depends on all arguments and differs for neighbouring ones."""
    sequence = np.random.SeedSequence([seed % 2**64, purpose, number, rank])
    words = sequence.generate_state(2)
    return int(words[0]) << 32 | int(words[1])


def seed_streams(seed: int) -> None:
    """Seed the random streams of Python, NumPy and PyTorch's CPU generator."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


class SampleStream(Sampler[list[tuple[int, int]]]):
    """Batches of (position, index) of one process, from any position of the stream on.

    A global batch is a run of consecutive positions; of `world_size` processes
    each takes `batch_size` of them.  Batches go across the ends of passes, so
    that no image is left out.

    Args:
        length: number of images.
        batch_size: samples of a batch, for this process.
        batches: number of batches.
        seed: determines the permutations.
        start: position of the first sample; the number of samples read before by all processes.
        rank: number of this process.
        world_size: number of processes.
        order: makes the permutation of a pass from its seed; every permutation is equally likely by default.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        batches: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        order: Callable[[int], Sequence[int]] | None = None,
    ) -> None:
        if length < 1:
            raise UserError('the training set is empty; check dataroot_gt and dataroot_lq')
        self.length = length
        self.batch_size = batch_size
        self.batches = batches
        self.seed = seed
        self.start = start
        self.rank = rank
        self.world_size = world_size
        self.permute = order or self.uniform_order
        self.pass_number = -1
        self.order: Sequence[int] = []

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in range(self.batches):
            first = self.start + (batch * self.world_size + self.rank) * self.batch_size
            yield [(position, self.index(position)) for position in range(first, first + self.batch_size)]

    def index(self, position: int) -> int:
        """The image at a position of the stream."""
        pass_number, place = divmod(position, self.length)
        if pass_number != self.pass_number:
            self.order = self.permute(derived_seed(self.seed, PASS, pass_number))
            self.pass_number = pass_number
        return self.order[place]

    def uniform_order(self, seed: int) -> list[int]:
        """A permutation of the images, each equally likely."""
        generator = torch.Generator().manual_seed(seed)
        order: list[int] = torch.randperm(self.length, generator=generator).tolist()
        return order


class SeededSamples(Dataset[dict[str, Any]]):
    """A data set that is indexed by (position, index) and draws its random numbers from the position.

    A sample that cannot be read is not an exception, which a loader worker would
    turn into two tracebacks: it is the entry `'error'` of what is returned, one
    sentence.  With `replace`, the next image takes its place and the entry
    `'faults'` lists such sentences.

    Args:
        dataset: any data set that returns dicts and draws from `random`, `numpy.random` or `torch`.
        seed: of the run.
        replace: whether other images take the place of corrupt ones.
    """

    def __init__(self, dataset: Any, seed: int, replace: bool = False) -> None:
        self.dataset = dataset
        self.seed = seed
        self.replace = replace

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        position, index = item
        faults: list[str] = []
        for attempt in range(min(MOST_REPLACEMENTS, len(self.dataset))):
            seed_streams(derived_seed(self.seed, SAMPLE, position))
            place = (index + attempt) % len(self.dataset)
            try:
                return {**self.read(position, place), 'faults': faults}
            except Exception as error:  # whatever a data set raises on a corrupt image, cv2.error included
                faults.append(self.describe(place, error))
            if not self.replace:
                return {'error': f'{faults[0]}; replace the file, or set corrupt_images: replace'}
        return {'error': f'{len(faults)} images in a row cannot be read; the first: {faults[0]}'}

    def read(self, position: int, index: int) -> dict[str, Any]:
        """An image's sample.

        A data set whose items depend on the epoch has a method `item`; one that draws from the position
        itself, because something else in its process draws random numbers too, has a method `at`.
        """
        if hasattr(self.dataset, 'at'):
            return self.dataset.at(index, position, self.seed)
        if hasattr(self.dataset, 'item'):
            return self.dataset.item(index, position // len(self.dataset))
        return self.dataset[index]

    def describe(self, index: int, error: Exception) -> str:
        """The fault of an image in one sentence that names it."""
        if isinstance(error, UserError):
            return str(error)
        paths = getattr(self.dataset, 'paths', None)
        image = paths[index].get('lq_path', index) if paths else index
        reason = str(error).strip().splitlines()
        return f'the training image {image} cannot be read ({type(error).__name__}: {"".join(reason[:1])})'


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch of what `SeededSamples` returns: the samples stacked, or the first `'error'`."""
    for sample in samples:
        if 'error' in sample:
            return {'error': sample['error']}
    faults = [fault for sample in samples for fault in sample['faults']]
    plain = [{key: value for key, value in sample.items() if key != 'faults'} for sample in samples]
    return {**default_collate(plain), 'faults': faults}


def start_worker(worker_id: int) -> None:
    """Leave signals to the main process, which saves before it ends and then ends the workers.

    Job schedulers and terminals send signals to every process of a group.
    """
    for name in ('SIGINT', 'SIGTERM', 'SIGUSR1'):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def training_loader(
    dataset: Any, stream: SampleStream, workers: int, replace: bool, pin_memory: bool, ahead: int = 2
) -> DataLoader[Any]:
    """A loader of the stream's batches.

    Args:
        dataset: see `SeededSamples`.
        stream: says what to load.
        workers: number of processes; 0 loads in this one.
        replace: whether other images take the place of corrupt ones.
        pin_memory: whether batches lie in pinned memory.
        ahead: batches that each worker loads ahead.
    """
    return DataLoader(
        SeededSamples(dataset, stream.seed, replace),
        batch_sampler=stream,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory and torch.cuda.is_available(),
        worker_init_fn=start_worker,
        prefetch_factor=ahead if workers else None,
    )


def stop_workers(batches: Any) -> None:
    """End the workers of a loader's iterator, which ignore the SIGTERM that ends other child processes."""
    if hasattr(batches, '_shutdown_workers'):
        batches._shutdown_workers()
        for worker in batches._workers:
            if worker.is_alive():  # it waits for a disk that does not answer
                worker.kill()
