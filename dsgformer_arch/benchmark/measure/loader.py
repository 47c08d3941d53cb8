"""Throughput of data loaders in crops per second, compared with BasicSR's own data set on the same images.

A GPU that trains 15 steps per second at batch 8 needs 120 pairs of crops per
second; with a slower loader it waits.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dsgformer_arch.benchmark import record as records
from dsgformer_arch.benchmark.measure.pairs import from_lmdbs
from dsgformer_arch.data.sampler import SampleStream, stop_workers, training_loader
from dsgformer_arch.data.stream_files import S3
from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.progress import track

DATASETS = ('PairedImageDataset', 'PairedCropDataset')
STREAM = 'StreamingPairedDataset'

PROTOCOL = """\
Batches from the loader of `basicsr train`, random crops, flips and turns; after one untimed batch, \
{seconds:g} seconds for each data set in turn, {rounds} rounds; medians of pairs of crops a second. The page \
cache is warm."""


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
    streams: Sequence[str] = (),
) -> records.Record:
    """Measure the data sets on `data`_gt.lmdb and `data`_lq.lmdb, and on streams; write `out`.json.

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
        streams: folders or addresses of streams of the same images; measured in the same turns.

    Returns:
        The record.
    """
    settings: dict[str, Any] = {
        'data': records.data_name(data),
        'patch': patch,
        'batch': batch,
        'workers': workers,
        'rounds': rounds,
    }
    if streams:
        settings['streams'] = [records.data_name(stream) for stream in streams]
    check(data, patch)
    path = records.beside(out, '.json')
    record = records.start('loader', settings, PROTOCOL.format(seconds=seconds, rounds=rounds), path, resume)
    if not record.rows:
        sources = {name: (name, lmdb_options(data)) for name in DATASETS}
        for stream in streams:
            label = f'{STREAM}, {"S3" if stream.startswith(S3) else "folder"}'
            sources[label] = STREAM, {'dataroot': stream}
        rates: dict[str, list[float]] = {label: [] for label in sources}
        for label in track(list(sources) * rounds, 'measuring loaders'):
            rates[label].append(crops_per_second(*sources[label], patch, batch, workers, seconds))
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


def lmdb_options(data: str) -> dict[str, Any]:
    """Options of a data set on two LMDBs."""
    roots = {f'dataroot_{side}': f'{data}_{side}.lmdb' for side in ('gt', 'lq')}
    return {**roots, 'io_backend': {'type': 'lmdb'}}


def crops_per_second(
    name: str, source: Mapping[str, Any], patch: int, batch: int, workers: int, seconds: float
) -> float:
    """Pairs of crops a second that a loader on one data set class delivers.

    Args:
        name: the class.
        source: its options that say where the images are.
        patch: side of the crops.
        batch: pairs in a batch.
        workers: loader processes.
        seconds: how long to measure.
    """
    from basicsr.data import build_dataset

    dataset = build_dataset({
        'name': name, 'type': name, 'phase': 'train', 'scale': 1, 'gt_size': patch, 'use_hflip': True,
        'use_rot': True, **source,
    })  # fmt: skip
    stream = SampleStream(len(dataset), batch, 10**9, seed=0, order=getattr(dataset, 'order', None))
    batches = iter(training_loader(dataset, stream, workers, False, False))
    try:
        take(batches)
        count, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            count += take(batches)
        return count / (time.perf_counter() - started)
    finally:
        stop_workers(batches)


def take(batches: Iterator[dict[str, Any]]) -> int:
    """Number of pairs of the next batch.

    Raises:
        UserError: an image cannot be read.
    """
    pair = next(batches)
    if 'error' in pair:
        raise UserError(pair['error'])
    assert isinstance(pair['lq'], torch.Tensor)
    return pair['lq'].shape[0]
