"""RealBlur's protocol: PSNR and SSIM after matching the intensity and aligning by a homography."""

from __future__ import annotations

from dsgformer_arch.metrics.alignment import align
from dsgformer_arch.metrics.metric import Image, metric


@metric
def psnr_realblur(img: Image, img2: Image) -> float:
    """PSNR of RealBlur's authors, over the pixels that the alignment covers.

    Source: evaluation_RealBlur_ecc.py of rimchang/RealBlur; see `alignment`.

    Args:
        img: the restored image, uint8 BGR of shape (H, W, 3).
        img2: the sharp image, likewise.

    Returns:
        PSNR in dB.
    """
    return align(img, img2).psnr()


@metric
def ssim_realblur(img: Image, img2: Image) -> float:
    """SSIM of RealBlur's authors, over the pixels that the alignment covers.

    Source: evaluation_RealBlur_ecc.py of rimchang/RealBlur; see `alignment`.

    Args:
        img: the restored image, uint8 BGR of shape (H, W, 3).
        img2: the sharp image, likewise.

    Returns:
        SSIM, at most 1.
    """
    return align(img, img2).ssim()


def ecc_converged(img: Image, img2: Image) -> float:
    """1 if ECC found an alignment of this pair, 0 if the pair was scored without alignment."""
    return float(align(img, img2).converged)
