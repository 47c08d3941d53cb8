"""Runs of consecutive video frames, one folder each."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsgformer_arch.data.image_files import read_image
from dsgformer_arch.data.prepare.blur.array_cache import ArrayCache
from dsgformer_arch.data.prepare.layouts import IMAGE_SUFFIXES
from dsgformer_arch.utils.errors import UserError


def frame_files(folder: Path) -> list[Path]:
    """The images of one folder in the order of their names."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


class FrameFolders:
    """Folders of frames by number, and their frames.

    Args:
        root: the folder of the folders, or one that holds frames itself.
        match: pattern of the folders' names.
        least: runs with fewer frames are left out.
        memory: megabytes for decoded frames.
        preload: read those that fit now; else when they are first asked for.

    Raises:
        UserError: there is no run that is long enough, or an image cannot be decoded.
    """

    def __init__(self, root: Path, match: str, least: int, memory: float, preload: bool = True) -> None:
        if not root.is_dir():
            raise UserError(f'{root} is not a folder; give one whose subfolders hold consecutive frames')
        runs = {folder: frame_files(folder) for folder in (root, *sorted(root.iterdir())) if folder.is_dir()}
        self._runs = {
            folder: files
            for folder, files in runs.items()
            if len(files) >= least and (folder == root or fnmatch(folder.name, match))
        }
        if not self._runs:
            raise UserError(f'{root} has no folder that matches {match!r} with at least {least} frames')
        self._folders = list(self._runs)
        self._cache: ArrayCache[Path] = ArrayCache(read_image, memory)
        if preload:
            self._cache.fill((path for files in self._runs.values() for path in files), 'reading frames')

    def __len__(self) -> int:
        return len(self._folders)

    def name(self, run: int) -> str:
        return self._folders[run].name

    def count(self, run: int) -> int:
        """How many frames a run has."""
        return len(self._runs[self._folders[run]])

    def frame(self, run: int, number: int) -> NDArray[np.uint8]:
        """A frame, uint8 RGB (H, W, 3)."""
        return self._cache[self._runs[self._folders[run]][number]]
