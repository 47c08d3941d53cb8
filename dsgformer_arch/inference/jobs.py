"""Inputs and outputs: which files are restored, and where the results are written."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsgformer_arch.inference.images import FORMATS
from dsgformer_arch.utils.errors import UserError

SUFFIX = '_deblurred'
"""Appended to the name of an input where no output is given."""

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
        """Whether the target exists and is not older than the source."""
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
    """The jobs for the inputs of a command line, in order.

    Args:
        inputs: files, folders (searched for images and videos), patterns with `*`, or `STREAM`.
        out: for one file, a file or a folder; otherwise a folder, in which the tree of an input folder is
            repeated.  By default the results of files are written next to them, those of a folder to a
            folder next to it.
        suffix: of the images that are written, such as `'.png'`; by default that of the input.
        shard: (i, n) with i from 1 to n: every n-th job, from the i-th on.

    Raises:
        UserError: nothing to restore, or a result would overwrite an input or another result.
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
            tree = Tree(given, out if out is not None else os.path.normpath(given) + SUFFIX, suffix)
            for path in tree.paths():
                job = tree.job(path)
                found.append((job.source, job.target))
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


@dataclass(frozen=True)
class Tree:
    """A folder tree and the folder for its results, for more files than `plan` can hold in memory.

    Attributes:
        folder: of the inputs.
        out: folder of the results.
        suffix: of the images that are written, such as `'.png'`; by default that of the input.
        listed: text file with one path below `folder` in each line; by default all images and videos there.
    """

    folder: str
    out: str
    suffix: str | None = None
    listed: str | None = None

    def paths(self) -> Iterator[str]:
        """Iterate over the inputs, relative to `folder`, in order; folders are listed lazily."""
        if self.listed is None:
            for path in _below(self.folder, self.out):
                yield os.path.relpath(path, self.folder)
            return
        with open(self.listed, encoding='utf-8') as file:
            for number, line in enumerate(file, 1):
                path = line.rstrip('\r\n')
                if path.strip():
                    yield self._below_folder(path, f'{self.listed}, line {number}')

    def job(self, path: str) -> Job:
        """The job of an input that `paths` named."""
        return Job(os.path.join(self.folder, path), os.path.join(self.out, _renamed(path, self.suffix)))

    def checked_paths(self) -> Iterator[str]:
        """Like `paths`, each once.

        Takes memory for the files of one folder at a time, and about 150 bytes for each line of a list.

        Raises:
            UserError: two inputs have the same result, or a result would overwrite an input.
        """
        folder, out = os.path.realpath(self.folder), os.path.realpath(self.out)
        if os.path.exists(self.out) and not os.path.isdir(self.out):
            raise UserError(f'{self.out} is a file; name a folder for the results')
        if inside(folder, out):
            raise UserError(f'{self.folder} is inside {self.out}; name another folder for the results')
        seen: dict[int, int] = {}  # hashes of target and source; whole paths would take gigabytes
        parent = None
        for path in self.paths():
            if self.listed is None:
                if os.path.dirname(path) != parent:
                    parent = os.path.dirname(path)
                    seen.clear()
            elif inside(os.path.join(folder, path), out):
                raise UserError(f'{path} in {self.listed} is inside {self.out}; results are not inputs')
            target = hash(_renamed(path, self.suffix))
            if target not in seen:
                seen[target] = hash(path)
                yield path
            elif seen[target] != hash(path):
                job = self.job(path)
                raise UserError(
                    f'{job.source} and another input would both be written to {job.target}; leave out '
                    '--format, or restore them into folders of their own'
                )

    def _below_folder(self, path: str, where: str) -> str:
        normal = os.path.normpath(path)
        if os.path.isabs(path) or normal.split(os.sep)[0] == os.pardir:
            raise UserError(f'{where}: {path} is not below {self.folder}, the folder of the list')
        end = os.path.splitext(path)[1].lower()
        if end not in FORMATS and end not in VIDEOS:
            raise UserError(f'{where}: {path} is not an image or video by its name')
        return normal


def inside(path: str, folder: str) -> bool:
    """Whether a path is a folder or inside it; both with symbolic links resolved (`os.path.realpath`)."""
    return path == folder or path.startswith(os.path.join(folder, ''))


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
    """Whether a file is the result of an earlier call: `x_deblurred.jpg` next to an `x.…`."""
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
                f'{job.target}: the format is chosen by the suffix; end it with {", ".join(FORMATS)}'
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
