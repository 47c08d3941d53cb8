"""Data sets of synthetic blur, rendered by several processes and written as LMDBs or folders.

Pair i depends on (seed, i) only.  Pairs are collected in the hidden folder `PARTIAL` of the output folder; a
pair is complete when its information file exists.  The same command therefore continues a run that was killed
and makes the same data set.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import cv2
import numpy as np

from dsgformer_arch.data.prepare.blur.photographs import image_files
from dsgformer_arch.data.prepare.blur.sources import Sample, Source, folders
from dsgformer_arch.data.prepare.blur.video import Averaging, Window, average
from dsgformer_arch.data.prepare.layouts import Pair, Split
from dsgformer_arch.data.prepare.lmdb_writer import create_lmdbs
from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.files import cannot_write, locked, read_json, write_bytes, write_text
from dsgformer_arch.utils.progress import track

FORMAT = 1
PARTIAL = '.synthesize_blur.partial'
SETTINGS = 'settings.json'
PAIRS, INFO = 'pairs', 'info'
PRESET = 'synthetic_blur'
SIDES = {'lq': 'blur', 'gt': 'sharp'}


@dataclass(frozen=True)
class Job:
    """One pair of the data set.

    Attributes:
        key: its name in the data set.
        number: determines its random numbers together with the seed.
        window: the frames that it is made from; None if a source draws it.
    """

    key: str
    number: int
    window: Window | None = None


@dataclass(frozen=True)
class Recipe:
    """The settings of a data set.

    Attributes:
        kind: `video`, `shake` or `objects`.
        seed: of the data set.
        side: of crops in pixels; None for whole images.
        source: where pairs are drawn from, not yet prepared; None for video.
        averaging: how frames are averaged; None for photographs.
        files: names and sizes of the files that pairs are made from.
    """

    kind: str
    seed: int
    side: int | None = None
    source: Source | None = None
    averaging: Averaging | None = None
    files: str = ''

    def settings(self) -> dict[str, Any]:
        """Everything that pixels depend on, in types of JSON."""
        settings = {'format': FORMAT, **dataclasses.asdict(self)}
        if self.source is not None:
            del settings['source']['memory']
        return dict(json.loads(json.dumps(settings)))

    def make(self, job: Job) -> Sample:
        """Make a pair."""
        rng = np.random.default_rng([self.seed, job.number])
        if job.window is not None and self.averaging is not None:
            return average(job.window, self.averaging, rng)
        assert self.source is not None
        return self.source.sample(rng, self.side, job.number)


def fingerprint(paths: Sequence[Path]) -> str:
    """A digest of files' names and sizes."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f'{path.name} {path.stat().st_size}\n'.encode())
    return digest.hexdigest()[:16]


