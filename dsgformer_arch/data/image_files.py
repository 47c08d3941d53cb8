"""Safe reading of image files that may be damaged or malicious: PNG, JPEG and uncompressed PPM.

`check_image` verifies from a file's structure, without decoding pixels, that it is complete; `decode` checks
the size in the header before it decodes.

Sources: the PNG specification (W3C, 3rd edition, sections 5.2, 5.3 and 11.2) and ITU-T T.81, annex B; the
position of the orientation in EXIF data: TIFF 6.0, section 2, and Exif 2.32, section 4.6.
"""

from __future__ import annotations

import os
import re
import stat
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dsgformer_arch.utils.errors import UserError

PNG_SIGNATURE = b'\x89PNG\r\n\x1a\n'
JPEG_START = b'\xff\xd8'
JPEG_END = b'\xff\xd9'

MAX_PIXELS = 2**28
"""268 megapixels: the largest cameras have 150, and an image of this size takes 0.8 GB as 8-bit RGB."""
MAX_FILE_BYTES = 2**31
"""Of any file or stored value; 268 megapixels of 16-bit RGB are 1.6 GB without compression."""

ORIENTATION_TAG = 0x0112
TIFF_MARK = 42
TURNED = range(2, 9)

# PNG colour types and the channels that OpenCV's IMREAD_UNCHANGED makes of them.
GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
PNG_CHANNELS = {GREY: 1, RGB: 3, PALETTE: 3, GREY_ALPHA: 4, RGB_ALPHA: 4}

SOF_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
STANDALONE_MARKERS = frozenset(range(0xD0, 0xD8)) | {0x01}
EOI, SOS, APP1 = 0xD9, 0xDA, 0xE1


class BadImageError(Exception):
    """The file is not a complete image.  The message completes the sentence 'this file …'."""


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The bytes of an image file.

    Raises:
        BadImageError: it is not an ordinary file (a pipe would never end), or larger than any image.
        OSError: it cannot be read.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise BadImageError('is not an ordinary file')
    if status.st_size > MAX_FILE_BYTES:
        raise BadImageError(f'has {status.st_size} bytes, more than any image that is read here')
    with open(path, 'rb') as file:
        return file.read()


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


def check_image(data: bytes | memoryview, upright: bool = True) -> Shape:
    """Check that a PNG, JPEG or raw file is complete and return its shape.

    A PNG must have its signature, a sound IHDR, at least one IDAT, an IEND, and the right CRC-32 in every
    chunk; a JPEG, which carries no check sums, its start and end markers and a sound header between them; a
    raw image (see `raw_image`) exactly as many bytes as its size asks for.  The kind is detected from the
    content, not from a file name.

    Args:
        data: the file's bytes.
        upright: refuse an image that its EXIF data rotate or mirror.  OpenCV obeys them in some read modes
            only, so a blurred and a sharp image could end up rotated differently.

    Raises:
        BadImageError: it is none of them, truncated, damaged, of more than `MAX_PIXELS`, or not `upright`.
    """
    start = bytes(data[: len(PNG_SIGNATURE)])
    if not start:
        raise BadImageError('is empty')
    if start == PNG_SIGNATURE:
        return _bounded(_check_png(memoryview(data), upright))
    if start.startswith(JPEG_START):
        return _bounded(_check_jpeg(bytes(data), upright))
    if start.startswith(RAW_START):
        return raw_pixels_of(data)[0]
    raise BadImageError('is neither PNG nor JPEG; convert it to PNG')


def decode(data: bytes | memoryview) -> NDArray[np.uint8]:
    """Decode an image to 8-bit RGB, after `check_image`: OpenCV fills what a truncated JPEG lacks with grey.

    Args:
        data: a file's bytes, or an LMDB's buffer.

    Returns:
        (H, W, 3).

    Raises:
        BadImageError: `check_image` or OpenCV refuses it.
    """
    return np.ascontiguousarray(decode_bgr(data)[..., ::-1])


