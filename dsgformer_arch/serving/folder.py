"""The one folder that a server writes to."""

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
"""Bytes of the disk that uploads leave free."""


class ServerFolder:
    """A temporary folder for uploads and results; nothing of it outlives the server.

    `jobs` has a folder for each image that is being restored; `page` has what the page shows and offers for
    download, and is swept.

    Args:
        root: an empty folder.
        most_bytes: what the folder may hold before new uploads are refused.
    """

    def __init__(self, root: Path, most_bytes: int) -> None:
        self.root, self.most_bytes = root.resolve(), most_bytes
        self.jobs, self.page = self.root / 'jobs', self.root / 'page'
        for folder in (self.jobs, self.page):
            folder.mkdir()

    @contextmanager
    def job(self) -> Iterator[Path]:
        """A folder for one image, removed in the end."""
        folder = self.new_job()
        try:
            yield folder
        finally:
            remove(folder)

    def new_job(self) -> Path:
        """A folder for one image; `remove` it."""
        return Path(tempfile.mkdtemp(dir=self.jobs))

    def shown(self) -> Path:
        """A folder for files that the page offers, until they are swept."""
        return Path(tempfile.mkdtemp(dir=self.page))

    def contains(self, path: str) -> bool:
        """Whether a path lies among the page's files, links resolved."""
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
        """Remove the page's files that were not written or offered anew for so long, and empty folders."""
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
    """Remove a folder and all in it, if it is there."""
    shutil.rmtree(folder, ignore_errors=True)


def _files(folder: Path) -> Iterator[tuple[str, int, float]]:
    """Path, bytes and time of the last change of each file below a folder."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            with contextlib.suppress(OSError):
                status = os.stat(path, follow_symlinks=False)
                yield path, status.st_size, max(status.st_mtime, status.st_ctime)
