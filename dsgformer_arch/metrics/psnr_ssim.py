"""PSNR, and three variants of SSIM in deblurring papers, of 8-bit RGB images.

All variants use K = (0.01, 0.03) and the range 255; they differ in the window
and in the treatment of colour and borders:

==================  ==============================  =======================  ====================
metric              window                          colour                   borders
==================  ==============================  =======================  ====================
`ssim_matlab_rgb`   Gaussian 11×11×11, sigma 1.5    filtered as a dimension  replicated, kept
`ssim_basicsr`      Gaussian 11×11, sigma 1.5       mean over channels       5 pixels cut off
`ssim_skimage`      uniform 7×7, sample covariance  mean over channels       3 pixels cut off
==================  ==============================  =======================  ====================

skimage called with `gaussian_weights=True, use_sample_covariance=False`, as
GoPro's author advises (SeungjunNah/DeepDeblur_release#51), is `ssim_basicsr`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from basicsr.metrics import calculate_ssim
from numpy.typing import NDArray
from scipy import ndimage
from skimage.metrics import structural_similarity

from dsgformer_arch.metrics.metric import Image, metric

SIGMA = 1.5
RADIUS = 5

_taps = np.exp(-0.5 * (np.arange(-RADIUS, RADIUS + 1) / SIGMA) ** 2)
GAUSSIAN: NDArray[np.float64] = _taps / _taps.sum()
"""The 11 taps of Wang et al.'s window; MATLAB's ssim uses the same, with a radius of ceil(3·1.5)."""

CHANNEL_MIX: NDArray[np.float64] = ndimage.correlate1d(np.eye(3), GAUSSIAN, axis=0, mode='nearest')
"""The same filter along three channels with replicated borders: row c holds the weights for channel c."""


def psnr_from(squared_error: float, peak: float) -> float:
    """PSNR in dB of a mean squared error, infinite where there is none."""
    return 10 * float(np.log10(peak**2 / squared_error)) if squared_error else float('inf')


def ssim_map(
    x: NDArray[Any],
    y: NDArray[Any],
    local_mean: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    peak: float,
) -> NDArray[np.float64]:
    """The SSIM map (Wang et al., IEEE TIP 2004, equation 13), in float64.

    Args:
        x: an image of any shape.
        y: another image of the same shape.
        local_mean: computes the weighted mean in the window around each pixel.
        peak: the range of values, 255 or 1.

    Returns:
        An array of the shape that `local_mean` returns.
    """
    x = x.astype(np.float64)
    y = y.astype(np.float64)
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    mean_x, mean_y = local_mean(x), local_mean(y)
    xx, yy, xy = mean_x * mean_x, mean_y * mean_y, mean_x * mean_y
    variances = local_mean(x * x + y * y) - xx - yy
    covariance = local_mean(x * y) - xy
    return (2 * xy + c1) * (2 * covariance + c2) / ((xx + yy + c1) * (variances + c2))


def mean_in_volume(image: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gaussian filter along rows, columns and channels with replicated borders.  (H, W, 3) to (H, W, 3)."""
    rows_and_columns = cv2.sepFilter2D(image, -1, GAUSSIAN, GAUSSIAN, borderType=cv2.BORDER_REPLICATE)
    return rows_and_columns @ CHANNEL_MIX.T


def mean_where_whole(image: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gaussian filter where the whole 11×11 window fits.  (H, W, …) to (H - 10, W - 10, …)."""
    filtered = np.asarray(cv2.sepFilter2D(image, -1, GAUSSIAN, GAUSSIAN), np.float64)
    return filtered[RADIUS:-RADIUS, RADIUS:-RADIUS]


@metric
def psnr_rgb(img: Image, img2: Image) -> float:
    """PSNR in dB of 8-bit images, over all pixels and channels at once.

    Equal to MATLAB's `psnr` of two uint8 images: the mean squared error in
    double precision, the peak 255.

    Source: `psnr(input, gt)` in evaluate_GOPRO_HIDE.m of swz30/MPRNet and
    evaluate_gopro_hide.m of swz30/Restormer.

    Args:
        img: the restored image, uint8 BGR of shape (H, W, 3).
        img2: the sharp image, likewise.

    Returns:
        PSNR in dB; infinite for equal images.
    """
    return psnr_from(float(np.mean((img.astype(np.float64) - img2) ** 2)), 255)


@metric
def ssim_matlab_rgb(img: Image, img2: Image) -> float:
    """MATLAB's `ssim` called on RGB images, the SSIM of the GoPro and HIDE tables.

    MATLAB treats a height×width×3 array as a volume: the Gaussian window
    (sigma 1.5, radius ceil(3·1.5) = 5, so 11×11×11) extends over the three
    channels too, with replicated borders in all three dimensions.  The mean
    is over the whole map, in double precision for uint8 input.  The order of
    the channels does not matter.

    For the pair of images in scikit-image/scikit-image#4985 a user reports
    0.8433 with MATLAB R2019 (Coldog2333/pytoflow#15); this function returns
    0.84334.  mayorx/matlab_ssim_pytorch_implementation returns 0.8434.

    Source: `ssim(input, gt)` in evaluate_GOPRO_HIDE.m of swz30/MPRNet and
    evaluate_gopro_hide.m of swz30/Restormer; MathWorks' page on ssim.

    Args:
        img: the restored image, uint8 BGR of shape (H, W, 3).
        img2: the sharp image, likewise.

    Returns:
        SSIM, at most 1.
    """
    return float(ssim_map(img, img2, mean_in_volume, 255).mean())


@metric
def ssim_skimage(img: Image, img2: Image) -> float:
    """scikit-image's SSIM with its defaults: 7×7 uniform window, sample covariance, mean of the channels.

    Source: `structural_similarity(img1, img2, multichannel=True)` in
    basicsr/metrics/psnr_ssim.py of megvii-research/NAFNet.

    Args:
        img: the restored image, uint8 BGR of shape (H, W, 3).
        img2: the sharp image, likewise.

    Returns:
        SSIM, at most 1.
    """
    return float(structural_similarity(img, img2, channel_axis=2, data_range=255))


@metric
def ssim_basicsr(img: Image, img2: Image) -> float:
    """BasicSR's SSIM with `crop_border=0`: Wang et al.'s SSIM of each channel, then the mean.

    Source: `calculate_ssim` of XPixelGroup/BasicSR 1.4.2.

    Args:
        img: the restored image, uint8 BGR of shape (H, W, 3).
        img2: the sharp image, likewise.

    Returns:
        SSIM, at most 1.
    """
    return float(calculate_ssim(img, img2, crop_border=0))
