"""Which files are restored, and where the results go."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsgformer_arch.inference.images import FORMATS
from dsgformer_arch.utils.errors import UserError

SUFFIX = '_deblurred'
"""What is added to a name where no output is given."""

VIDEOS = frozenset(('.mp4', '.mov', '.m4v', '.mkv', '.webm', '.avi', '.mpg', '.mpeg', '.ts', '.mts', '.wmv'))
"""Suffixes of video files."""

STREAM = '-'
"""Standard input or output."""


@dataclass(frozen=True)
class Job:
    """One file to restore.

    Attributes:
        source: path, or `STREAM`.
        target: path, or `STREAM`.
    """

    source: str
    target: str

    @property
    def is_video(self) -> bool:
        """By the source's suffix."""
        return Path(self.source).suffix.lower() in VIDEOS

    @property
    def is_done(self) -> bool:
        """Whether the target is there and no older than the source."""
        try:
            return os.stat(self.target).st_mtime >= os.stat(self.source).st_mtime
        except OSError:
            return False


def plan(
    inputs: Sequence[str],
    out: str | None = None,
    suffix: str | None = None,
    shard: tuple[int, int] | None = None,
) -> list[Job]:
    """The jobs for what a person named, in order.

    Args:
        inputs: files, folders (searched for images and videos), patterns with `*`, or `STREAM`.
        out: for one file, a file or a folder; otherwise a folder, in which a folder's tree is repeated.
            By default the results of files lie beside them, those of a folder in a folder beside it.
        suffix: of the images that are written, such as `'.png'`; by default that of the input.
        shard: (i, n) with i from 1 to n: every n-th job, from the i-th on.

    Raises:
        UserError: nothing to restore; a result would lie where an input or another result lies.
    """
    found: list[tuple[str, str]] = []  # a file, and where its result goes
    one_file = len(inputs) == 1 and inputs[0] != STREAM and os.path.isfile(inputs[0])
    folder = out is not None and not (one_file or list(inputs) == [STREAM])
    if out is not None and (os.path.isdir(out) or out.endswith(('/', os.sep))):
        folder = True
    if folder and out is not None and os.path.isfile(out):
        raise UserError(f'-o {out} is a file; name a folder for the results of several inputs')
    if out == STREAM and not (one_file or list(inputs) == [STREAM]):
        raise UserError('-o - takes the result of one image; name a folder with -o for several')
    for given in inputs:
        if given == STREAM:
            if len(inputs) > 1:
                raise UserError('- (standard input) is the only input where it is given')
            if folder:
                raise UserError(f'-o {out} is a folder; name a file for the result of standard input')
            found.append((STREAM, out or STREAM))
            continue
        if os.path.isdir(given):
            root = out if out is not None else os.path.normpath(given) + SUFFIX
            found += [
                (path, os.path.join(root, _renamed(os.path.relpath(path, given), suffix)))
                for path in _below(given, root)
            ]
            continue
        for path in [given] if os.path.exists(given) else _matches(given):
            if out is None:
                base, end = os.path.splitext(_renamed(path, suffix))
                if not _is_result(path):
                    found.append((path, base + SUFFIX + end))
            elif folder:
                found.append((path, os.path.join(out, _renamed(os.path.basename(path), suffix))))
            else:
                found.append((path, out))
    jobs = [Job(source, target) for source, target in dict.fromkeys(found)]
    if not jobs:
        raise UserError(f'no image or video in {", ".join(inputs)}')
    _check(jobs)
    return jobs if shard is None else jobs[shard[0] - 1 :: shard[1]]


def _renamed(path: str, suffix: str | None) -> str:
    base, end = os.path.splitext(path)
    return path if suffix is None or end.lower() in VIDEOS else base + suffix


def _below(folder: str, results: str) -> Iterator[str]:
    """Images and videos below a folder, sorted; not those below the folder of the results."""
    skipped = os.path.realpath(results)
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(
            name for name in folders if os.path.realpath(os.path.join(parent, name)) != skipped
        )
        for name in sorted(names):
            end = os.path.splitext(name)[1].lower()
            if (end in FORMATS or end in VIDEOS) and not name.startswith('.'):
                yield os.path.join(parent, name)


def _matches(pattern: str) -> list[str]:
    matches = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not matches:
        if glob.has_magic(pattern):
            raise UserError(f'no file matches {pattern}')
        raise UserError(f'{pattern}: there is no such file or folder')
    return matches


def _is_result(path: str) -> bool:
    """Whether a file is the result of an earlier call: `x_deblurred.jpg` beside an `x.…`."""
    base = os.path.splitext(path)[0]
    if not base.endswith(SUFFIX):
        return False
    return bool(glob.glob(glob.escape(base[: -len(SUFFIX)]) + '.*'))


def _check(jobs: Sequence[Job]) -> None:
    sources = {os.path.realpath(job.source): job.source for job in jobs if job.source != STREAM}
    targets: dict[str, str] = {}
    for job in jobs:
        if job.target == STREAM:
            continue
        end = os.path.splitext(job.target)[1].lower()
        if job.is_video:
            if end not in VIDEOS:
                raise UserError(
                    f'{job.target}: the result of the video {job.source} is a video; call it *.mp4'
                )
        elif end not in FORMATS:
            raise UserError(
                f'{job.target}: the format is told from the name; end it with {", ".join(FORMATS)}'
            )
        place = os.path.realpath(job.target)
        if place in sources:
            raise UserError(f'{job.target} is an input and is not overwritten; name another output with -o')
        if place in targets:
            raise UserError(
                f'{targets[place]} and {job.source} would both be written to {job.target}; restore them into '
                'folders of their own'
            )
        targets[place] = job.source
