"""Alignment of a restored image to the sharp one, for data sets with real blur.

The pairs of RealBlur and RSBlur were taken with two cameras behind a beam
splitter.  A restored image may be shifted against the sharp one by fractions of
a pixel, and have another brightness.  Their authors therefore match the
intensity, estimate a homography by ECC (Evangelidis and Psarakis, IEEE TPAMI
2008), and score only the pixels that the warp covers.

Source: evaluation_RealBlur_ecc.py of rimchang/RealBlur, repeated in
evaluate_realblur.py of swz30/Restormer and evaluate_RSBlur.py of
rimchang/RSBlur.  These ask for OpenCV 4.2.0 and scikit-image 0.17.2:

- The steps of ECC differ between versions of OpenCV, and 100 of them do not
  always converge.  On crops of a GoPro pair and on rainy images, unshifted and
  shifted by up to 9 pixels, 4.5.5, 4.8.1, 4.10.0 and 4.12.0 agree to 5e-5 dB
  and 2e-6 in SSIM; 5.0.0 differs from them by up to 1e-3 dB and 1e-4 in SSIM.
  Between nearly equal images (a sharp image and a shifted, darker copy of it)
  the difference grows with PSNR: 0.02 dB at 44 dB, 0.4 dB at 54 dB.
- scikit-image 0.17.2 filters in float64 whatever it is given; since 0.19 it
  keeps float32, which moves the sixth digit of SSIM.  Float64 is used here.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from dsgformer_arch.metrics.metric import Image
from dsgformer_arch.metrics.psnr_ssim import RADIUS, mean_where_whole, psnr_from, ssim_map

ITERATIONS = 100
GAUSSIAN_SIDE = 5


class AlignmentWarning(UserWarning):
    """ECC found no alignment, and the image was scored without one."""


@dataclass(frozen=True)
class Alignment:
    """A restored image aligned to the sharp one.

    Attributes:
        restored: the aligned image, float32 RGB of shape (H, W, 3), nominally 0 to 1; 0 outside the mask.
        sharp: the sharp image, likewise.
        mask: float32 of shape (H, W, 1): 1 where the warp covers a pixel, 0 elsewhere.
        converged: whether ECC found the homography; if not, the intensity alone was matched.
    """

    restored: NDArray[np.float32]
    sharp: NDArray[np.float32]
    mask: NDArray[np.float32]
    converged: bool

    def psnr(self) -> float:
        """PSNR in dB over the pixels that the warp covers."""
        squared_error = np.sum((self.sharp - self.restored) ** 2, dtype=np.float64)
        return psnr_from(float(squared_error / (3 * self.mask.sum(dtype=np.float64))), 1)

    def ssim(self) -> float:
        """SSIM, averaged over channels and over the pixels that the warp covers.

        As scikit-image computes it with the Gaussian window of Wang et al. and
        the range 1.  A border of 5 pixels, where the window does not fit, is
        excluded.
        """
        mask = self.mask[RADIUS:-RADIUS, RADIUS:-RADIUS]
        similarity = ssim_map(self.sharp, self.restored, mean_where_whole, 1)
        return float((similarity * mask).sum() / (3 * mask.sum(dtype=np.float64)))


def align(img: Image, img2: Image) -> Alignment:
    """Match the intensity of a restored image, and warp it onto the sharp image.

    ECC starts from the identity, with a 5×5 Gaussian filter, and runs 100
    iterations (the authors' threshold of 0 never stops it earlier): 7 s on one
    core for 1280×720 pixels.  The result of the last pair is cached, so that
    PSNR and SSIM of one pair align it once.

    Where ECC does not converge (an empty image, or two unrelated ones) the
    authors' script raises an error.  Here the image is not warped, an
    `AlignmentWarning` is issued, and `Alignment.converged` is False.

    Args:
        img: the restored image, uint8 BGR of shape (H, W, 3).
        img2: the sharp image, likewise.
    """
    return _align(img.tobytes(), img2.tobytes(), img.shape)


@functools.lru_cache(maxsize=1)
def _align(restored: bytes, sharp: bytes, shape: tuple[int, ...]) -> Alignment:
    x = _unit_rgb(sharp, shape)
    z = _unit_rgb(restored, shape)
    energy = np.sum(z * z)
    if energy:
        z = (np.sum(x * z) / energy) * z
    warp = _homography(x, z)
    if warp is None:
        return Alignment(z, x, np.ones((*shape[:2], 1), np.float32), converged=False)
    height, width, _ = shape
    z = np.asarray(
        cv2.warpPerspective(
            z,
            warp,
            (width, height),
            flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REFLECT,
        ),
        np.float32,
    )
    covered = cv2.warpPerspective(
        np.ones((height, width), np.float32),
        warp,
        (width, height),
        flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP,
    )
    mask = np.asarray(covered, np.float32)[..., None]
    return Alignment(z * mask, x * mask, mask, converged=True)


def _unit_rgb(pixels: bytes, shape: tuple[int, ...]) -> NDArray[np.float32]:
    bgr = np.frombuffer(pixels, np.uint8).reshape(shape)
    return np.ascontiguousarray(bgr[..., ::-1], np.float32) / np.float32(255)


def _homography(template: NDArray[np.float32], image: NDArray[np.float32]) -> NDArray[np.float32] | None:
    """The 3×3 matrix that maps pixels of `template` to pixels of `image`, or None where ECC finds none."""
    try:
        # All arguments by position: OpenCV 4.1 to 5.0 agree on their order, not on which may be left out.
        _, warp = cv2.findTransformECC(
            cv2.cvtColor(template, cv2.COLOR_RGB2GRAY),
            cv2.cvtColor(image, cv2.COLOR_RGB2GRAY),
            np.eye(3, dtype=np.float32),
            cv2.MOTION_HOMOGRAPHY,
            (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, ITERATIONS, 0),
            np.ones(image.shape[:2], np.uint8),
            GAUSSIAN_SIDE,
        )
    except cv2.error as error:
        if error.code != cv2.Error.StsNoConv:
            raise
        warnings.warn(
            f'ECC does not converge ({error.err.strip()}); the restored image is scored without alignment',
            AlignmentWarning,
            stacklevel=2,
        )
        return None
    return np.asarray(warp, np.float32)
