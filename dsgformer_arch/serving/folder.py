"""The temporary folder of a server, the only one that it writes to."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SPARE = 500_000_000
"""Bytes that uploads leave free on the disk."""


class ServerFolder:
    """A temporary folder for uploads and results.

    `jobs` has a folder for each image that is being restored.  `page` holds the files that the page shows and
    offers for download; old ones are swept.

    Args:
        root: an empty folder.
        most_bytes: size of the folder from which on new uploads are refused.
    """

    def __init__(self, root: Path, most_bytes: int) -> None:
        self.root, self.most_bytes = root.resolve(), most_bytes
        self.jobs, self.page = self.root / 'jobs', self.root / 'page'
        for folder in (self.jobs, self.page):
            folder.mkdir()

    @contextmanager
    def job(self) -> Iterator[Path]:
        """A folder for one image; it is removed at the end of the `with` statement."""
        folder = self.new_job()
        try:
            yield folder
        finally:
            remove(folder)

    def new_job(self) -> Path:
        """A folder for one image; call `remove` when it is finished."""
        return Path(tempfile.mkdtemp(dir=self.jobs))

    def shown(self) -> Path:
        """A new folder for files of the page; they are swept."""
        return Path(tempfile.mkdtemp(dir=self.page))

    def contains(self, path: str) -> bool:
        """Whether a path, with links resolved, is below the folder of the page."""
        try:
            return Path(path).resolve().is_relative_to(self.page)
        except (OSError, ValueError, RuntimeError):
            return False

    def is_full(self) -> bool:
        """Whether it holds `most_bytes` or more, or the disk is nearly full."""
        if shutil.disk_usage(self.root).free < SPARE:
            return True
        return sum(size for _, size, _ in _files(self.root)) >= self.most_bytes

    def sweep(self, seconds: float) -> None:
        """Remove files of the page that were last changed more than `seconds` ago, and empty folders."""
        oldest = time.time() - seconds
        for path, _, changed in list(_files(self.page)):
            if changed < oldest:
                with contextlib.suppress(OSError):
                    os.remove(path)
        for folder in [Path(entry) for entry in self.page.iterdir() if entry.is_dir()]:
            with contextlib.suppress(OSError):  # still has files, or is gone
                if folder.stat().st_mtime < oldest:
                    folder.rmdir()


def remove(folder: Path) -> None:
    """Remove a folder and its content, if it exists."""
    shutil.rmtree(folder, ignore_errors=True)


def _files(folder: Path) -> Iterator[tuple[str, int, float]]:
    """Path, bytes and time of the last change of each file below a folder."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            with contextlib.suppress(OSError):
                status = os.stat(path, follow_symlinks=False)
                yield path, status.st_size, max(status.st_mtime, status.st_ctime)
