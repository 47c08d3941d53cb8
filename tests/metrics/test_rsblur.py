"""RSBlur's metrics: the aligned image is clipped first.

The recorded numbers are what the functions of evaluate_RSBlur.py give with
OpenCV 5.0.0 and float64 images for scikit-image.
"""

from __future__ import annotations

import numpy as np
import pytest

from dsgformer_arch.metrics.alignment import align
from dsgformer_arch.metrics.metric import Image
from dsgformer_arch.metrics.realblur import psnr_realblur
from dsgformer_arch.metrics.rsblur import psnr_rsblur, ssim_rsblur

Pair = tuple[Image, Image]


def test_as_the_authors_script(gopro_crop: Pair, ecc_tolerance: tuple[float, float]) -> None:
    assert psnr_rsblur(*gopro_crop) == pytest.approx(21.704009330, abs=ecc_tolerance[0])
    assert ssim_rsblur(*gopro_crop) == pytest.approx(0.584671742, abs=min(ecc_tolerance[1], 1e-5))


def test_only_values_beyond_the_range_are_changed(gopro: Pair) -> None:
    """Highlights overshoot when a darker image is matched to them, and RealBlur's metric leaves them so."""
    sharp = gopro[1][300:420, 400:540]
    restored = (sharp * 0.6).astype(np.uint8)
    restored[sharp > np.percentile(sharp, 99)] = 255
    aligned = align(restored, sharp)
    assert aligned.restored.max() > 1.2
    inside = aligned.mask[..., 0] == 1
    errors = aligned.sharp[inside].astype(np.float64) - aligned.restored[inside].clip(0, 1)
    assert psnr_rsblur(restored, sharp) == pytest.approx(-10 * np.log10(np.mean(errors**2)), abs=1e-4)
    assert psnr_rsblur(restored, sharp) > psnr_realblur(restored, sharp) + 0.1
