"""Throughput of data loaders in crops per second, compared with BasicSR's on the same LMDB.

A GPU that trains 15 steps per second at batch 8 needs 120 pairs of crops per
second; with a slower loader it waits.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from dsgformer_arch.benchmark import record as records
from dsgformer_arch.benchmark.measure.pairs import from_lmdbs
from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.progress import track

DATASETS = ('PairedImageDataset', 'PairedCropDataset')

PROTOCOL = """\
Batches from BasicSR's `build_dataloader` with persistent workers, random crops, flips and turns; after one \
untimed batch, {seconds:g} seconds for each data set in turn, {rounds} rounds; medians of pairs of crops a \
second. The page cache is warm."""


def run(
    data: str,
    patch: int = 256,
    batch: int = 8,
    workers: int = 1,
    rounds: int = 3,
    seconds: float = 5.0,
    out: Path = Path('results/benchmark/loader'),
    resume: bool = False,
    device: str = 'cpu',
) -> records.Record:
    """Measure both data sets on `data`_gt.lmdb and `data`_lq.lmdb; write `out`.json.

    Args:
        data: the common start of two LMDBs, such as `datasets/gopro/train`.
        patch: side of the crops.
        batch: pairs in a batch.
        workers: loader processes.
        rounds: rounds over the loaders.
        seconds: duration of a measurement.
        out: results without their ending.
        resume: keep what `out`.json has.
        device: not used; loaders run on the CPU.

    Returns:
        The record.
    """
    settings = {
        'data': records.data_name(data),
        'patch': patch,
        'batch': batch,
        'workers': workers,
        'rounds': rounds,
    }
    check(data, patch)
    path = records.beside(out, '.json')
    record = records.start('loader', settings, PROTOCOL.format(seconds=seconds, rounds=rounds), path, resume)
    if not record.rows:
        rates: dict[str, list[float]] = {name: [] for name in DATASETS}
        for name in track(list(DATASETS) * rounds, 'measuring loaders'):
            rates[name].append(crops_per_second(name, data, patch, batch, workers, seconds))
        record.rows = [
            {
                'dataset': name,
                'pairs_per_second': statistics.median(values),
                'lowest': min(values),
                'highest': max(values),
            }
            for name, values in rates.items()
        ]
        record.save(path)
    return record


def check(data: str, patch: int) -> None:
    """Refuse data that the loaders cannot take.

    Raises:
        UserError: an LMDB is missing or empty, images have no partner, or one is smaller than `patch`.
    """
    pairs = from_lmdbs(Path(data))
    for key in pairs.keys:
        sizes = [image.shape[:2] for image in pairs.images(key)]
        if min(map(min, sizes)) < patch:
            raise UserError(f'--patch is {patch}, but {data} has an image {key} of {sizes[0]}; lower it')


def crops_per_second(name: str, data: str, patch: int, batch: int, workers: int, seconds: float) -> float:
    """Pairs of crops a second that a loader on one data set class delivers."""
    from basicsr.data import build_dataloader, build_dataset
    from basicsr.data.data_sampler import EnlargedSampler

    options: dict[str, Any] = {
        'name': name, 'type': name, 'phase': 'train', 'scale': 1, 'gt_size': patch, 'use_hflip': True,
        'use_rot': True, 'dataroot_gt': f'{data}_gt.lmdb', 'dataroot_lq': f'{data}_lq.lmdb',
        'io_backend': {'type': 'lmdb'}, 'batch_size_per_gpu': batch, 'num_worker_per_gpu': workers,
        'persistent_workers': workers > 0,
    }  # fmt: skip
    dataset = build_dataset(options)
    sampler = EnlargedSampler(dataset, 1, 0, ratio=1000)
    loader = build_dataloader(dataset, options, num_gpu=0, sampler=sampler, seed=0)
    batches = iter(loader)
    next(batches)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        pair = next(batches)
        assert isinstance(pair['lq'], torch.Tensor)
        count += pair['lq'].shape[0]
    return count / (time.perf_counter() - started)