def decode_bgr(data: bytes | memoryview, mode: int = cv2.IMREAD_COLOR) -> NDArray[Any]:
    """As `decode`, in OpenCV's order and with its `mode`: by default uint8 BGR (H, W, 3)."""
    check_image(data)
    return _decoded(data, mode)


def read_image(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """Read one image file, of any format that OpenCV knows, and rotate it as its EXIF data say.

    PNG and JPEG are checked first, as by `check_image`.  For pairs of images, which must not be rotated
    differently, use `decode`.

    Returns:
        uint8 RGB (H, W, 3).

    Raises:
        UserError: there is no such file, or it cannot be read or decoded.
    """
    try:
        data = read_file(path)
        if data.startswith((PNG_SIGNATURE, JPEG_START)):
            check_image(data, upright=False)
        return np.asarray(cv2.cvtColor(_decoded(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB), np.uint8)
    except BadImageError as error:
        raise UserError(f'the image {path} {error}; remove or replace it') from None
    except OSError as error:
        raise UserError(f'the image {path} cannot be read ({error.strerror}); remove or replace it') from None


def _decoded(data: bytes | memoryview, mode: int) -> NDArray[Any]:
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), mode)
    except cv2.error:
        image = None
    if image is None or not image.size:
        raise BadImageError('cannot be decoded')
    return image


def header_shape(data: bytes | memoryview) -> Shape:
    """The size that an image's header gives; three channels are assumed.

    Raises:
        BadImageError: it is not a PNG, JPEG or raw image, has no sound header, or more than `MAX_PIXELS`.
    """
    view = memoryview(data)
    start = bytes(view[:32])
    if not start:
        raise BadImageError('is empty')
    if start.startswith(PNG_SIGNATURE):
        if len(start) < 24:
            raise BadImageError('is truncated: it ends within its header')
        width, height = struct.unpack_from('>II', start, 16)
    elif start.startswith(JPEG_START):
        shape = _jpeg_header(view)[0]
        if shape is None:
            raise BadImageError('is damaged: its size is not given before its image data')
        height, width = shape.size
    elif found := RAW_HEADER.match(start):
        width, height = int(found[1]), int(found[2])
    else:
        raise BadImageError('is neither PNG nor JPEG; convert it to PNG')
    return _bounded(Shape(height, width, 3))


def _bounded(shape: Shape) -> Shape:
    if not 0 < shape.height * shape.width <= MAX_PIXELS:
        raise BadImageError(
            f'has {shape.width}x{shape.height} pixels; between 1 and {MAX_PIXELS} are read here'
        )
    return shape


def _check_png(data: memoryview, upright: bool) -> Shape:
    kinds: set[bytes] = set()
    start = len(PNG_SIGNATURE)
    height = width = colour = 0
    while b'IEND' not in kinds:
        if start + 12 > len(data):
            raise BadImageError('is truncated: it ends before its IEND chunk')
        length, kind = struct.unpack_from('>I4s', data, start)
        body, end = start + 8, start + 12 + length
        if (kind == b'IHDR') == bool(kinds) or (kind == b'IHDR' and length != 13):
            raise BadImageError('is damaged: its first chunk, and no other one, should be a sound IHDR')
        if end > len(data):
            raise BadImageError(f'is truncated: it ends within the chunk at byte {start}')
        if zlib.crc32(data[start + 4 : end - 4]) != struct.unpack_from('>I', data, end - 4)[0]:
            raise BadImageError(f'is damaged: the check sum of the chunk at byte {start} is wrong')
        if kind == b'IHDR':
            width, height, _, colour = struct.unpack_from('>IIBB', data, body)
        elif kind == b'eXIf' and upright:
            _require_upright(bytes(data[body : end - 4]))
        kinds.add(kind)
        start = end
    if b'IDAT' not in kinds or not (width and height) or colour not in PNG_CHANNELS:
        raise BadImageError('is damaged: it holds no image data or no possible size and colour type')
    transparent = b'tRNS' in kinds and colour != GREY
    return Shape(height, width, PNG_CHANNELS[colour] + (transparent and PNG_CHANNELS[colour] == 3))


