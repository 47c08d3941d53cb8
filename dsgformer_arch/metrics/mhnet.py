"""MHNet's protocol: PSNR and SSIM of an unrounded luma with red and blue exchanged.

Source: `calculate_psnr` and `calculate_ssim` in Derain/cal.py of Tombs98/MHNet, as Derain/eval.py
calls them; Deblur/ has the same two files, so its tables for GoPro and HIDE are computed likewise.  It
differs from `metrics.rain`, the protocol of the other deraining papers, in three ways:

- BGR images of `cv2.imread` are converted as if they were RGB: blue gets the weight of red, and red
  that of blue;
- Y is not rounded to 8 bits (the images are: the official test script saves them as PNG);
- SSIM is computed at every pixel, with replicated borders.

The official code computes Y in float32.  Here it is float64, which changes PSNR by less than 1e-5 dB
and SSIM by less than 1e-6 on the images of the tests.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from dsgformer_arch.metrics.metric import Image, metric
from dsgformer_arch.metrics.psnr_ssim import GAUSSIAN, psnr_from, ssim_map


def exchanged_luma(bgr: Image) -> NDArray[np.float64]:
    """16 + (65.481 B + 128.553 G + 24.966 R) / 255: BT.601's Y of an image read as RGB though it is BGR.

    Args:
        bgr: uint8 BGR of shape (H, W, 3).

    Returns:
        float64 of shape (H, W), 16 to 235, not rounded.
    """
    return 16 + bgr.astype(np.float64) @ np.array([65.481, 128.553, 24.966]) / 255


def mean_over_borders(image: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gaussian mean with replicated borders.  (H, W) to the same."""
    filtered = cv2.sepFilter2D(image, -1, GAUSSIAN, GAUSSIAN, borderType=cv2.BORDER_REPLICATE)
    return np.asarray(filtered, np.float64)


@metric
def psnr_mhnet(img: Image, img2: Image) -> float:
    """PSNR of `exchanged_luma`, the peak 255.

    Source: `calculate_psnr` in Derain/cal.py of Tombs98/MHNet; see the module's docstring.

    Args:
        img: the restored image, uint8 BGR of shape (H, W, 3).
        img2: the clean image, likewise.

    Returns:
        PSNR in dB; infinite for equal lumas.
    """
    return psnr_from(float(np.mean((exchanged_luma(img) - exchanged_luma(img2)) ** 2)), 255)


@metric
def ssim_mhnet(img: Image, img2: Image) -> float:
    """SSIM of `exchanged_luma` by Wang et al.'s formula, at every pixel, with replicated borders.

    Source: `calculate_ssim` in Derain/cal.py of Tombs98/MHNet; see the module's docstring.

    Args:
        img: the restored image, uint8 BGR of shape (H, W, 3).
        img2: the clean image, likewise.

    Returns:
        SSIM, at most 1.
    """
    return float(ssim_map(exchanged_luma(img), exchanged_luma(img2), mean_over_borders, 255).mean())
