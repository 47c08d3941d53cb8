"""Display levels and linear light."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from dsgformer_arch.data.prepare.blur.response import response
from dsgformer_arch.utils.errors import UserError
from tests.trees import SHARED

GOPRO = SHARED / 'data' / 'train' / 'gopro6_inverse_crf.npy'
LEVELS = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, 2)


def table(path: Path, exponent: float = 2.0) -> np.ndarray:
    """A made-up inverse response, as OpenCV estimates them: blue first, with an offset and noise."""
    curve = ((np.arange(256) + 3) / 258)[:, None] ** np.array([exponent, exponent * 1.1, exponent * 1.2]) * 40
    curve[100] = curve[98]  # noise lets it fall
    curve[254:] *= 5  # the end is unreliable
    np.save(path, curve[:, None].astype(np.float32))
    return curve


@pytest.mark.parametrize('name', ['srgb', 'linear', 'gamma2.2', 'gamma1.8', 'table'])
def test_every_level_comes_back(name: str, tmp_path: Path) -> None:
    if name == 'table':
        name = str(tmp_path / 'camera.npy')
        table(tmp_path / 'camera.npy')
    curve = response(name)
    linear = curve.to_linear(LEVELS)
    assert linear.dtype == np.float32
    np.testing.assert_array_equal(curve.to_display(linear), LEVELS)
    assert (np.diff(linear[0], axis=0) > 0).all()


def test_srgb_is_the_standards() -> None:
    linear = response('srgb').to_linear(LEVELS)[0, :, 1]
    # IEC 61966-2-1 by hand: the linear part, a value of the curved part, and white.
    assert linear[10] == pytest.approx(10 / 255 / 12.92, rel=1e-6)
    assert linear[188] == pytest.approx(((188 / 255 + 0.055) / 1.055) ** 2.4, rel=1e-6)
    assert linear[255] == 1


def test_levels_are_rounded_in_display_space_and_saturate() -> None:
    curve = response('gamma2.0')
    between = np.array([100.49, 100.51, 300.0, -5.0]) / 255
    light = np.float32(np.sign(between) * between**2)[None, :, None].repeat(3, 2)
    np.testing.assert_array_equal(curve.to_display(light)[0, :, 0], [100, 101, 255, 0])


def test_tables_are_blue_first_and_scaled_at_mid_grey(tmp_path: Path) -> None:
    estimated = table(tmp_path / 'camera.npy')
    levels = response(str(tmp_path / 'camera.npy')).levels
    grey = ((128 / 255 + 0.055) / 1.055) ** 2.4
    np.testing.assert_allclose(levels[128], grey, rtol=1e-6)
    expected = (estimated - estimated[0])[:, ::-1]
    expected = expected / expected[128] * grey
    for level in (1, 50, 99, 101, 200, 250):
        np.testing.assert_allclose(levels[level], expected[level], rtol=1e-5)
    assert (levels[255] < 1.2 * levels[250]).all(), 'the unreliable end is kept'


def test_the_gopro_table_keeps_neutral_highlights_neutral() -> None:
    if not GOPRO.is_file():
        pytest.skip(f'the camera response is not at {GOPRO}')
    curve = response(str(GOPRO))
    np.testing.assert_array_equal(curve.to_display(curve.to_linear(LEVELS)), LEVELS)
    # A white pixel that moves over a grey one during half of the exposure.
    linear = curve.to_linear(LEVELS)
    mixed = curve.to_display((linear[:, 255:] + linear[:, 128:129]) / 2)[0, 0]
    assert np.ptp(mixed.astype(int)) <= 4


@pytest.mark.parametrize(
    ('name', 'sentence'),
    [
        ('rgb', "'rgb' is not a camera response"),
        ('gamma', "'gamma' is not a camera response"),
        ('gamma-1', 'is not a camera response'),
        ('nowhere.npy', 'cannot read the camera response nowhere.npy'),
        ('small.npy', 'should hold 256 × 3 numbers'),
        ('flat.npy', 'its values should rise'),
        ('image.npy', 'cannot read the camera response'),
    ],
)
def test_files_other_than_a_response_are_reported(
    name: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save('small.npy', np.zeros((3, 256)))
    np.save('flat.npy', np.ones((256, 3)))
    Path('image.npy').write_bytes(cv2.imencode('.png', LEVELS)[1].tobytes())
    with pytest.raises(UserError, match=sentence):
        response(name)
