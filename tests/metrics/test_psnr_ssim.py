"""The metrics on RGB against dense windows, other libraries and numbers that Octave gave.

Octave's numbers come from Octave 7.3 with its image package 2.14: `psnr`, and
SSIM as one `convn` with an 11×11×11 window over the array padded by indexing.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from dsgformer_arch.metrics.metric import Image
from dsgformer_arch.metrics.psnr_ssim import psnr_rgb, ssim_basicsr, ssim_matlab_rgb, ssim_skimage

Pair = tuple[Image, Image]
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def dense_volume_ssim(a: Image, b: Image) -> float:
    """SSIM with the 11×11×11 window laid over each voxel of the padded volume, from its definition."""
    offsets = np.arange(-5.0, 6.0)
    z, y, x = np.meshgrid(offsets, offsets, offsets, indexing='ij')
    weights = np.exp(-(x**2 + y**2 + z**2) / (2 * 1.5**2))
    weights /= weights.sum()

    def windows(image: Image) -> NDArray[np.float64]:
        padded = np.pad(image.astype(np.float64), 5, mode='edge')
        return sliding_window_view(padded, (11, 11, 11))

    def mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.einsum('rcdxyz,xyz->rcd', values, weights, optimize=True)

    wa, wb = windows(a), windows(b)
    ma, mb = mean(wa), mean(wb)
    da, db = wa - ma[..., None, None, None], wb - mb[..., None, None, None]
    va, vb, cov = mean(da**2), mean(db**2), mean(da * db)
    return float(((2 * ma * mb + C1) * (2 * cov + C2) / ((ma**2 + mb**2 + C1) * (va + vb + C2))).mean())


def separable_ssim(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """SSIM with scipy's Gaussian along every axis of the arrays."""

    def mean(image: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(ndimage.gaussian_filter(image, 1.5, mode='nearest', radius=5))

    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma * ma, mean(b * b) - mb * mb, mean(a * b) - ma * mb
    return float(((2 * ma * mb + C1) * (2 * cov + C2) / ((ma**2 + mb**2 + C1) * (va + vb + C2))).mean())


def test_psnr_of_the_gopro_pair(gopro: Pair) -> None:
    assert psnr_rgb(*gopro) == pytest.approx(24.050000106898, abs=1e-9)  # Octave
    assert psnr_rgb(*gopro) == pytest.approx(peak_signal_noise_ratio(gopro[1], gopro[0]), abs=1e-9)


def test_psnr_of_one_wrong_level() -> None:
    sharp = np.full((16, 12, 3), 200, np.uint8)
    restored = sharp.copy()
    restored[3, 4, 1] = 190
    assert psnr_rgb(restored, sharp) == pytest.approx(10 * np.log10(255**2 * 16 * 12 * 3 / 100), abs=1e-12)


def test_equal_images(gopro_crop: Pair) -> None:
    sharp = gopro_crop[1]
    assert psnr_rgb(sharp, sharp) == float('inf')
    for ssim in (ssim_matlab_rgb, ssim_skimage, ssim_basicsr):
        assert ssim(sharp, sharp) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ('row', 'column'), [(0, 0), (300, 500), (696, 1248)], ids=['corner', 'inside', 'end']
)
def test_matlab_ssim_is_the_dense_window(gopro: Pair, row: int, column: int) -> None:
    a, b = (image[row : row + 24, column : column + 32] for image in gopro)
    assert ssim_matlab_rgb(a, b) == pytest.approx(dense_volume_ssim(a, b), abs=1e-10)


def test_matlab_ssim_of_a_whole_frame(gopro: Pair) -> None:
    a, b = (image.astype(np.float64) for image in gopro)
    value = ssim_matlab_rgb(*gopro)
    assert value == pytest.approx(separable_ssim(a, b), abs=1e-10)
    assert value == pytest.approx(0.796293265797, abs=1e-9)  # Octave


def test_matlab_ssim_of_a_crop_in_octave(gopro: Pair) -> None:
    a, b = (image[300:400, 500:620] for image in gopro)
    assert ssim_matlab_rgb(a, b) == pytest.approx(0.662042367237, abs=1e-9)


def test_matlab_ssim_of_grey_is_the_flat_one(gopro_crop: Pair) -> None:
    """Replicated channels hold nothing to filter along, so a grey volume scores as its one plane."""
    a, b = (image[..., 1] for image in gopro_crop)
    expected = separable_ssim(a.astype(np.float64), b.astype(np.float64))
    assert ssim_matlab_rgb(np.dstack([a] * 3), np.dstack([b] * 3)) == pytest.approx(expected, abs=1e-10)


def test_matlab_ssim_takes_either_channel_order_but_not_any(gopro_crop: Pair) -> None:
    a, b = gopro_crop
    value = ssim_matlab_rgb(a, b)
    assert ssim_matlab_rgb(a[..., ::-1], b[..., ::-1]) == pytest.approx(value, abs=1e-12)
    assert abs(ssim_matlab_rgb(a[..., [1, 0, 2]], b[..., [1, 0, 2]]) - value) > 1e-5


def test_basicsr_ssim_is_skimage_with_a_gaussian(gopro_crop: Pair) -> None:
    a, b = gopro_crop
    expected = structural_similarity(
        a, b, channel_axis=2, data_range=255, gaussian_weights=True, use_sample_covariance=False
    )
    assert ssim_basicsr(a, b) == pytest.approx(expected, abs=1e-9)


def test_skimage_ssim_is_the_uniform_window(gopro_crop: Pair) -> None:
    a, b = (image[:30, :40].astype(np.float64) for image in gopro_crop)
    values = []
    for row in range(30 - 6):
        for column in range(40 - 6):
            for channel in range(3):
                x, y = (image[row : row + 7, column : column + 7, channel].ravel() for image in (a, b))
                (vx, cov), (_, vy) = np.cov(x, y)
                luminance = (2 * x.mean() * y.mean() + C1) / (x.mean() ** 2 + y.mean() ** 2 + C1)
                values.append(luminance * (2 * cov + C2) / (vx + vy + C2))
    assert ssim_skimage(a.astype(np.uint8), b.astype(np.uint8)) == pytest.approx(np.mean(values), abs=1e-10)
