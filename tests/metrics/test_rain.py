"""The luma metrics against skimage and against the authors' script run in Octave.

The recorded numbers are what `compute_psnr` and `compute_ssim` of Restormer's
Deraining/evaluate_PSNR_SSIM.m print in Octave 7.3 with its image package 2.14.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from dsgformer_arch.metrics.metric import Image
from dsgformer_arch.metrics.rain import luma, psnr_rain, ssim_rain

Numbered = tuple[int, Image, Image]

OCTAVE = {
    1: (20.245579266547, 0.508331182162),
    2: (12.180808411613, 0.446804642248),
    3: (13.964159650411, 0.248666048854),
}


def test_as_the_authors_script_in_octave(rain: Numbered) -> None:
    number, rainy, clean = rain
    psnr, ssim = OCTAVE[number]
    assert psnr_rain(rainy, clean) == pytest.approx(psnr, abs=1e-9)
    assert ssim_rain(rainy, clean) == pytest.approx(ssim, abs=1e-9)


def test_as_skimage(rain: Numbered) -> None:
    _, *pair = rain
    rainy, clean = (np.floor(rgb2ycbcr(image[..., ::-1])[..., 0] + 0.5) for image in pair)
    assert psnr_rain(*pair) == pytest.approx(peak_signal_noise_ratio(clean, rainy, data_range=255), abs=1e-4)
    expected = structural_similarity(
        rainy, clean, data_range=255, gaussian_weights=True, use_sample_covariance=False
    )
    assert ssim_rain(*pair) == pytest.approx(expected, abs=1e-6)


def test_luma_is_rounded_half_up() -> None:
    generator = np.random.default_rng(0)
    colours = generator.integers(0, 256, (2000, 3))
    ties = [
        (red, green, blue)
        for red in range(0, 256, 5)
        for green in range(256)
        for blue in range(256)
        if (299 * red + 587 * green + 114 * blue) % 85000 == 42500
    ]
    assert ties
    colours = np.concatenate([colours, np.array(ties), [[0, 0, 0], [255, 255, 255]]])
    exact = [
        int(
            16
            + (Fraction(65481, 1000) * r + Fraction(128553, 1000) * g + Fraction(24966, 1000) * b) / 255
            + Fraction(1, 2)
        )
        for r, g, b in colours.tolist()
    ]
    assert luma(colours[None, :, ::-1].astype(np.uint8))[0].tolist() == exact
    assert exact[-2:] == [16, 235]


def test_luma_distinguishes_red_and_blue() -> None:
    bgr = np.zeros((1, 2, 3), np.uint8)
    bgr[0, 0, 0] = 255
    bgr[0, 1, 2] = 255
    assert luma(bgr).tolist() == [[41, 81]]
