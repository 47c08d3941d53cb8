"""What systems restore, scored under the protocol of the data set.

Every image is decoded once and goes, bit for bit the same, through all systems.  A line of the CSV is
written as soon as an image is scored, so that a run of days can be interrupted and resumed.
"""

from __future__ import annotations

import csv
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import nn

from dsgformer_arch import zoo
from dsgformer_arch.benchmark import record as records
from dsgformer_arch.benchmark.measure import crops, learning, machine
from dsgformer_arch.benchmark.measure import pairs as image_pairs
from dsgformer_arch.metrics import perceptual
from dsgformer_arch.metrics.metric import Image
from dsgformer_arch.metrics.protocols import Protocol, to_uint8
from dsgformer_arch.metrics.protocols import protocol as protocol_of
from dsgformer_arch.restore import restore
from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.files import sha256
from dsgformer_arch.utils.progress import track

PROTOCOL = """\
Protocol `{name}`: {source}. Outputs are {rounding}; the final output counts where a network returns \
several. All systems get the same decoded image, {precision}. {tiles} Means are over the images that were \
scored; equal images have an infinite PSNR and are left out of its mean.{sets} `{blurred}` is the \
input itself, not restored."""

MEAN_OF_SETS = (
    " The mean over sets is that of the sets' own means: each counts alike, however many images it has."
)

BLURRED = 'blurred'
"""The row of the input itself."""

SHARP = 'sharp'

MEAN = 'mean'
"""What the row of a mean over sets has in place of a set's name."""

TILE_OVERLAP = 32

