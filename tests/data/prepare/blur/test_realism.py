"""What a camera adds: noise of the right variance, saturation, colours that come back, demosaicing, JPEG."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest

from dsgformer_arch.data.prepare.blur.realism import (
    PLAIN,
    Camera,
    Realism,
    demosaiced,
    jpeg,
    mosaic,
)
from dsgformer_arch.data.prepare.blur.response import response

SRGB = response('srgb')
WHITE = np.ones(3, np.float32)


def field(value: float, side: int = 256) -> np.ndarray:
    return np.full((side, side, 3), value, np.float32)


@pytest.mark.parametrize('value', [0.0, 0.02, 0.2, 0.8])
def test_noise_has_the_models_variance(value: float) -> None:
    """Within four standard errors of an estimated variance."""
    camera = Camera(shot=3e-3, read=2e-5)
    noisy = camera.sense(field(value), np.random.default_rng(1)).astype(np.float64)
    count = noisy.size
    expected = 3e-3 * value + 2e-5
    assert noisy.var() == pytest.approx(expected, rel=4 * np.sqrt(2 / count))
    assert abs(noisy.mean() - value) < 4 * np.sqrt(expected / count)
    # From pixel to pixel and from channel to channel it is independent.
    residual = noisy - value
    for other in (np.roll(residual, 1, axis=0), np.roll(residual, 1, axis=1), np.roll(residual, 1, axis=2)):
        assert abs((residual * other).mean()) < 5 * expected / np.sqrt(count)


def test_a_mosaic_has_one_noise_a_pixel_and_spreads_it() -> None:
    camera = Camera(shot=1e-3, read=1e-5, demosaic=True)
    noisy = camera.sense(field(0.4), np.random.default_rng(2)).astype(np.float64)
    seen = noisy[::2, ::2, 0]  # red pixels are passed on as they are
    assert seen.var() == pytest.approx(1e-3 * 0.4 + 1e-5, rel=4 * np.sqrt(2 / seen.size))
    interpolated = noisy[1:-1:2, 1:-1:2, 0]  # from four neighbours
    assert interpolated.var() < 0.5 * seen.var()


def test_noise_in_raw_colours_is_amplified_by_the_white_balance() -> None:
    """Red and blue gains of about 2 make red and blue noisier than green."""
    drawn = Realism(saturation=0, demosaic=0, jpeg=0).draw(np.random.default_rng(3))
    camera = replace(drawn, shot=0, read=1e-4)
    red, green, blue = camera.sense(field(0.3), np.random.default_rng(4)).std((0, 1))
    assert min(red, blue) > 1.4 * green


def test_colours_come_back() -> None:
    light = np.random.default_rng(5).random((64, 64, 3), np.float32)
    for number in range(5):
        camera = Realism(noise=0, demosaic=0, jpeg=0).draw(np.random.default_rng(number))
        assert camera.colours is not None
        raw = light @ camera.colours.T
        assert raw.min() > -0.2
        # Grey is the camera's grey: 1/gain of red and blue.
        grey = camera.colours @ np.ones(3)
        assert grey[1] == pytest.approx(1, abs=1e-5)
        assert 1.9 <= 1 / grey[0] <= 2.4
        assert 1.5 <= 1 / grey[2] <= 1.9
        sensed = replace(camera, read=1e-20).sense(light, np.random.default_rng(0))
        assert np.abs(sensed - light).max() < 1e-4


def test_demosaicing_restores_smooth_images_and_not_the_finest_detail() -> None:
    y, x = np.mgrid[:64, :64].astype(np.float32) / 64
    smooth = np.stack([x, 0.5 * x + 0.4 * y, 1 - y], axis=-1)
    assert np.abs(demosaiced(mosaic(smooth)) - smooth)[3:-3, 3:-3].max() < 0.01
    checked = np.zeros((64, 64, 3), np.float32)
    checked[::2, ::2] = checked[1::2, 1::2] = 1
    assert np.abs(demosaiced(mosaic(checked)) - checked).max() > 0.3
    below = np.full((16, 16), -0.05, np.float32)
    np.testing.assert_allclose(demosaiced(below), -0.05, atol=1e-4)
    bright = np.full((16, 16), 9.0, np.float32)
    np.testing.assert_allclose(demosaiced(bright, 9.5), 9.0, atol=1e-3)


def test_highlights_leave_saturated_streaks() -> None:
    """The camera sweeps over a clipped pixel: a quarter of its light is grey, of 8 times its light white."""
    light = np.float32([0.1, 0.5, 0.94, 0.96, 1.0])[None, :, None].repeat(3, 2)
    camera = Camera(highlight=7.0)
    brighter = camera.brighten(light, WHITE)[0, :, 0]
    assert brighter[:3] == pytest.approx([0.1, 0.5, 0.94])
    assert brighter[4] == pytest.approx(8.0)
    assert 0.96 < brighter[3] < 8
    exposed = np.full((8, 8, 3), brighter[4] / 4, np.float32)
    rng = np.random.default_rng(0)
    assert (camera.develop(exposed, SRGB, rng) == 255).all()
    assert (Camera().develop(np.full((8, 8, 3), 0.25, np.float32), SRGB, rng) < 140).all()
    # What is saturated has no noise left above white.
    noisy = replace(camera, shot=1e-4).develop(exposed, SRGB, rng)
    assert noisy.min() > 245


def test_jpeg_is_the_encoders() -> None:
    image = np.random.default_rng(6).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    image = cv2.GaussianBlur(image, (0, 0), 1.5)
    data = cv2.imencode('.jpg', image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])[1]
    np.testing.assert_array_equal(jpeg(image, 80), cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1])
    errors = [np.abs(jpeg(image, quality).astype(int) - image).mean() for quality in (95, 60)]
    assert 0 < errors[0] < errors[1]


def test_a_switch_changes_nothing_else() -> None:
    everything = Realism(saturation=1, noise=1, isp=1, demosaic=1, jpeg=1)
    full = everything.draw(np.random.default_rng(7))
    assert full.highlight
    assert full.shot
    assert full.read
    assert full.demosaic
    assert full.quality
    gone = {
        'saturation': {'highlight': 0.0},
        'noise': {'shot': 0.0, 'read': 0.0},
        'isp': {'colours': None},
        'demosaic': {'demosaic': False},
        'jpeg': {'quality': None},
    }
    for switch, change in gone.items():
        drawn = replace(everything, **{switch: 0}).draw(np.random.default_rng(7))
        expected = replace(full, **change)
        for name in ('highlight', 'shot', 'read', 'demosaic', 'quality'):
            assert getattr(drawn, name) == getattr(expected, name), (switch, name)
        assert (drawn.colours is None) == (expected.colours is None)


def test_switches_are_shares() -> None:
    rng = np.random.default_rng(8)
    cameras = [Realism(jpeg=0.25, noise=True, isp=False).draw(rng) for _ in range(2000)]
    share = np.mean([camera.quality is not None for camera in cameras])
    assert abs(share - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 2000)
    assert all(camera.shot and camera.colours is None for camera in cameras)


def test_read_noise_follows_from_shot_noise_as_in_real_cameras() -> None:
    """Brooks et al., CVPR 2019: slope 2.18, offset 1.20 and spread 0.26 of the logarithms."""
    rng = np.random.default_rng(9)
    cameras = [Realism(shot=(1e-4, 1e-2)).draw(rng) for _ in range(4000)]
    shot, read = (np.log([getattr(camera, name) for camera in cameras]) for name in ('shot', 'read'))
    slope, offset = np.polyfit(shot, read, 1)
    assert slope == pytest.approx(2.18, abs=0.03)
    assert offset == pytest.approx(1.20, abs=0.25)
    assert (read - slope * shot - offset).std() == pytest.approx(0.26, abs=0.02)
    own = [Realism(read=(1e-6, 1e-5)).draw(rng).read for _ in range(100)]
    assert min(own) >= 1e-6
    assert max(own) <= 1e-5


def test_plain_is_the_response_alone() -> None:
    image = np.random.default_rng(10).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    camera = PLAIN.draw(np.random.default_rng(0))
    assert camera.is_plain
    light = camera.brighten(SRGB.to_linear(image), WHITE)
    np.testing.assert_array_equal(camera.develop(light, SRGB, np.random.default_rng(0)), image)
