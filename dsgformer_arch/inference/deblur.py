"""Restore files: the next image is read and the last one written while the network computes."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np

from dsgformer_arch.inference.images import FORMATS, ImageFile, Output, Pixels, open_image
from dsgformer_arch.inference.jobs import STREAM, Job
from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.progress import Stages
from dsgformer_arch.utils.text import one_line

if TYPE_CHECKING:
    from dsgformer_arch.inference.deblurrer import Deblurrer

COMPARISON = '_compare.jpg'
"""Replaces the suffix of a result in the name of its side-by-side image."""

LARGEST_COMPARISON = 100_000_000
"""Pixels; no side-by-side image is written of larger images."""


@dataclass
class Result:
    """The result of a job.

    Attributes:
        input, output: paths.
        status: `'restored'`, `'skipped'` (done before) or `'failed'`.
        seconds: of restoring, without reading and writing.
        network_seconds: of these, the forward passes alone.
        megapixels: restored.
        frames: of a video.
        error: one sentence, where it failed.
        notes: sentences about what did not go as asked.
    """

    input: str
    output: str
    status: str = 'restored'
    seconds: float = 0.0
    network_seconds: float = 0.0
    megapixels: float = 0.0
    frames: int = 0
    error: str = ''
    notes: list[str] = field(default_factory=list)


def deblur(
    jobs: Sequence[Job],
    make: Callable[[], Deblurrer],
    *,
    force: bool = False,
    compare: bool = False,
    as_json: bool = False,
) -> list[Result]:
    """Restore files; one that fails does not stop the others.

    Args:
        jobs: see `plan`.
        make: makes the restorer; called once, while the first image is read, and only if it is needed.
        force: also restore files whose result is up to date.
        compare: also write a side-by-side image for each result.
        as_json: print one JSON object for each file on standard output.

    Returns:
        One result for each job.

    Raises:
        UserError: from `make`.
    """
    wanted = [job for job in jobs if force or not job.is_done]
    results = {job: Result(job.source, job.target, 'skipped') for job in jobs}
    if as_json:
        for job in jobs:
            if job not in wanted:
                _print(results[job])
    progress = Stages('deblurring', len(wanted))
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        upcoming = [reader.submit(_read, job) for job in wanted[:1]]
        restorer = make() if wanted else None
        pending: list[Future[None]] = []
        try:
            for number, job in enumerate(wanted):
                assert restorer is not None
                upcoming += [reader.submit(_read, job) for job in wanted[number + 1 : number + 2]]
                result = results[job] = Result(job.source, job.target)
                finish = _attempt(_restored, result, restorer, job, upcoming.pop(0), compare, progress)
                if len(pending) > 1:
                    pending.pop(0).result()
                pending.append(writer.submit(_finish, finish, result, as_json))
                progress.next()
            for written in pending:
                written.result()
        except BaseException:
            reader.shutdown(wait=False, cancel_futures=True)
            writer.shutdown(wait=False, cancel_futures=True)
            raise
    return [results[job] for job in jobs]


@dataclass
class Tally:
    """How many files were restored, skipped and failed.

    Attributes:
        restored, skipped, failed: numbers of files.
        megapixels: restored.
    """

    restored: int = 0
    skipped: int = 0
    failed: int = 0
    megapixels: float = 0.0

    def add(self, status: str, megapixels: float) -> None:
        """Count a file; `status` is that of a `Result`."""
        setattr(self, status, getattr(self, status) + 1)
        self.megapixels += megapixels

    def summary(self, seconds: float) -> str:
        """One line: the counts, and how fast."""
        parts = [f'restored {self.restored}']
        if self.skipped:
            parts.append(f'skipped {self.skipped} done before (--force restores them again)')
        if self.failed:
            parts.append(f'failed {self.failed}')
        speed = ''
        if self.megapixels:
            speed = f', {self.megapixels:.1f} megapixels, {self.megapixels / seconds:.2f} a second'
        return f'{", ".join(parts)} in {timedelta(seconds=round(seconds))}{speed}'


def summary(results: Iterable[Result], seconds: float) -> str:
    """One line: how many files were restored, skipped and failed, and how fast."""
    tally = Tally()
    for result in results:
        tally.add(result.status, result.megapixels)
    return tally.summary(seconds)


def _read(job: Job) -> ImageFile | None:
    """The image of a job, decoded; None for a video."""
    if job.is_video:
        return None
    if job.source == STREAM:
        return open_image(sys.stdin.buffer.read(), 'standard input')
    return open_image(job.source)


def _attempt(call: Callable[..., Any], result: Result, *arguments: Any) -> Any:
    """Call; where it raises, record the failure in the result."""
    try:
        return call(result, *arguments)
    except UserError as error:
        result.error = str(error)
    except MemoryError:
        result.error = f'{result.input}: not enough memory; give a smaller --tile'
    except OSError as error:
        where = error.filename or result.output
        result.error = f'{where}: {one_line(error)}'
    except Exception as error:  # one file must not end the work on the others
        result.error = f'{result.input}: {type(error).__name__}: {one_line(error)}'
    result.status = 'failed'
    return None


def _finish(finish: Callable[[], None] | None, result: Result, as_json: bool) -> None:
    if finish is not None:
        _attempt(lambda _: finish(), result)
    for note in result.notes:
        print(f'note: {result.input}: {note}', file=sys.stderr, flush=True)
    if result.status == 'failed':
        result.megapixels = 0.0
        print(f'error: {result.error}', file=sys.stderr, flush=True)
    if as_json:
        _print(result)


def _print(result: Result) -> None:
    times = {name: round(getattr(result, name), 3) for name in ('seconds', 'network_seconds')}
    print(json.dumps({**asdict(result), **times}), flush=True)


def _restored(
    result: Result,
    restorer: Deblurrer,
    job: Job,
    reading: Future[ImageFile | None],
    compare: bool,
    progress: Stages,
) -> Callable[[], None] | None:
    """Restore one file; returns a function that encodes and writes the result, None for a video."""
    image = reading.result()
    restorer.report.notes.clear()
    restorer.report.network_seconds = 0.0
    if image is None:
        from dsgformer_arch.inference.video import deblur_video

        deblur_video(restorer, job.source, job.target, result, progress.tick)
        result.network_seconds = restorer.report.network_seconds
        result.notes += restorer.report.notes
        return None
    format = image.format
    if job.target != STREAM:
        format = FORMATS[os.path.splitext(job.target)[1].lower()]
        os.makedirs(os.path.dirname(os.path.abspath(job.target)), exist_ok=True)
    output = Output(image, None if job.target == STREAM else job.target, format)
    shown: list[Pixels] = []
    begun = time.perf_counter()
    try:
        for band in restorer.bands(image.rows, image.size, progress.tick):
            output.write(band)
            if compare:
                shown.append(band)
    except BaseException:
        output.close()
        raise
    result.seconds = time.perf_counter() - begun
    result.network_seconds = restorer.report.network_seconds
    result.megapixels = round(image.size[0] * image.size[1] / 1e6, 6)
    result.notes += [*image.notes, *output.notes, *restorer.report.notes]

    def finish() -> None:
        output.finish()
        if job.target == STREAM:
            sys.stdout.buffer.write(output.content)
            sys.stdout.buffer.flush()
        elif compare:
            _compare(job, np.concatenate(shown), result)

    return finish


def _compare(job: Job, restored: Pixels, result: Result) -> None:
    """Write a side-by-side image of input and result."""
    height, width = restored.shape[:2]
    if height * width > LARGEST_COMPARISON:
        result.notes.append('too large for a side-by-side image')
        return
    image = open_image(job.source)
    both = np.concatenate([image.rows(0, height), restored], axis=1)
    image.size = (height, 2 * width)
    output = Output(image, os.path.splitext(job.target)[0] + COMPARISON, 'JPEG')
    output.write(both)
    output.finish()
