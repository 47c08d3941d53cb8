"""Sharp photographs in linear light, reduced in size to remove JPEG artefacts and softness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from dsgformer_arch.data.image_files import read_image
from dsgformer_arch.data.prepare.blur.array_cache import ArrayCache
from dsgformer_arch.data.prepare.blur.response import response
from dsgformer_arch.data.prepare.blur.shake import LINEAR_WHITE
from dsgformer_arch.data.prepare.layouts import IMAGE_SUFFIXES
from dsgformer_arch.utils.errors import UserError


@dataclass(frozen=True)
class Reduction:
    """The reduction of photographs by an area filter, in linear light.

    Attributes:
        least: both sides are divided by at least this; 1 does not change small images.
        longest_side: upper bound of the longer side in pixels; 0 for no limit.
    """

    least: float = 2.0
    longest_side: int = 1920

    def __post_init__(self) -> None:
        if not isinstance(self.least, (int, float)) or not self.least >= 1:
            raise ValueError(f'least is {self.least!r}, but should be a number of at least 1')
        if not isinstance(self.longest_side, int) or self.longest_side < 0:
            raise ValueError(f'longest_side is {self.longest_side!r}, but should be a number of pixels, or 0')

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of a reduced photograph."""
        factor = max(self.least, max(height, width) / self.longest_side if self.longest_side else 1.0)
        return max(1, int(height / factor)), max(1, int(width / factor))


def image_files(roots: Sequence[Path], match: str = '*') -> list[Path]:
    """Image files below some folders, in order, whose names match a pattern.

    Raises:
        UserError: a folder does not exist, or nothing matches.
    """
    files: list[Path] = []
    for root in roots:
        if not root.is_dir():
            raise UserError(f'{root} is not a folder; give one that holds images')
        files += sorted(
            path
            for path in root.rglob('*')
            if path.suffix.lower() in IMAGE_SUFFIXES and fnmatch(path.name, match) and path.is_file()
        )
    if not files:
        named = ', '.join(str(root) for root in roots)
        raise UserError(f'{named} holds no image that matches {match!r}; give another folder or pattern')
    return files


def reduce_photograph(image: NDArray[np.uint8], reduction: Reduction, camera: str) -> NDArray[np.uint16]:
    """Reduce a photograph in linear light.

    Args:
        image: uint8 RGB (H, W, 3).
        reduction: its settings.
        camera: its response; see `response`.

    Returns:
        uint16 RGB, `LINEAR_WHITE` is the light of level 255.
    """
    curve = response(camera)
    levels = np.rint(curve.levels / curve.white * LINEAR_WHITE).astype(np.uint16)
    linear = cv2.LUT(image, levels[None])
    height, width = reduction.size(*image.shape[:2])
    if (height, width) != image.shape[:2]:
        linear = cv2.resize(linear, (width, height), interpolation=cv2.INTER_AREA)
    return np.asarray(linear, dtype=np.uint16)


class Photographs:
    """Reduced photographs by number.

    Args:
        roots: folders, searched with their subfolders.
        match: pattern of file names.
        reduction: how they are reduced.
        camera: their response; see `response`.
        memory: megabytes for reduced photographs; others are read again each time, which takes about 0.3 s
            for 24 megapixels.
        preload: read those that fit now instead of on demand.

    Raises:
        UserError: there is no image, or one cannot be decoded.
    """

    def __init__(
        self,
        roots: Sequence[Path],
        match: str = '*',
        reduction: Reduction | None = None,
        camera: str = 'srgb',
        memory: float = 2048.0,
        preload: bool = True,
    ) -> None:
        self.files = image_files(roots, match)
        self.reduction = reduction or Reduction()
        self.camera = camera
        # No lambda: a data set has to be picklable to reach workers that are not forked.
        self._cache: ArrayCache[int] = ArrayCache(self._read, memory)
        if preload:
            self._cache.fill(range(len(self.files)), 'reading photographs')

    def _read(self, index: int) -> NDArray[np.uint16]:
        return reduce_photograph(read_image(self.files[index]), self.reduction, self.camera)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> NDArray[np.uint16]:
        return self._cache[index]
