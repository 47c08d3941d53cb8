"""Image pairs → the two LMDBs that BasicSR's `PairedImageDataset` reads.

Each split becomes `<split>_lq.lmdb` and `<split>_gt.lmdb`: folders with `data.mdb`, `meta_info.txt` (lines
`<key>.png (h,w,c) <level>`, as `basicsr.utils.lmdb_util` writes them) and a record of what they were made
from.  Whole images are stored as the bytes of their files.  A file is read once: its check and its copy share
that reading, so a fault is found while the set is being copied, and then the copy is dropped.

Everything is written into the hidden folder `PARTIAL` of the output folder, under names that BasicSR refuses,
brought to the disk (fsync), and only then renamed.  Whoever kills the process leaves that folder and no
incomplete LMDB; the next run keeps finished ones and writes the rest again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, TextIO

import lmdb
import numpy as np
from numpy.typing import NDArray

from dsgformer_arch.data import meta_info
from dsgformer_arch.data.lmdb_files import open_lmdb
from dsgformer_arch.data.prepare.layouts import Pair, Split
from dsgformer_arch.data.prepare.pair_files import (
    PNG_LEVEL,
    SIDES,
    CropGrid,
    Image,
    cut,
    decode,
    fingerprint,
    in_order,
    in_pixels,
    in_words,
    load,
    prepare,
    raise_problems,
    shape_of,
)
from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.files import disk_is_full, locked, read_json, sync_folder
from dsgformer_arch.utils.progress import track

PARTIAL = '.create_lmdb.partial'
RECORD = 'create_lmdb.json'

BATCH_BYTES = 32 * 2**20  # what waits in memory for one write transaction
FIRST_MAP_BYTES = 2**30  # address space, neither memory nor disk; doubled whenever it is full
NEARLY_FULL_BYTES = 2 * BATCH_BYTES  # LMDB calls a write that a full disk cut short an input/output error


def create_lmdbs(
    splits: Sequence[Split],
    out: Path,
    preset: str,
    crop: CropGrid | None = None,
    workers: int = 1,
    verify: bool = False,
    force: bool = False,
    raw: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Write the two LMDBs of each split into `out`: all of them or, where anything is wrong, none.

    An existing LMDB that was made from the same files with the same settings is kept.

    Args:
        splits: what to write, from `layouts`.
        out: the folder for the LMDBs; made where it is missing.
        preset: name of the layout; part of the record.
        crop: cut images into crops (keys `<key>_s001` …, PNG) instead of storing them whole.
        workers: threads that read, check, decode and encode (all outside Python's interpreter lock).
        verify: decode every stored image and compare it with its file: whole images' bytes, crops' and raw
            images' pixels.
        force: replace existing LMDBs, whatever they were made from.
        raw: store decoded 8-bit RGB without compression, of which `PairedCropDataset` reads only what a
            crop needs; two to four times the space.
        say: takes one line on what was done.

    Raises:
        UserError: images are unpaired, unreadable, damaged, of different sizes, or smaller than a crop (all
            of them named); other LMDBs exist there; another run is writing; the disk is full.
    """
    targets = [target for split in splits for target in _targets(split, out, preset, crop, raw)]
    missing = targets if force else [target for target in targets if not target.is_finished(target.final)]
    if not force:
        _refuse_to_replace([target.final for target in missing])
    problems = [problem for split in splits for problem in split.problems]
    if problems or missing or (out / PARTIAL).exists():
        with _workspace(out) as folder:
            todo = _drop_leftovers(folder, missing, force, say)
            if not problems and crop is None and not raw:
                _require_space(out, sum(target.source_bytes for target in todo))
            dry = Event()
            if problems:
                dry.set()
            for split in splits:
                of_split = [target for target in todo if target.split is split]
                if of_split:
                    problems += _write_split(split, of_split, crop, raw, workers, dry)
            if verify and not problems:
                problems += _verify([(target, target.partial) for target in missing], crop, raw, workers)
            raise_problems(problems, 'LMDB')
            _publish(missing, folder)
    for target in missing:
        say(f'wrote {target.final}: {target.describe()}')
    kept = [target for target in targets if target not in missing]
    for target in kept:
        say(f'kept {target.final}, complete already: {target.describe()}')
    if verify:
        if damaged := _verify([(target, target.final) for target in kept], crop, raw, workers):
            listed = '\n  '.join(damaged)
            raise UserError(
                f'LMDBs in {out} are damaged; run again with --force to replace them:\n  {listed}'
            )
        say(f'verified {len(targets)} LMDBs: every image decodes and has the size that it should')


# --- what is to be made, and from what ----------------------------------------------------------------------