CROP_HEIGHT, CROP_WIDTH = 240, 320
"""Size of the details that are kept for the report."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Restoring:
    """How images go through a network, the same for all systems.

    Attributes:
        device: where.
        precision: `fp32`, or `bf16` or `fp16` for autocast.
        tile: side of the tiles into which larger images are cut, or None.
    """

    device: torch.device
    precision: str
    tile: int | None

    def __call__(self, network: nn.Module, blurred: Image) -> Image:
        """Restore an image.

        Raises:
            ValueError: the output holds a NaN or an infinity.
            RuntimeError: the network failed, or its memory did not suffice.
        """
        image = learning.as_tensor(blurred).to(self.device)
        with machine.bounded(self.device):
            output = restore(
                network, image, precision=self.precision, tile=self.tile, tile_overlap=TILE_OVERLAP
            )
        return to_uint8(output)

    def in_tiles(self, height: int, width: int) -> bool:
        """Is an image of this size cut?"""
        return self.tile is not None and max(height, width) > self.tile


def run(
    models: Sequence[str],
    data: str | Sequence[str],
    protocol: str,
    weights: Sequence[tuple[str, Path]] = (),
    precision: str = 'fp32',
    tile: int | None = None,
    tlc: int | None = None,
    metrics: Sequence[str] = (),
    save_images: bool = False,
    limit: int | None = None,
    device: str = 'cpu',
    out: Path = Path('results/benchmark/quality'),
    resume: bool = False,
) -> records.Record:
    """Score every system on every image and write `out`.csv and `out`.json.

    Args:
        models: names of the zoo.
        data: what `pairs.find` takes; several for several sets, of which each is reported, and the mean over
            them as `extra['means']`.
        protocol: a name in `metrics.PROTOCOLS`.
        weights: a checkpoint for each system.
        precision: `fp32`, or `bf16` or `fp16` for autocast.
        tile: side of the tiles into which larger images are cut, or None for whole images.
        tlc: train size for local pooling, for the systems that have it.
        metrics: more metrics, of pyiqa.
        save_images: keep what was restored as `out`/<system>/<image>.png, and details for the report.
        limit: only the first images of each set.
        device: a torch device.
        out: results without their ending.
        resume: keep the images that `out`.csv has.

    Returns:
        The record; `failed` of a row counts the images that could not be restored or hold a NaN.

    Raises:
        UserError: a system without weights or with another's, an unknown protocol or metric, or data that
            `pairs.find` or `Pairs.check` refuses.
    """
    rules = protocol_of(protocol)
    for name in metrics:
        perceptual.create(name)
    if tile is not None and tile <= TILE_OVERLAP:
        raise UserError(f'--tile is {tile}, but tiles overlap by {TILE_OVERLAP} pixels; make it larger')
    restoring = Restoring(machine.device(device), precision, tile)
    networks = load(models, dict(weights), tlc)
    places = [data] if isinstance(data, str) else [*data]
    sets = {
        name: image_pairs.find(place, protocol).first(limit)
        for name, place in zip(image_pairs.set_names(places), places, strict=True)
    }
    several = len(sets) > 1
    pairs = image_pairs.joined(sets) if several else next(iter(sets.values()))
    columns = [*rules.columns, *metrics]
    settings = {
        'models': list(models), 'data': ', '.join(sets) if several else records.data_name(places[0]),
        'data_sha256': pairs.check(),
        'protocol': protocol, 'weights': {name: identity(path) for name, path in weights},
        'precision': precision, 'tile': tile, 'tlc': tlc, 'metrics': list(metrics),
        'images': len(pairs.keys), 'save_images': save_images, 'device': device,
    }  # fmt: skip
    path = records.beside(out, '.json')
    how = describe(rules, precision, tile, tlc, several)
    record = records.start('quality', settings, how, path, resume)
    record.save(path)
    journal = Journal(records.beside(out, '.csv'), columns, resume)
    folder = out if save_images else None
    score = partial(scores, rules=rules, metrics=metrics)
    for scored in measure(networks, pairs, restoring, score, journal, folder):
        if scored['error']:
            print(f'{scored["model"]}, {scored["image"]}: {scored["error"]}', file=sys.stderr, flush=True)
    order = list(product([BLURRED, *models], pairs.keys))
    rows = journal.finish(order)
    record.rows, means = [], []
    for name in (BLURRED, *models):
        own: list[Row] = []
        for data_set in sets:
            row: Row = {'set': data_set} if several else {}
            row |= mean(name, of_set(data_set, rows, several), columns)
            if name != BLURRED:
                row['tlc'] = tlc if zoo.get(name).tlc else None
            own.append(row)
        record.rows += own
        means.append(mean_over_sets(own, columns))
    if several:
        record.extra['means'] = means
    record.extra['lower_better'] = [name for name in metrics if perceptual.lower_better(name)]
    if folder is not None:
        record.extra['examples'] = examples(models, rows, pairs, folder)
    record.save(path)
    return record


def load(models: Sequence[str], weights: Mapping[str, Path], tlc: int | None) -> dict[str, nn.Module]:
    """Every system with its weights, on the CPU.

    Raises:
        UserError: one has no weights, weights are of no system asked for, or of another one.
    """
    missing = [name for name in models if name not in weights]
    if missing:
        raise UserError(
            f'{missing[0]} has no weights; give --weights {missing[0]}=PATH, since random ones are not scored'
        )
    unused = [name for name in weights if name not in models]
    if unused:
        raise UserError(f'--weights names {unused[0]}, which is not among --models; add it there')
    if tlc is not None and not any(zoo.get(name).tlc for name in models):
        raise UserError(f'--tlc: none of {", ".join(models)} has local pooling; leave it out')
    return {
        name: zoo.load(weights[name], name, tlc=tlc if zoo.get(name).tlc else None)
        for name in track(models, 'loading')
    }


def identity(path: Path) -> str:
    """Name and digest of a checkpoint."""
    return f'{path.name} (sha256 {sha256(path)[:16]})'


def measure(
    networks: Mapping[str, nn.Module],
    pairs: image_pairs.Pairs,
    restoring: Restoring,
    score: Callable[[Image, Image], dict[str, float]],
    journal: Journal,
    folder: Path | None,
) -> Iterator[Row]:
    """Score what the journal lacks, image by image, in each all systems; yields the rows as they come."""
    images = lru_cache(maxsize=1)(pairs.images)  # decoded once for all systems
    todo = [(key, name) for key in pairs.keys for name in (BLURRED, *networks) if not journal.has(name, key)]
    too_large = {name: 0 for name, network in networks.items() if not moved(network, restoring.device)}
    for key, name in track(todo, 'restoring and scoring'):
        blurred, sharp = images(key)
        height, width = sharp.shape[:2]
        row: Row = {'model': name, 'image': key, 'height': height, 'width': width, 'error': None}
        row['tiles'] = name != BLURRED and restoring.in_tiles(height, width)
        try:
            if name == BLURRED:
                restored = blurred
            elif height * width >= too_large.get(name, sys.maxsize):
                raise MemoryError
            else:
                restored = restoring(networks[name], blurred)
            row |= score(restored, sharp)
            if folder is not None and name != BLURRED:
                write_image(folder / name / f'{key}.png', restored)
        except (RuntimeError, MemoryError, ValueError) as error:
            row['error'] = machine.reason(error)
            if row['error'] == machine.OUT_OF_MEMORY:
                too_large[name] = min(height * width, too_large.get(name, sys.maxsize))
            machine.release(restoring.device)
        journal.add(row)
        yield row


def moved(network: nn.Module, device: torch.device) -> bool:
    """Move a network, unless the device cannot hold even its weights."""
    try:
        network.to(device)
    except RuntimeError:
        return False
    return True


def scores(restored: Image, sharp: Image, rules: Protocol, metrics: Sequence[str]) -> dict[str, float]:
    """All columns of one image."""
    pair = [np.ascontiguousarray(image[..., ::-1]) for image in (restored, sharp)]
    extra = {name: perceptual.pyiqa_metric(*pair, name=name) for name in metrics}
    return {**rules.evaluate(restored, sharp), **extra}


class Journal:
    """The CSV of all images: a line for each, appended as soon as it is known.

    Args:
        path: the file; a new one is begun unless `resume`.
        columns: the scores.
        resume: keep what the file has, but not what failed: that is tried again.
    """

    def __init__(self, path: Path, columns: Sequence[str], resume: bool) -> None:
        self.path = path
        self.columns = list(columns)
        self.fields = ['image', 'model', 'height', 'width', 'tiles', *columns, 'error']
        self.rows: dict[tuple[str, str], Row] = {}
        if resume and path.exists():
            for row in self._read():
                self.rows[row['model'], row['image']] = row
        self._write(self.rows.values())

    def has(self, model: str, image: str) -> bool:
        """Is this image scored already?"""
        return (model, image) in self.rows

    def add(self, row: Row) -> None:
        """Keep a row."""
        self.rows[row['model'], row['image']] = row
        with records.writing(self.path), open(self.path, 'a', encoding='utf-8', newline='') as file:
            csv.DictWriter(file, self.fields).writerow(row)

    def finish(self, order: Sequence[tuple[str, str]]) -> list[Row]:
        """Put the file in order, by (model, image), and return its rows."""
        rows = [self.rows[key] for key in order]
        self._write(rows)
        return rows

    def _read(self) -> Iterator[Row]:
        try:
            text = self.path.read_text(encoding='utf-8')
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f'--resume: cannot read {self.path} ({error}); delete it') from None
        whole = text[: text.rfind('\n') + 1]  # an interrupted run may end within a line
        for row in csv.DictReader(whole.splitlines()):
            if row.keys() != {*self.fields}:
                raise UserError(f'--resume: {self.path} has other columns; delete it or write elsewhere')
            if not row['error']:
                try:
                    values = {column: float(row[column]) for column in self.columns if row[column]}
                    sides = {side: int(row[side]) for side in ('height', 'width')}
                except (TypeError, ValueError):
                    raise UserError(
                        f'--resume: {self.path} has a damaged line for {row["image"]!r}; delete it'
                    ) from None
                yield {**row, **sides, **values, 'tiles': row['tiles'] == 'True', 'error': None}

    def _write(self, rows: Iterable[Row]) -> None:
        def write(temporary: str) -> None:
            with open(temporary, 'w', encoding='utf-8', newline='') as file:
                writer = csv.DictWriter(file, self.fields)
                writer.writeheader()
                writer.writerows(rows)

        records.put(write, self.path)


def mean(name: str, rows: Sequence[Row], columns: Sequence[str]) -> Row:
    """One system's means over the images that were scored, and what to know about them.

    Returns:
        The `columns`, None where there is nothing to average; `images` and `failed`, how many were
        scored and not; `identical`, how many equal their sharp partner, infinite in PSNR; `in_tiles`;
        `gain` in dB over the blurred images with its 10th and 90th percentile; and the first `error`.
    """
    mine = [row for row in rows if row['model'] == name]
    done = [row for row in mine if not row['error']]
    start = {row['image']: row['psnr'] for row in rows if row['model'] == BLURRED and not row['error']}
    gains = [row['psnr'] - start[row['image']] for row in done if row['image'] in start]
    gains = [gain for gain in gains if math.isfinite(gain)]
    result: Row = {'model': name, 'images': len(done), 'failed': len(mine) - len(done)}
    result['identical'] = sum(math.isinf(row['psnr']) for row in done)
    result['in_tiles'] = sum(row['tiles'] for row in done)
    result['error'] = next((row['error'] for row in mine if row['error']), None)
    for column in columns:
        result[column] = _mean([row[column] for row in done])
    if name != BLURRED:
        result['gain'] = _mean(gains)
        result['gain_p10'], result['gain_p90'] = (
            (float(value) for value in np.percentile(gains, (10, 90))) if gains else (None, None)
        )
    return result


def of_set(name: str, rows: Sequence[Row], several: bool) -> Sequence[Row]:
    """The rows of one set's images: all where it is the only one, else those that `pairs.joined` named."""
    return [row for row in rows if row['image'].startswith(f'{name}/')] if several else rows