def _check_jpeg(data: bytes, upright: bool) -> Shape:
    shape, position = _jpeg_header(memoryview(data), upright)
    if shape is None:
        raise BadImageError('is damaged: its size is not given before its image data')
    # Within entropy-coded data 0xFF is followed by 0x00 or a restart marker only, so this is the real end.
    if data.rfind(JPEG_END, position) < 0:
        raise BadImageError('is truncated: it has no end-of-image marker')
    return shape


def _jpeg_header(data: memoryview, upright: bool = True) -> tuple[Shape | None, int]:
    """The size that a JPEG gives before its image data, if it does, and where these begin."""
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
        segment = bytes(data[position + 2 : position + length])
        if marker in SOF_MARKERS:
            shape = _jpeg_shape(segment)
        elif upright and marker == APP1 and segment.startswith(EXIF_START):
            _require_upright(segment[len(EXIF_START) :])
        position += length
        if marker == SOS:
            return shape, position


def _jpeg_shape(frame_header: bytes) -> Shape:
    if len(frame_header) < 6:
        raise BadImageError('is damaged: its frame header is too short')
    height, width, components = struct.unpack_from('>HHB', frame_header, 1)
    if not (height and width and components):
        raise BadImageError('is damaged: its size is given as zero')
    return Shape(height, width, 1 if components == 1 else 3)


def _require_upright(exif: bytes) -> None:
    """Refuse EXIF data by which OpenCV rotates or mirrors the image.

    It asks neither for the type and count of the orientation, nor for a sound name of the byte order.
    """
    order = '<' if exif[:2] == b'II' else '>'
    try:
        mark, start = struct.unpack_from(f'{order}HI', exif, 2)
        if mark != TIFF_MARK:
            return
        for number in range(struct.unpack_from(f'{order}H', exif, start)[0]):
            tag, value = struct.unpack_from(f'{order}H6xH', exif, start + 2 + 12 * number)
            if tag == ORIENTATION_TAG and value in TURNED:
                raise BadImageError(f'has EXIF orientation {value}; store its pixels upright')
    except struct.error:
        return


EXIF_START = b'Exif\0\0'

RAW_START = b'P6\n'
RAW_HEADER = re.compile(rb'P6\n([0-9]{1,6}) ([0-9]{1,6})\n255\n')
"""Of a PPM as `raw_image` writes it, with width and height: OpenCV, and so BasicSR, reads it too."""


def raw_image(image: NDArray[np.uint8]) -> bytes:
    """An image stored without compression, so that a part of it can be read alone.

    Args:
        image: uint8 BGR (H, W, 3).
    """
    height, width = image.shape[:2]
    return b'P6\n%d %d\n255\n' % (width, height) + np.ascontiguousarray(image[..., ::-1]).tobytes()


def raw_pixels_of(data: bytes | memoryview) -> tuple[Shape, NDArray[np.uint8]]:
    """Shape and pixels of an image that `raw_image` stored.

    Args:
        data: its bytes, or an LMDB's buffer.

    Returns:
        The shape, and a view of the data: uint8 RGB (H, W, 3).

    Raises:
        BadImageError: it has another form, or not as many bytes as its size asks for.
    """
    header = RAW_HEADER.match(bytes(data[:32]))
    if header is None:
        raise BadImageError('is damaged: its header is none of an uncompressed image')
    shape = _bounded(Shape(int(header[2]), int(header[1]), 3))
    if len(data) != header.end() + shape.height * shape.width * 3:
        size = f'{shape.width}x{shape.height}'
        raise BadImageError(f'is truncated or damaged: it has {len(data)} bytes for {size} pixels')
    pixels = np.frombuffer(data, np.uint8, offset=header.end())
    return shape, pixels.reshape(shape.height, shape.width, 3)
