"""RSBlur's protocol: RealBlur's, with the aligned image clipped to [0, 1] before it is scored."""

from __future__ import annotations

import dataclasses

import numpy as np

from dsgformer_arch.metrics.alignment import Alignment, align
from dsgformer_arch.metrics.metric import Image, metric


def align_and_clip(img: Image, img2: Image) -> Alignment:
    """`align`, then clip the restored image to [0, 1]: intensity match and cubic warp may exceed it."""
    alignment = align(img, img2)
    return dataclasses.replace(alignment, restored=np.clip(alignment.restored, 0, 1))


@metric
def psnr_rsblur(img: Image, img2: Image) -> float:
    """PSNR of RSBlur's authors, over the pixels that the alignment covers.

    Source: evaluation/evaluate_RSBlur.py of rimchang/RSBlur; see `alignment`.

    Args:
        img: the restored image, uint8 BGR of shape (H, W, 3).
        img2: the sharp image, likewise.

    Returns:
        PSNR in dB.
    """
    return align_and_clip(img, img2).psnr()


@metric
def ssim_rsblur(img: Image, img2: Image) -> float:
    """SSIM of RSBlur's authors, over the pixels that the alignment covers.

    Source: evaluation/evaluate_RSBlur.py of rimchang/RSBlur; see `alignment`.

    Args:
        img: the restored image, uint8 BGR of shape (H, W, 3).
        img2: the sharp image, likewise.

    Returns:
        SSIM, at most 1.
    """
    return align_and_clip(img, img2).ssim()