def mean_over_sets(means: Sequence[Row], columns: Sequence[str]) -> Row:
    """The mean of one system's means over sets, each of the same weight, as deraining papers average.

    Args:
        means: what `mean` returns for each set.
        columns: the scores.

    Returns:
        A row like theirs, `set` being `MEAN`: counts are added; a score is None if a set has none.
    """
    row: Row = {**means[0], 'set': MEAN}
    for count in ('images', 'failed', 'identical', 'in_tiles'):
        row[count] = sum(own[count] for own in means)
    row['error'] = next((own['error'] for own in means if own['error']), None)
    for column in (*columns, 'gain'):
        if column in row:
            values = [own[column] for own in means]
            row[column] = None if None in values else statistics.fmean(values)
    return {key: value for key, value in row.items() if key not in ('gain_p10', 'gain_p90')}


def _mean(values: Sequence[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else None


def examples(
    models: Sequence[str], rows: Sequence[Row], pairs: image_pairs.Pairs, folder: Path
) -> list[dict[str, Any]]:
    """Keep details of the images on which the first system gains least, most, and a middling amount.

    They follow from the numbers and are not hand-picked.

    Returns:
        For each: `image`, `why`, `psnr` by version, and `files` by version, relative to `folder`'s parent;
        versions are `blurred`, `sharp` and the systems.
    """
    psnr: dict[tuple[str, str], float]
    psnr = {(row['model'], row['image']): row['psnr'] for row in rows if not row['error']}
    gains = {
        key: psnr[models[0], key] - psnr[BLURRED, key]
        for key in pairs.keys
        if (models[0], key) in psnr and math.isfinite(psnr[BLURRED, key])
    }
    ranked = sorted(gains, key=lambda key: gains[key])
    if not ranked:
        return []
    picks = {ranked[0]: 'least gain', ranked[len(ranked) // 2]: 'median gain', ranked[-1]: 'largest gain'}
    if len(ranked) == 1:
        picks = {ranked[0]: 'the only image'}
    found = []
    for key, why in picks.items():
        blurred, sharp = pairs.images(key)
        window = crops.detail(sharp, CROP_HEIGHT, CROP_WIDTH)
        versions = {BLURRED: blurred, SHARP: sharp}
        for name in models:
            if (name, key) in psnr:
                versions[name] = image_pairs.decode((folder / name / f'{key}.png').read_bytes(), name)
        files = {}
        for version, image in versions.items():
            files[version] = f'{folder.name}/examples/{key}/{version}.png'
            write_image(folder.parent / files[version], window.of(image))
        values = {name: _mean([psnr[name, key]]) for name in versions if name != SHARP}
        found.append({'image': key, 'why': f'{why} of {models[0]}', 'psnr': values, 'files': files})
    return found


def write_image(path: Path, image: Image) -> None:
    """Write uint8 RGB (H, W, 3) as PNG."""
    encoded = cv2.imencode('.png', np.ascontiguousarray(image[..., ::-1]))[1].tobytes()
    records.put(lambda temporary: Path(temporary).write_bytes(encoded), path)


def describe(
    rules: Protocol, precision: str, tile: int | None, tlc: int | None, several: bool = False
) -> str:
    """How it was measured, in sentences."""
    tiles = 'Images are restored whole.'
    if tile is not None:
        tiles = (
            f'Images with a side over {tile} pixels are restored in tiles of {tile}×{tile} that overlap by '
            f'{TILE_OVERLAP} and are blended, which changes what a network sees.'
        )
    if tlc is not None:
        tiles += f' Local pooling (TLC) with a train size of {tlc}, for the systems whose notes say so.'
    return PROTOCOL.format(
        name=rules.name, source=rules.source, rounding=rules.rounding, precision=precision, tiles=tiles,
        blurred=BLURRED, sets=MEAN_OF_SETS if several else '',
    )  # fmt: skip
