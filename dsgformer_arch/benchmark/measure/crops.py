"""The part of an image with the most edges, where blur is most visible; figures show this crop."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

from dsgformer_arch.metrics.metric import Image


class Window(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, image: Image) -> Image:
        """This part of an image (H, W, 3)."""
        return image[self.top : self.top + self.height, self.left : self.left + self.width]


def detail(sharp: Image, height: int, width: int) -> Window:
    """The window with the largest sum of absolute gradients.

    Args:
        sharp: uint8 RGB of shape (H, W, 3).
        height: of the window, cut to the image's.
        width: likewise.
    """
    height, width = min(height, sharp.shape[0]), min(width, sharp.shape[1])
    grey = cv2.cvtColor(sharp, cv2.COLOR_RGB2GRAY).astype(np.float64)
    edges = np.abs(np.gradient(grey, axis=0)) + np.abs(np.gradient(grey, axis=1))
    sums = np.pad(edges.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    inside = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
    top, left = (int(index) for index in np.unravel_index(inside.argmax(), inside.shape))
    return Window(top, left, height, width)