@dataclass(eq=False)
class _Target:
    """One LMDB: its source files, and its path while it is written and when it is finished."""

    split: Split
    side: str
    final: Path
    partial: Path
    made_from: dict[str, Any]

    @property
    def source_bytes(self) -> int:
        return int(self.made_from['bytes'])

    def path_of(self, pair: Pair) -> Path:
        return pair.lq if self.side == 'lq' else pair.gt

    def is_finished(self, folder: Path) -> bool:
        """Does `folder` hold the whole LMDB, made from the files as they are now?"""
        record = read_json(folder / RECORD)
        return (
            record.get('made_from') == self.made_from
            and (folder / meta_info.NAME).is_file()
            and (folder / 'data.mdb').is_file()
            and (folder / 'data.mdb').stat().st_size == record.get('data_bytes')
        )

    def describe(self) -> str:
        record = read_json(self.final / RECORD)
        return f'{record["images"]} images, {in_words(record["data_bytes"])}'


def _targets(split: Split, out: Path, preset: str, crop: CropGrid | None, raw: bool) -> list[_Target]:
    digest, sizes = fingerprint(split)
    how = {
        'format': 1,
        'preset': preset,
        'split': split.name,
        'crop': [crop.size, crop.step] if crop else None,
        'pairs': len(split.pairs),
        'files': digest,
        **({'raw': True} if raw else {}),
    }
    return [
        _Target(
            split,
            side,
            final=out / f'{split.name}_{side}.lmdb',
            partial=out / PARTIAL / f'{split.name}_{side}',
            made_from={**how, 'side': side, 'bytes': sizes[side]},
        )
        for side in SIDES
    ]


def _refuse_to_replace(paths: Iterable[Path]) -> None:
    standing = [path for path in paths if os.path.lexists(path)]
    if standing:
        names = ', '.join(path.name for path in standing)
        raise UserError(
            f'{standing[0].parent} already holds {names}, made from other files or otherwise, or not whole; '
            'give another folder, or --force to replace'
        )


# --- the folder in which LMDBs grow -------------------------------------------------------------------------


@contextmanager
def _workspace(out: Path) -> Iterator[Path]:
    """Hold the folder `PARTIAL` of `out` for this process alone, and remove it afterwards.

    After an interrupt, or a fault of the program, it stays: the next run uses what is finished in it.
    """
    folder = out / PARTIAL
    created = [path for path in (out.absolute(), *out.absolute().parents) if not path.exists()]
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder, out))
        except OSError as error:
            _remove(folder, created)
            raise UserError(_cannot_write(out, error)) from error
        try:
            yield folder
        except UserError:
            _remove(folder, created)
            raise
        except (OSError, lmdb.Error) as error:
            sentence = _cannot_write(out, error)  # before the space is free again
            _remove(folder, created)
            raise UserError(sentence) from error
        _remove(folder, created)


