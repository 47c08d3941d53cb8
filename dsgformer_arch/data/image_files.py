"""Is this PNG or JPEG file whole?  Answered from its structure, without decoding a pixel.

Sources: the PNG specification (W3C, 3rd edition, sections 5.2, 5.3 and 11.2) and ITU-T T.81, annex B.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PNG_SIGNATURE = b'\x89PNG\r\n\x1a\n'
JPEG_START = b'\xff\xd8'
JPEG_END = b'\xff\xd9'

ORIENTATION_TAG = 0x0112
UPRIGHT = 1

# PNG colour types and the channels that OpenCV's IMREAD_UNCHANGED makes of them.
GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
PNG_CHANNELS = {GREY: 1, RGB: 3, PALETTE: 3, GREY_ALPHA: 4, RGB_ALPHA: 4}

SOF_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
STANDALONE_MARKERS = frozenset(range(0xD0, 0xD8)) | {0x01}
EOI, SOS, APP1 = 0xD9, 0xDA, 0xE1


class BadImageError(Exception):
    """The file is no whole image.  The message completes the sentence 'this file …'."""


@dataclass(frozen=True)
class Shape:
    """Height, width in pixels, and channels as `cv2.imdecode(…, IMREAD_UNCHANGED)` would give them."""

    height: int
    width: int
    channels: int

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.height, self.width


def check_image(data: bytes) -> Shape:
    """Check that a PNG or JPEG file is complete and return its shape.

    A PNG must have its signature, a sound IHDR, at least one IDAT, an IEND, and the right CRC-32 in every
    chunk; a JPEG, which carries no check sums, its start and end markers and a sound header between them.
    The kind is told from the content, not from a file name.

    Args:
        data: the file's bytes.

    Raises:
        BadImageError: it is neither, it is truncated or damaged, or its EXIF data turn or mirror it (OpenCV
            obeys that in some read modes only, so blurred and sharp could end up turned differently).
    """
    if not data:
        raise BadImageError('is empty')
    if data.startswith(PNG_SIGNATURE):
        return _check_png(data)
    if data.startswith(JPEG_START):
        return _check_jpeg(data)
    raise BadImageError('is neither PNG nor JPEG; convert it to PNG')


def _check_png(data: bytes) -> Shape:
    view = memoryview(data)
    kinds: set[bytes] = set()
    start = len(PNG_SIGNATURE)
    height = width = colour = 0
    while b'IEND' not in kinds:
        if start + 12 > len(data):
            raise BadImageError('is truncated: it ends before its IEND chunk')
        length, kind = struct.unpack_from('>I4s', data, start)
        body, end = start + 8, start + 12 + length
        if not kinds and (kind, length) != (b'IHDR', 13):
            raise BadImageError('is damaged: it does not begin with an IHDR chunk')
        if end > len(data):
            raise BadImageError(f'is truncated: it ends within the chunk at byte {start}')
        if zlib.crc32(view[start + 4 : end - 4]) != struct.unpack_from('>I', data, end - 4)[0]:
            raise BadImageError(f'is damaged: the check sum of the chunk at byte {start} is wrong')
        if kind == b'IHDR':
            width, height, _, colour = struct.unpack_from('>IIBB', data, body)
        elif kind == b'eXIf':
            _require_upright(data[body : end - 4])
        kinds.add(kind)
        start = end
    if b'IDAT' not in kinds or not (width and height) or colour not in PNG_CHANNELS:
        raise BadImageError('is damaged: it holds no image data or no possible size and colour type')
    transparent = b'tRNS' in kinds and colour != GREY
    return Shape(height, width, PNG_CHANNELS[colour] + (transparent and PNG_CHANNELS[colour] == 3))


def _check_jpeg(data: bytes) -> Shape:
    shape: Shape | None = None
    position = len(JPEG_START)
    while True:
        while data[position : position + 2] == b'\xff\xff':  # fill bytes may precede any marker
            position += 1
        if position + 4 > len(data):
            raise BadImageError('is truncated: it ends within its header')
        if data[position] != 0xFF:
            raise BadImageError(f'is damaged: a marker is missing at byte {position}')
        marker = data[position + 1]
        position += 2
        if marker in STANDALONE_MARKERS:
            continue
        if marker == EOI:
            raise BadImageError('is damaged: it holds no image data')
        length = struct.unpack_from('>H', data, position)[0]
        if length < 2 or position + length > len(data):
            raise BadImageError('is truncated: it ends within its header')
        segment = data[position + 2 : position + length]
        if marker in SOF_MARKERS:
            shape = _jpeg_shape(segment)
        elif marker == APP1 and segment.startswith(b'Exif\0\0'):
            _require_upright(segment)
        position += length
        if marker == SOS:
            break
    if shape is None:
        raise BadImageError('is damaged: its size is not given before its image data')
    # Within entropy-coded data 0xFF stands only before 0x00 or a restart marker, so this is the real end.
    if data.rfind(JPEG_END, position) < 0:
        raise BadImageError('is truncated: it has no end-of-image marker')
    return shape


def _jpeg_shape(frame_header: bytes) -> Shape:
    if len(frame_header) < 6:
        raise BadImageError('is damaged: its frame header is too short')
    height, width, components = struct.unpack_from('>HHB', frame_header, 1)
    if not (height and width and components):
        raise BadImageError('is damaged: its size is given as zero')
    return Shape(height, width, 1 if components == 1 else 3)


def _require_upright(exif_data: bytes) -> None:
    exif = Image.Exif()
    try:
        exif.load(exif_data)
        orientation = exif.get(ORIENTATION_TAG, UPRIGHT)
    except (SyntaxError, ValueError, OSError, struct.error):
        return  # readers ignore EXIF data that they cannot parse
    if orientation != UPRIGHT:
        raise BadImageError(f'has EXIF orientation {orientation}; store its pixels upright')


RAW_HEADER = re.compile(rb'P6\n(\d+) (\d+)\n255\n')
"""Of a PPM as `raw_image` writes it, with width and height: OpenCV, and so BasicSR, reads it too."""


def raw_image(image: NDArray[np.uint8]) -> bytes:
    """An image stored without compression, so that a part of it can be read alone.

    Args:
        image: uint8 BGR (H, W, 3).
    """
    height, width = image.shape[:2]
    return b'P6\n%d %d\n255\n' % (width, height) + np.ascontiguousarray(image[..., ::-1]).tobytes()
