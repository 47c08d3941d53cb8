"""A crop of a PNG, decoding no row below it.

libvips reads a PNG from the top and stops after the last row that is needed; OpenCV
decodes the whole image.  Optional: `pip install 'pyvips[binary]'`.
"""

from __future__ import annotations

import os
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

PLAIN_RGB = b'\x08\x02\x00\x00\x00'
"""Of a PNG's header, from byte 24: 8 bits, RGB, the one compression and filter method, not interlaced."""
HEADER_END = 29


def read_crop(stored: Any, top: int, left: int, side: int) -> NDArray[np.uint8] | None:
    """Decode a square of an image.

    Args:
        stored: the bytes of a file, as any buffer.
        top, left, side: the square, inside the image.

    Returns:
        (side, side, 3), RGB; None where only OpenCV can tell: without libvips, for anything but a PNG of
        8-bit RGB, and for one that is damaged above the square's lower edge.
    """
    header = bytes(stored[:HEADER_END])
    if header[1:4] != b'PNG' or header[-len(PLAIN_RGB) :] != PLAIN_RGB:
        return None
    vips = library()
    if vips is None:
        return None
    try:
        image = vips.Image.new_from_buffer(bytes(stored), '', access='sequential', fail_on='error')
        pixels: NDArray[np.uint8] = image.crop(left, top, side, side).numpy()
    except vips.Error:
        return None
    # A transparent colour (tRNS) makes a fourth channel, which IMREAD_COLOR drops as well.
    return pixels[..., :3]


def library() -> ModuleType | None:
    """pyvips, where it is installed and may be used in this process."""
    return _library(os.getpid())


@cache
def _library(process: int) -> ModuleType | None:
    """libvips for this process; its threads do not survive a fork, so a child of its user goes without."""
    global _user
    if _user not in (None, process):
        return None
    os.environ.setdefault('VIPS_CONCURRENCY', '1')  # a loader's processes are the parallel ones
    try:
        import pyvips
    except (ImportError, OSError):
        return None
    _user = process
    pyvips.cache_set_max(0)
    return pyvips


_user: int | None = None
"""The process that has loaded libvips, as its children see it."""
