"""Registration in BasicSR's METRIC_REGISTRY, and what the metrics refuse."""

from __future__ import annotations

import numpy as np
import pytest
from basicsr.metrics import calculate_metric
from basicsr.utils.registry import METRIC_REGISTRY

import dsgformer_arch.metrics  # noqa: F401
from dsgformer_arch.metrics.metric import Image
from dsgformer_arch.utils.errors import UserError

NAMES = (
    'psnr_rgb',
    'ssim_matlab_rgb',
    'ssim_skimage',
    'ssim_basicsr',
    'psnr_realblur',
    'ssim_realblur',
    'psnr_rsblur',
    'ssim_rsblur',
    'psnr_rain',
    'ssim_rain',
    'pyiqa_metric',
)


def image(height: int = 20, width: int = 24) -> Image:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize('name', NAMES)
def test_every_metric_is_registered_and_documented(name: str) -> None:
    metric = METRIC_REGISTRY.get(name)
    assert metric.__name__ == name
    assert 'Source:' in metric.__doc__


def test_basicsr_calls_it_with_its_own_options() -> None:
    sharp = image()
    restored = 255 - sharp
    value = calculate_metric({'img': restored, 'img2': sharp}, {'type': 'psnr_rgb', 'better': 'higher'})
    squares = (restored.astype(int) - sharp.astype(int)) ** 2
    assert value == pytest.approx(10 * np.log10(255**2 / squares.mean()), abs=1e-12)


def test_an_option_that_would_be_ignored_is_refused() -> None:
    options = {'type': 'ssim_basicsr', 'crop_border': 4}
    with pytest.raises(UserError, match=r'ssim_basicsr.*crop_border'):
        calculate_metric({'img': image(), 'img2': image()}, options)


@pytest.mark.parametrize(
    ('restored', 'sharp', 'message'),
    [
        (image(20, 24), image(20, 23), '24×20 pixels and its sharp partner 23×20'),
        (image(10, 24), image(10, 24), '24×10 pixels, less than the 11×11 window'),
        (image().astype(np.float32), image(), 'restored image has type float32'),
        (image(), image()[..., 0], r'sharp image has type uint8 and shape \(20, 24\)'),
    ],
    ids=['size', 'small', 'type', 'grey'],
)
@pytest.mark.parametrize('name', NAMES[:-1])
def test_bad_pairs(name: str, restored: Image, sharp: Image, message: str) -> None:
    with pytest.raises(UserError, match=message):
        METRIC_REGISTRY.get(name)(restored, sharp)
