"""The deraining papers' protocol: PSNR and SSIM of MATLAB's 8-bit luma.

Source: evaluate_PSNR_SSIM.m of swz30/MPRNet and swz30/Restormer (Rain100,
Test100, …) and of cschenxiang/DRSformer (Rain200L, Rain200H, SPA-Data).
DRSformer scores DID-Data and DDN-Data by another script, without rounding.
"""

from __future__ import annotations

import numpy as np

from dsgformer_arch.metrics.metric import Image, metric
from dsgformer_arch.metrics.psnr_ssim import mean_where_whole, psnr_from, ssim_map


def luma(bgr: Image) -> Image:
    """Y of MATLAB's `rgb2ycbcr` for a uint8 image: BT.601, 16 to 235, rounded to 8 bits.

    Computed in integers, rounding half up, so it is exact.  Octave's
    rgb2ycbcr gives the same for all but 6 of the 16.8 million colours; these
    are ties that its floating-point sum rounds down.

    Args:
        bgr: uint8 BGR of shape (H, W, 3).

    Returns:
        uint8 of shape (H, W).
    """
    blue, green, red = np.moveaxis(bgr.astype(np.int32), 2, 0)
    weighted = 65481 * red + 128553 * green + 24966 * blue
    return (16 + (weighted + 127500) // 255000).astype(np.uint8)


@metric
def psnr_rain(img: Image, img2: Image) -> float:
    """PSNR of MATLAB's 8-bit luma, the peak 255.

    Source: `compute_psnr` in evaluate_PSNR_SSIM.m; see the module's docstring.

    Args:
        img: the restored image, uint8 BGR of shape (H, W, 3).
        img2: the clean image, likewise.

    Returns:
        PSNR in dB; infinite for equal lumas.
    """
    return psnr_from(float(np.mean((luma(img).astype(np.float64) - luma(img2)) ** 2)), 255)


@metric
def ssim_rain(img: Image, img2: Image) -> float:
    """SSIM of MATLAB's 8-bit luma by Wang et al.'s code: only where the whole 11×11 window fits.

    Source: `compute_ssim` in evaluate_PSNR_SSIM.m; see the module's docstring.

    Args:
        img: the restored image, uint8 BGR of shape (H, W, 3).
        img2: the clean image, likewise.

    Returns:
        SSIM, at most 1.
    """
    return float(ssim_map(luma(img), luma(img2), mean_where_whole, 255).mean())
