"""RealBlur's metrics, on images as BasicSR passes them."""

from __future__ import annotations

import numpy as np
import pytest
from basicsr.metrics import calculate_metric

from dsgformer_arch.metrics.alignment import AlignmentWarning, align
from dsgformer_arch.metrics.metric import Image
from dsgformer_arch.metrics.realblur import ecc_converged, psnr_realblur, ssim_realblur

Pair = tuple[Image, Image]


def test_metrics_are_those_of_the_alignment(gopro_crop: Pair) -> None:
    restored, sharp = (image[:120, :160] for image in gopro_crop)
    images = {'img': restored, 'img2': sharp}
    expected = align(restored, sharp)
    assert calculate_metric(images, {'type': 'psnr_realblur', 'better': 'higher'}) == expected.psnr()
    assert calculate_metric(images, {'type': 'ssim_realblur'}) == expected.ssim()
    assert ecc_converged(restored, sharp) == 1


def test_brightness_does_not_count(gopro_crop: Pair) -> None:
    sharp = gopro_crop[1][:100, :120]
    darker = np.round(sharp * 0.5).astype(np.uint8)
    assert psnr_realblur(darker, sharp) > 45
    assert ssim_realblur(darker, sharp) > 0.99


def test_a_failed_alignment_is_reported(gopro_crop: Pair) -> None:
    sharp = gopro_crop[1][:40, :40]
    with pytest.warns(AlignmentWarning):
        assert ecc_converged(np.full_like(sharp, 255), sharp) == 0
