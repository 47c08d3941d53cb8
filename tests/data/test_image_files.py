from __future__ import annotations

import contextlib
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from dsgformer_arch.data.image_files import (
    MAX_PIXELS,
    BadImageError,
    Shape,
    check_image,
    decode,
    decode_bgr,
    header_shape,
    raw_image,
    raw_pixels_of,
    read_file,
)


def noise(height: int, width: int, channels: int = 3, dtype: type = np.uint8) -> NDArray[Any]:
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype=dtype)


def encoded(suffix: str, image: NDArray[Any]) -> bytes:
    return cv2.imencode(suffix, image)[1].tobytes()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))


def png(colour: int, depth: int = 8, before_data: bytes = b'', data: bytes | None = None) -> bytes:
    """A 6x4 PNG put together by hand from the specification."""
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    row = b'\0' + bytes(6 * samples * depth // 8)
    body = zlib.compress(row * 4) if data is None else data
    header = chunk(b'IHDR', struct.pack('>IIBBBBB', 6, 4, depth, colour, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n' + header + before_data + chunk(b'IDAT', body) + chunk(b'IEND', b'')


def png_of_size(side: int) -> bytes:
    """A PNG whose header claims a square of this side; its check sums are right."""
    data = png(2)
    header = chunk(b'IHDR', struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0))
    return data[:8] + header + data[8 + len(header) :]


def jpeg_of_size(side: int) -> bytes:
    """A JPEG whose header claims a square of this side."""
    data = encoded('.jpg', noise(8, 8))
    frame = data.index(b'\xff\xc0')
    return data[: frame + 5] + struct.pack('>HH', side, side) + data[frame + 9 :]


def exif(orientation: int) -> bytes:
    return b'MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1' + struct.pack('>HHI', orientation, 0, 0)


PALETTE = chunk(b'PLTE', b'\1\2\3' * 4)


@pytest.mark.parametrize(
    'data',
    [
        png(0),
        png(0, 16),
        png(0, before_data=chunk(b'tRNS', b'\0\5')),
        png(2),
        png(2, 16),
        png(2, before_data=chunk(b'tRNS', b'\0\5\0\1\0\2')),
        png(3, before_data=PALETTE),
        png(3, before_data=PALETTE + chunk(b'tRNS', b'\1\2')),
        png(4),
        png(6),
        encoded('.jpg', noise(33, 17)),
        encoded('.jpg', noise(33, 17, 1)),
        cv2.imencode('.jpg', noise(40, 50), [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes(),
    ],
)
def test_shape_is_what_opencv_decodes(data: bytes) -> None:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    assert image is not None
    channels = 1 if image.ndim == 2 else image.shape[2]
    assert check_image(data) == Shape(image.shape[0], image.shape[1], channels)


def test_every_single_flipped_byte_of_a_png_is_noticed() -> None:
    data = bytearray(encoded('.png', noise(5, 7)))
    for position in range(len(data)):
        data[position] ^= 0x10
        with pytest.raises(BadImageError):
            check_image(bytes(data))
        data[position] ^= 0x10
    check_image(bytes(data))


@pytest.mark.parametrize('suffix', ['.png', '.jpg'])
def test_every_truncation_is_noticed(suffix: str) -> None:
    data = encoded(suffix, noise(16, 16))
    for length in range(len(data)):
        with pytest.raises(BadImageError):
            check_image(data[:length])
    assert check_image(data) == Shape(16, 16, 3)
    assert check_image(data + b'trailing bytes do no harm') == Shape(16, 16, 3)


@pytest.mark.parametrize(
    ('data', 'reason'),
    [
        (b'', 'is empty'),
        (b'BM not for us', 'neither PNG nor JPEG'),
        (b'\x89PNG\r\n\x1a\n' + chunk(b'IDAT', b'') + chunk(b'IEND', b''), 'first chunk, and no other one'),
        (png(2).replace(chunk(b'IDAT', zlib.compress(bytes(19 * 4))), b''), 'no image data'),
        (b'\xff\xd8\xff\xd9' + bytes(8), 'no image data'),
    ],
)
def test_reasons(data: bytes, reason: str) -> None:
    with pytest.raises(BadImageError, match=reason):
        check_image(data)


def test_no_pixel_is_decoded() -> None:
    """A chunk's check sum says nothing of the compressed stream within: that is for --verify to find."""
    data = png(2, data=b'no zlib stream')
    assert check_image(data) == Shape(4, 6, 3)
    assert cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) is None


def test_rotated_images_are_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp('jpeg') / 'turned.jpg'
    picture = Image.fromarray(noise(8, 12))
    for orientation in (6, 1):
        tags = Image.Exif()
        tags[0x0112] = orientation
        picture.save(path, exif=tags)
        for data in (path.read_bytes(), png(2, before_data=chunk(b'eXIf', exif(orientation)))):
            if orientation == 1:
                check_image(data)
            else:
                with pytest.raises(BadImageError, match='orientation 6'):
                    check_image(data)
    assert check_image(png(2, before_data=chunk(b'eXIf', b'nonsense'))) == Shape(4, 6, 3)


@pytest.mark.parametrize(
    'sloppy',
    [
        b'MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\x40\0\6\0\0\0\0\0\0',
        b'MM\0*\0\0\0\x08\0\1\x01\x12\0\x09\0\0\0\1\0\6\0\0\0\0\0\0',
        b'M\3\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0',
    ],
    ids=['64 values', 'another type', 'no byte order'],
)
def test_whatever_opencv_rotates_is_refused(sloppy: bytes) -> None:
    """Found by fuzzing: a count of 64 values, at which OpenCV does not look."""
    jpeg = encoded('.jpg', noise(8, 12))
    body = b'Exif\0\0' + sloppy
    jpeg = jpeg[:2] + b'\xff\xe1' + struct.pack('>H', len(body) + 2) + body + jpeg[2:]
    decoded = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
    assert decoded is not None
    assert decoded.shape[:2] == (12, 8)
    with pytest.raises(BadImageError, match='orientation 6'):
        check_image(jpeg)


@pytest.mark.parametrize(
    'data',
    [png_of_size(30_000), png_of_size(2**31 - 1), jpeg_of_size(65_500), b'P6\n99999 99999\n255\n' + bytes(9)],
    ids=['png', 'largest png', 'jpeg', 'raw'],
)
def test_sizes_are_bounded_before_anything_is_decoded(data: bytes) -> None:
    """A file of some kilobytes must not take gigabytes (issue 15, item 19)."""
    for read in (check_image, decode, decode_bgr, header_shape):
        with pytest.raises(BadImageError, match=f'between 1 and {MAX_PIXELS}'):
            read(data)


def test_raw_images() -> None:
    image = noise(5, 7)
    data = raw_image(image)
    assert check_image(data) == header_shape(data) == Shape(5, 7, 3)
    np.testing.assert_array_equal(raw_pixels_of(data)[1], image[..., ::-1])
    np.testing.assert_array_equal(decode_bgr(data), image)
    for damaged in (data[:-1], data + b'x', b'P6\n5 7\n15\n' + bytes(105), b'P6\n-5 7\n255\n', b'P6\n'):
        with pytest.raises(BadImageError):
            check_image(damaged)


def test_special_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / 'pipe.png')
    for path in (tmp_path / 'pipe.png', tmp_path, Path('/dev/zero')):
        with pytest.raises(BadImageError, match='not an ordinary file'):
            read_file(path)


WHOLE = {
    'png': encoded('.png', noise(12, 9)),
    'grey png': encoded('.png', noise(12, 9, 1)),
    'jpeg': encoded('.jpg', noise(20, 17)),
    'turned png': png(2, before_data=chunk(b'eXIf', exif(1))),
    'raw': raw_image(noise(6, 5)),
}


@given(
    st.sampled_from(list(WHOLE)),
    st.lists(st.tuples(st.integers(0, 2000), st.binary(max_size=4), st.integers(0, 4)), max_size=4),
    st.integers(0, 40),
)
def test_damaged_images_are_decoded_or_refused(
    kind: str, edits: list[tuple[int, bytes, int]], cut: int
) -> None:
    data = WHOLE[kind]
    for position, new, removed in edits:
        position %= len(data)
        data = data[:position] + new + data[position + removed :]
    data = data[: len(data) - cut]
    for read in (check_image, decode, header_shape):
        found = None
        with contextlib.suppress(BadImageError):
            found = read(data)
        if isinstance(found, np.ndarray):
            assert found.dtype == np.uint8
            assert found.shape[2:] == (3,)


STARTS = [b'', b'\x89PNG\r\n\x1a\n', b'\xff\xd8', b'\xff\xd8\xff\xe1\x00\x20Exif\0\0', b'P6\n']


@given(st.sampled_from(STARTS), st.binary())
def test_any_bytes_are_decoded_or_refused(start: bytes, rest: bytes) -> None:
    for read in (check_image, decode, header_shape):
        with contextlib.suppress(BadImageError):
            read(start + rest)


@pytest.mark.parametrize('second', [b'', b'12345678', struct.pack('>IIBBBBB', 2**20, 2**20, 8, 2, 0, 0, 0)])
def test_a_second_header_is_refused(second: bytes) -> None:
    """Found by fuzzing: a short one ended in struct.error, another one would have given the size."""
    data = png(2, before_data=chunk(b'IHDR', second))
    for read in (check_image, decode):
        with pytest.raises(BadImageError, match='IHDR'):
            read(data)
