"""A crop by libvips is a part of OpenCV's image; what libvips may not read is left to OpenCV."""

from __future__ import annotations

import multiprocessing
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from dsgformer_arch.data import png_crop
from dsgformer_arch.data.paired_crop_dataset import PairedCropDataset
from tests.data.test_paired_crop_dataset import options
from tests.trees import random_image, write_pairs

pytest.importorskip('pyvips', reason="libvips is not installed: pip install 'pyvips[binary]'")


def _png(image: NDArray[np.generic], *settings: int) -> bytes:
    return cv2.imencode('.png', image, settings)[1].tobytes()


def _chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, 'big') + kind + content + zlib.crc32(kind + content).to_bytes(4, 'big')


@pytest.mark.parametrize(('top', 'left'), [(0, 0), (24, 41), (48, 64), (13, 0)])
@pytest.mark.parametrize(
    'settings', [(), (cv2.IMWRITE_PNG_COMPRESSION, 0), (cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_PAETH)]
)
def test_equals_opencv(top: int, left: int, settings: tuple[int, ...]) -> None:
    image = random_image(0, 64, 80)
    crop = png_crop.read_crop(memoryview(_png(image, *settings)), top, left, 16)
    assert crop is not None
    np.testing.assert_array_equal(crop, image[top : top + 16, left : left + 16, ::-1])


def test_gamma_and_a_transparent_colour_change_nothing() -> None:
    image = random_image(1, 64, 64)
    stored = _png(image)
    head, body = stored[:33], stored[33:]
    for kind, content in ((b'gAMA', (100000).to_bytes(4, 'big')), (b'tRNS', bytes(6))):
        marked = head + _chunk(kind, content) + body
        expected = cv2.imdecode(np.frombuffer(marked, np.uint8), cv2.IMREAD_COLOR)[8:24, 8:24, ::-1]
        crop = png_crop.read_crop(marked, 8, 8, 16)
        assert crop is not None
        np.testing.assert_array_equal(crop, expected)


def test_what_is_no_plain_png_is_left_to_opencv() -> None:
    image = random_image(2, 64, 64)
    others = {
        'grey': _png(image[..., 0]),
        '16 bits': _png(image.astype(np.uint16) * 257),
        'alpha': _png(np.dstack([image, image[..., 0]])),
        'JPEG': cv2.imencode('.jpg', image)[1].tobytes(),
        'empty': b'',
        'truncated': _png(image)[:400],
    }
    for name, stored in others.items():
        assert png_crop.read_crop(stored, 0, 0, 32) is None, name


def test_what_lies_below_the_crop_is_not_read() -> None:
    stored = _png(random_image(3, 512, 64), cv2.IMWRITE_PNG_COMPRESSION, 1)
    cut = stored[: len(stored) // 2]
    crop, whole = (png_crop.read_crop(data, 0, 0, 16) for data in (cut, stored))
    assert crop is not None
    assert whole is not None
    np.testing.assert_array_equal(crop, whole)


def _in_child() -> bool:
    """Whether a child of a process that uses libvips goes without it."""
    return png_crop.read_crop(_png(random_image(0, 32, 32)), 0, 0, 16) is None


def test_a_fork_of_its_user_goes_without() -> None:
    assert png_crop.read_crop(_png(random_image(0, 32, 32)), 0, 0, 16) is not None
    with multiprocessing.get_context('fork').Pool(1) as pool:
        assert pool.apply_async(_in_child).get(timeout=60)


def test_the_data_set_uses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pairs(tmp_path, 'train', 1)
    monkeypatch.setattr(cv2, 'imdecode', None)
    assert PairedCropDataset(options(tmp_path))[0]['gt'].shape == (3, 16, 16)