def _remove(folder: Path, created: Iterable[Path]) -> None:
    """Remove the workspace, and of the folders made for it those that hold nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        for path in created:
            path.rmdir()


def _cannot_write(out: Path, error: OSError | lmdb.Error) -> str:
    full = (isinstance(error, OSError) and disk_is_full(error)) or 'No space left' in str(error)
    with suppress(OSError):
        full |= isinstance(error, lmdb.Error) and shutil.disk_usage(out).free < NEARLY_FULL_BYTES
    if full:
        return f'the disk of {out} is full, so no LMDB was written; free some space or give another folder'
    reason = getattr(error, 'strerror', None) or str(error)
    return f'cannot write to {out} ({reason}), so no LMDB was written; give another folder'


def _require_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if needed > free:
        raise UserError(
            f'the LMDBs need {in_words(needed)}, but the disk of {out} has {in_words(free)} free; '
            'free some space or give another folder'
        )


def _drop_leftovers(
    folder: Path, missing: Sequence[_Target], force: bool, say: Callable[[str], None]
) -> list[_Target]:
    """Remove what an interrupted run left, except what it finished; return what is still to be written."""
    finished = [] if force else [target for target in missing if target.is_finished(target.partial)]
    for target in finished:
        say(f'took over {target.final.name}, which an interrupted run had finished')
    leftovers = set(folder.iterdir()) - {target.partial for target in finished}
    for path in leftovers:
        shutil.rmtree(path)
    if leftovers:
        say(f'removed what an interrupted run left unfinished in {folder}')
    return [target for target in missing if target not in finished]


def _publish(targets: Sequence[_Target], folder: Path) -> None:
    """Rename finished LMDBs to their final places."""
    for target in targets:
        if os.path.lexists(target.final):
            os.rename(target.final, folder / f'replaced_{target.final.name}')
        os.rename(target.partial, target.final)
    sync_folder(folder.parent)


# --- writing and verifying ----------------------------------------------------------------------------------


def _write_split(
    split: Split, targets: Sequence[_Target], crop: CropGrid | None, raw: bool, workers: int, dry: Event
) -> list[str]:
    """Write one split's LMDBs into the workspace; return what is wrong with its images.

    From the first problem on, here or in an earlier split, `dry` is set: the rest is checked, not written.
    """
    problems: list[str] = []
    what = f'{"checking" if dry.is_set() else "writing"} {split.name}'
    read = partial(prepare, crop=crop, raw=raw, dry=dry)
    with ExitStack() as stack:
        files = (
            {}
            if dry.is_set()
            else {target.side: stack.enter_context(_LmdbFile(target)) for target in targets}
        )
        for prepared in track(in_order(read, split.pairs, workers), what, len(split.pairs)):
            if prepared.problems:
                problems += prepared.problems
                dry.set()
            if not dry.is_set():
                for side, file in files.items():
                    for image in prepared.images[side]:
                        file.put(image)
        if not dry.is_set():
            for file in files.values():
                file.finish()
    return problems


class _LmdbFile:
    """One LMDB that grows in the workspace.  Only `finish` makes it one that counts."""

    def __init__(self, target: _Target) -> None:
        self._folder = target.partial
        self._made_from = target.made_from
        self._folder.mkdir()
        self._meta_info = open(self._folder / f'{meta_info.NAME}.partial', 'w', encoding='ascii')  # noqa: SIM115
        self._environment = lmdb.open(str(self._folder), map_size=FIRST_MAP_BYTES, sync=False, lock=False)
        self._batch: list[Image] = []
        self._batch_bytes = 0
        self._images = 0

    def __enter__(self) -> _LmdbFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._environment.close()
        self._meta_info.close()

    def put(self, image: Image) -> None:
        self._batch.append(image)
        self._batch_bytes += len(image.data)
        if self._batch_bytes >= BATCH_BYTES:
            self._commit()

    def _commit(self) -> None:
        while True:
            try:
                with self._environment.begin(write=True) as transaction:
                    for image in self._batch:
                        transaction.put(image.key.encode('ascii'), image.data)
                break
            except lmdb.MapFullError:
                self._environment.set_mapsize(2 * self._environment.info()['map_size'])
        for image in self._batch:
            shape = image.shape
            entry = meta_info.Entry(image.key, shape.height, shape.width, shape.channels, PNG_LEVEL)
            self._meta_info.write(entry.line())
        self._images += len(self._batch)
        self._batch.clear()
        self._batch_bytes = 0

    def finish(self) -> None:
        """Write the pending values, sync them to the disk, and write the record last."""
        self._commit()
        self._environment.sync(True)
        self._environment.close()
        _sync_file(self._meta_info)
        os.rename(self._meta_info.name, self._folder / meta_info.NAME)
        record = {
            'made_from': self._made_from,
            'images': self._images,
            'data_bytes': (self._folder / 'data.mdb').stat().st_size,
        }
        with open(self._folder / f'{RECORD}.partial', 'w', encoding='ascii') as file:
            json.dump(record, file, indent=1)
            _sync_file(file)
        sync_folder(self._folder)
        os.rename(self._folder / f'{RECORD}.partial', self._folder / RECORD)
        sync_folder(self._folder)


def _sync_file(file: TextIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _verify(
    places: Sequence[tuple[_Target, Path]], crop: CropGrid | None, raw: bool, workers: int
) -> list[str]:
    """Compare every image of finished LMDBs with its file and with `meta_info.txt`; return what differs."""
    problems: list[str] = []
    for target, folder in places:
        name = target.final.name
        try:
            entries = meta_info.read(folder)
            environment = open_lmdb(folder)
        except UserError as error:
            problems.append(str(error))
            continue
        with closing(environment):
            check = partial(_verify_pair, environment, entries, target, crop, raw)
            pairs = target.split.pairs
            found = track(in_order(check, pairs, workers), f'verifying {name}', len(pairs))
            counts = []
            for number, faults in found:
                counts.append(number)
                problems += faults
            if not environment.stat()['entries'] == len(entries) == sum(counts):
                problems.append(f'{target.final}: its meta_info.txt does not list what it holds')
    return problems


def _verify_pair(
    environment: lmdb.Environment,
    entries: dict[str, meta_info.Entry],
    target: _Target,
    crop: CropGrid | None,
    raw: bool,
    pair: Pair,
) -> tuple[int, list[str]]:
    """How many images are stored of one file, and what is wrong with them."""
    path, name = target.path_of(pair), target.final.name
    image = load(pair.key, path)
    if isinstance(image, str):
        return 1, [image]
    pixels = decode(image.data)
    if pixels is None:
        return 1, [f'{path}: cannot be decoded']
    parts = list(cut(pair.key, pixels, crop)) if crop else [(pair.key, pixels)]
    problems = []
    for key, part in parts:
        with environment.begin() as transaction:
            stored = transaction.get(key.encode('ascii'))
        entry = entries.get(key)
        where = path if crop is None and not raw else f'{path}, key {key}'
        if stored is None or entry is None:
            problems.append(f'{where}: is missing in {name}')
        elif (entry.height, entry.width, entry.channels) != astuple(shape_of(part)):
            problems.append(f'{where}: is {in_pixels(shape_of(part))}, which is not what {name} lists')
        elif not (stored == image.data if where is path else _same_pixels(stored, part)):
            problems.append(f'{where}: differs from what is stored of it in {name}')
    return len(parts), problems


def _same_pixels(stored: bytes, part: NDArray[Any]) -> bool:
    decoded = decode(stored)
    return decoded is not None and decoded.dtype == part.dtype and np.array_equal(decoded, part)