def synthesize(
    recipe: Recipe,
    jobs: Sequence[Job],
    out: Path,
    name: str = 'train',
    lmdb: bool = True,
    workers: int = 1,
    force: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Make a data set of synthetic blur in `out`, completely or not at all.

    LMDBs are `<name>_lq.lmdb` and `<name>_gt.lmdb`; folders are `<name>/blur` and `<name>/sharp`.  Beside
    them `<name>_blur.json` holds the settings and the source of each pair.

    Args:
        recipe: how pairs are made.
        jobs: the pairs.
        out: the folder; made where it is missing.
        name: of the data set within it.
        lmdb: write LMDBs rather than folders.
        workers: processes that make pairs.
        force: replace an existing data set that was made with other settings.
        say: takes one line on what was done.

    Raises:
        UserError: `out` holds another data set, another run is at work, an image cannot be read, or the
            folder cannot be written.
    """
    finals = [out / f'{name}_{side}.lmdb' for side in SIDES] if lmdb else [out / name]
    record = out / f'{name}_blur.json'
    settings = {**recipe.settings(), 'pairs': len(jobs), 'lmdb': lmdb}
    standing = [path for path in finals if os.path.lexists(path)]
    if len(standing) == len(finals) and read_json(record).get('settings') == settings:
        say(f'kept {", ".join(map(str, finals))}, complete already')
        return
    of_run = {**settings, 'name': name}
    continues = read_json(out / PARTIAL / SETTINGS) == of_run and (out / PARTIAL / INFO).is_dir()
    if standing and not force and not continues:
        raise UserError(
            f'{standing[0]} exists and was made with other settings; give another folder or name, '
            'or --force to replace it'
        )
    try:
        with _workspace(out, of_run, say) as folder:
            info = _make_all(recipe, jobs, folder, workers)
            pairs = folder / PAIRS
            if lmdb:
                places = [pairs / side for side in SIDES.values()]
                keys = sorted(job.key for job in jobs)
                listed = [Pair(key, *(place / f'{key}.png' for place in places)) for key in keys]
                create_lmdbs([Split(name, listed)], out, PRESET, workers=workers, force=force, say=say)
            elif pairs.is_dir():  # else an earlier run was killed after it had moved them
                if standing:
                    os.rename(finals[0], folder / 'replaced')
                os.rename(pairs, finals[0])
            text = json.dumps({'settings': settings, 'made_from': info}, indent=1) + '\n'
            write_text(text, record)
            shutil.rmtree(folder)
    except OSError as error:
        raise cannot_write(f'to {out}', error) from error
    if not lmdb:
        say(f'wrote {finals[0]}: {len(jobs)} pairs')


@contextmanager
def _workspace(out: Path, settings: dict[str, Any], say: Callable[[str], None]) -> Iterator[Path]:
    """Lock `out` and yield its hidden folder, with the pairs of an interrupted run of the same settings."""
    out.mkdir(parents=True, exist_ok=True)
    folder = out / PARTIAL
    with locked(out, out):
        if folder.exists() and read_json(folder / SETTINGS) != settings:
            shutil.rmtree(folder)
            say(f'removed what an interrupted run of other settings left in {folder}')
        folder.mkdir(exist_ok=True)
        text = json.dumps(settings, indent=1)
        write_text(text, folder / SETTINGS)
        yield folder


def _make_all(recipe: Recipe, jobs: Sequence[Job], folder: Path, workers: int) -> dict[str, Any]:
    """Make the pairs that are missing; return the information on all of them, by key."""
    info = folder / INFO
    if not info.is_dir():
        for side in SIDES.values():
            (folder / PAIRS / side).mkdir(parents=True, exist_ok=True)
        info.mkdir()
    for unfinished in folder.rglob('*.part*'):
        unfinished.unlink(missing_ok=True)
    missing = [job for job in jobs if not (info / f'{job.key}.json').is_file()]
    if missing:
        _make(recipe, missing, folder, min(workers, len(missing)), len(jobs) - len(missing))
    return {job.key: read_json(info / f'{job.key}.json') for job in jobs}


_recipe: Recipe
"""The settings of a worker process."""


def _make(recipe: Recipe, jobs: Sequence[Job], folder: Path, workers: int, done: int) -> None:
    what = 'blurring' if not done else f'blurring ({done} were done)'
    # Forked processes could wait forever for locks that threads of OpenCV held here.
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(workers, context, _start_worker, (recipe,)) as pool:
        try:
            waiting = [pool.submit(partial(_write_pair, folder=folder), job) for job in jobs]
            for future in track(as_completed(waiting), what, len(waiting)):
                future.result()
        except BrokenProcessPool:
            raise UserError('a process was killed, probably for lack of memory; use fewer workers') from None
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker(recipe: Recipe) -> None:
    global _recipe
    Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    cv2.setNumThreads(1)
    _recipe = recipe
    if recipe.source is not None:
        recipe.source.prepare(preload=False)


def _end_with(parent: int) -> None:
    """End this process when its parent has been killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _write_pair(job: Job, folder: Path) -> None:
    sample = _recipe.make(job)
    for image, side in ((sample.lq, 'blur'), (sample.gt, 'sharp')):
        data = cv2.imencode('.png', image[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()
        write_bytes(data, folder / PAIRS / side / f'{job.key}.png')
    text = json.dumps({'image': sample.name, 'length': sample.length})
    write_text(text, folder / INFO / f'{job.key}.json')


def photograph_jobs(kind: str, count: int) -> list[Job]:
    """Jobs for a source of photographs."""
    digits = max(6, len(str(count)))
    return [Job(f'{kind}_{number:0{digits}d}', number) for number in range(count)]


def window_jobs(windows: Sequence[Window], count: int | None, seed: int) -> list[Job]:
    """Jobs for windows: all of them, or a random subset in order."""
    numbers = list(range(len(windows)))
    if count is not None and count < len(windows):
        rng = np.random.default_rng([seed, len(windows)])
        numbers = sorted(rng.choice(len(windows), count, replace=False))
    return [Job(windows[number].key, int(number), windows[number]) for number in numbers]


def photograph_files(root: str | tuple[str, ...], match: str) -> list[Path]:
    """The photographs of a source."""
    return image_files(folders(root), match)
