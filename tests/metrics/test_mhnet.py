"""MHNet's metrics against its official code and against a literal computation in NumPy and SciPy, float64.

The recorded numbers are what `calculate_psnr` and `calculate_ssim` of Derain/cal.py of Tombs98/MHNet return,
called as its eval.py calls them.  They compute Y in float32, hence the tolerances.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from dsgformer_arch.metrics.metric import Image
from dsgformer_arch.metrics.mhnet import exchanged_luma, psnr_mhnet, ssim_mhnet
from dsgformer_arch.metrics.rain import psnr_rain, ssim_rain
from tests.trees import random_image

Numbered = tuple[int, Image, Image]

OFFICIAL = {
    1: (20.448915481567383, 0.5285204488348076),
    2: (12.125890731811523, 0.4564574998838153),
    3: (14.12606143951416, 0.26587567756929753),
}
OFFICIAL_GOPRO = (25.433523178100586, 0.7452952750878166)


def literal(restored: Image, clean: Image) -> tuple[float, float]:
    """PSNR and SSIM, spelt out: a two-dimensional window, means by plain convolution."""
    first, second = (
        16 + (65.481 * image[..., 0] + 128.553 * image[..., 1] + 24.966 * image[..., 2]) / 255
        for image in (restored.astype(np.float64), clean.astype(np.float64))
    )
    psnr = 20 * np.log10(255 / np.sqrt(np.mean((first - second) ** 2)))
    rows, columns = np.mgrid[-5:6, -5:6]
    window = np.exp(-(rows**2 + columns**2) / (2 * 1.5**2))
    window /= window.sum()

    def mean(image: np.ndarray) -> np.ndarray:
        return np.asarray(ndimage.convolve(image, window, mode='nearest'))

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean1, mean2 = mean(first), mean(second)
    variance1, variance2 = mean(first**2) - mean1**2, mean(second**2) - mean2**2
    covariance = mean(first * second) - mean1 * mean2
    similarity = (2 * mean1 * mean2 + c1) * (2 * covariance + c2)
    similarity /= (mean1**2 + mean2**2 + c1) * (variance1 + variance2 + c2)
    return float(psnr), float(similarity.mean())


def test_as_the_official_code_on_rain(rain: Numbered) -> None:
    number, rainy, clean = rain
    psnr, ssim = OFFICIAL[number]
    assert psnr_mhnet(rainy, clean) == pytest.approx(psnr, abs=1e-5)
    assert ssim_mhnet(rainy, clean) == pytest.approx(ssim, abs=1e-6)


def test_as_the_official_code_on_gopro(gopro: tuple[Image, Image]) -> None:
    psnr, ssim = OFFICIAL_GOPRO
    assert psnr_mhnet(*gopro) == pytest.approx(psnr, abs=1e-5)
    assert ssim_mhnet(*gopro) == pytest.approx(ssim, abs=1e-6)


def test_as_a_literal_computation_on_rain(rain: Numbered) -> None:
    _, *pair = rain
    assert (psnr_mhnet(*pair), ssim_mhnet(*pair)) == pytest.approx(literal(*pair), abs=1e-10)


def test_as_a_literal_computation_on_a_generated_image() -> None:
    clean = random_image(3, 47, 61)
    noise = np.random.default_rng(0).normal(0, 12, clean.shape)
    noisy = (clean + noise).clip(0, 255).round().astype(np.uint8)
    pair = (noisy, clean)
    assert (psnr_mhnet(*pair), ssim_mhnet(*pair)) == pytest.approx(literal(*pair), abs=1e-10)


def test_red_and_blue_are_exchanged_and_nothing_is_rounded() -> None:
    colours = np.zeros((1, 4, 3), np.uint8)
    colours[0, 0, 0] = colours[0, 1, 1] = colours[0, 2, 2] = 255  # blue, green, red
    colours[0, 3] = 1
    expected = [[16 + 65.481, 16 + 128.553, 16 + 24.966, 16 + 219 / 255]]
    np.testing.assert_allclose(exchanged_luma(colours), expected, rtol=1e-14)


def test_it_is_neither_metric_of_the_other_deraining_papers(rain: Numbered) -> None:
    _, *pair = rain
    assert abs(psnr_mhnet(*pair) - psnr_rain(*pair)) > 0.01
    assert abs(ssim_mhnet(*pair) - ssim_rain(*pair)) > 0.001


def test_equal_images() -> None:
    image = random_image(1, 20, 20)
    assert psnr_mhnet(image, image) == float('inf')
    assert ssim_mhnet(image, image) == pytest.approx(1)
