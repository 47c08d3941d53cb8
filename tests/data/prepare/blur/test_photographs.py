"""Photographs are reduced by an area filter, in linear light."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from dsgformer_arch.data.image_files import read_image
from dsgformer_arch.data.prepare.blur.photographs import Photographs, Reduction, reduce_photograph
from dsgformer_arch.data.prepare.blur.response import response
from dsgformer_arch.utils.errors import UserError


def test_a_reduced_pixel_is_the_mean_light_of_its_area() -> None:
    image = np.random.default_rng(0).integers(0, 256, (12, 15, 3), dtype=np.uint8)
    small = reduce_photograph(image, Reduction(least=3, longest_side=0), 'srgb')
    light = response('srgb').to_linear(image).astype(np.float64)
    expected = light.reshape(4, 3, 5, 3, 3).mean((1, 3)) * 65535
    assert small.dtype == np.uint16
    assert np.abs(small - expected).max() < 1.01
    # The mean of display levels is another one: black and white give 188, not 128.
    stripes = np.zeros((4, 4, 3), np.uint8)
    stripes[:, ::2] = 255
    half = reduce_photograph(stripes, Reduction(least=2), 'srgb').astype(np.float32) / 65535
    assert (response('srgb').to_display(half) == 188).all()


@pytest.mark.parametrize(
    ('reduction', 'size', 'expected'),
    [
        (Reduction(), (4000, 6000), (1280, 1920)),
        (Reduction(), (800, 1200), (400, 600)),
        (Reduction(least=1, longest_side=0), (801, 1201), (801, 1201)),
        (Reduction(least=1, longest_side=600), (800, 1200), (400, 600)),
        (Reduction(least=1.5, longest_side=0), (90, 30), (60, 20)),
    ],
)
def test_sizes(reduction: Reduction, size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert reduction.size(*size) == expected
    image = np.zeros((*size, 3), np.uint8)
    assert reduce_photograph(image, reduction, 'srgb').shape == (*expected, 3)


def test_jpeg_artefacts_vanish() -> None:
    """Reducing by 3 removes most of the error that JPEG leaves; a network would learn it otherwise."""
    rng = np.random.default_rng(1)
    grey = cv2.GaussianBlur(rng.uniform(0, 255, (240, 240)), (0, 0), 2)
    grey = cv2.normalize(grey, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)
    image = grey[..., None].repeat(3, 2)
    coded = cv2.imdecode(cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, 60])[1], cv2.IMREAD_COLOR)
    errors = []
    for least in (1, 3):
        how = Reduction(least, 0)
        a, b = (reduce_photograph(x, how, 'linear').astype(np.float64) for x in (image, coded))
        errors.append(np.sqrt(np.mean((a - b) ** 2)))
    assert errors[1] < 0.6 * errors[0]


def test_photographs_are_found_in_order_and_kept_as_far_as_memory_goes(tmp_path: Path) -> None:
    for name, value in (('b/2.jpg', 20), ('a/1.png', 10), ('a/0.png', 30)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / name), np.full((64, 64, 3), value, np.uint8))
    (tmp_path / 'a' / 'notes.txt').write_text('no image')
    one = 32 * 32 * 3 * 2 / 2**20
    found = Photographs([tmp_path], camera='linear', memory=1.5 * one)
    assert [path.name for path in found.files] == ['0.png', '1.png', '2.jpg']
    assert found[0] is found[0]
    assert found[1] is not found[1]
    assert found[1][0, 0, 0] == 10 * 257
    assert len(Photographs([tmp_path], match='*.jpg')) == 1


def test_a_broken_photograph_is_named(tmp_path: Path) -> None:
    (tmp_path / 'x.jpg').write_bytes(b'nothing')
    with pytest.raises(UserError, match=r'x\.jpg cannot be decoded; remove or replace it'):
        Photographs([tmp_path])


def test_a_truncated_jpeg_is_refused(tmp_path: Path) -> None:
    """OpenCV would fill what it lacks with grey, which would be learnt as sharp."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    whole = cv2.imencode('.jpg', noise)[1].tobytes()
    (tmp_path / 'x.jpg').write_bytes(whole[: len(whole) // 2])
    assert cv2.imread(str(tmp_path / 'x.jpg')) is not None
    with pytest.raises(UserError, match=r'x\.jpg is truncated.*; remove or replace it'):
        Photographs([tmp_path])


def test_a_rotated_photograph_is_read_upright(tmp_path: Path) -> None:
    image = Image.fromarray(np.full((32, 64, 3), 99, np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # 90° clockwise
    image.save(tmp_path / 'x.jpg', exif=exif)
    assert read_image(tmp_path / 'x.jpg').shape == (64, 32, 3)
