"""The alignment of RealBlur and RSBlur: known shifts, masked scores, and what happens without one.

The recorded numbers are what `image_align`, `compute_psnr` and `compute_ssim`
of Restormer's evaluate_realblur.py give with OpenCV 5.0.0 and float64 images
for scikit-image.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from scipy import ndimage
from skimage.metrics import structural_similarity

from dsgformer_arch.metrics import alignment
from dsgformer_arch.metrics.alignment import Alignment, AlignmentWarning, align
from dsgformer_arch.metrics.metric import Image
from dsgformer_arch.metrics.psnr_ssim import psnr_rgb
from tests.metrics.conftest import read_pair

Pair = tuple[Image, Image]


@pytest.fixture(scope='module')
def shifted(gopro: Pair) -> tuple[Pair, Alignment]:
    """A sharp crop two columns and one row off at 80 % of the brightness, and its alignment."""
    sharp = gopro[1][300:460, 400:580]
    off = gopro[1][301:461, 402:582]
    darker = np.round(off * 0.8).astype(np.uint8)
    return (darker, sharp), align(darker, sharp)


def test_as_the_authors_script(gopro_crop: Pair, ecc_tolerance: tuple[float, float]) -> None:
    aligned = align(*gopro_crop)
    assert aligned.converged
    assert aligned.psnr() == pytest.approx(21.703988716, abs=ecc_tolerance[0])
    assert aligned.ssim() == pytest.approx(0.584645955, abs=min(ecc_tolerance[1], 1e-5))


def test_all_the_iterations_of_the_authors_script(ecc_tolerance: tuple[float, float]) -> None:
    """ECC has not converged after 100 iterations of this pair: one less gives 22.582441 dB."""
    rainy, clean = read_pair('rain200h/input/1.png', 'rain200h/target/1.png')
    aligned = align(rainy[:160, :160], clean[:160, :160])
    assert aligned.psnr() == pytest.approx(22.582383276, abs=0.1 * ecc_tolerance[0])
    assert aligned.ssim() == pytest.approx(0.476317328, abs=ecc_tolerance[1])


def test_shifted_pairs_keep_the_stated_tolerance(gopro: Pair, ecc_tolerance: tuple[float, float]) -> None:
    """The numbers are those of OpenCV 5.0.0; 4.5.5 and 4.10.0 differ by 1.5e-4 dB and 1.5e-5 at most."""
    blurred, sharp = gopro
    darker = np.round(blurred[103:403, 196:596] * 0.8).astype(np.uint8)
    rainy, clean = read_pair('rain200h/input/1.png', 'rain200h/target/1.png')
    for restored, partner, psnr, ssim in (
        (darker, sharp[100:400, 200:600], 21.673910532, 0.587983921),
        (rainy[3:163, 2:162], clean[:160, :160], 22.463057499, 0.480589119),
    ):
        aligned = align(np.ascontiguousarray(restored), np.ascontiguousarray(partner))
        assert aligned.psnr() == pytest.approx(psnr, abs=ecc_tolerance[0])
        assert aligned.ssim() == pytest.approx(ssim, abs=ecc_tolerance[1])


def test_shift_and_brightness_are_taken_back(shifted: tuple[Pair, Alignment]) -> None:
    pair, aligned = shifted
    assert psnr_rgb(*pair) < 22
    assert aligned.converged
    assert aligned.psnr() > 38
    assert aligned.ssim() > 0.99


def test_pixels_that_came_from_outside_do_not_count(shifted: tuple[Pair, Alignment]) -> None:
    """The partner's first row and first two columns have no counterpart in the shifted image."""
    (_, sharp), aligned = shifted
    mask = aligned.mask[..., 0]
    assert set(np.unique(mask)) == {0, 1}
    assert not mask[0].any()
    assert not mask[:, :2].any()
    assert mask[2:-2, 4:-2].all()
    assert not aligned.restored[mask == 0].any()
    assert not aligned.sharp[mask == 0].any()
    np.testing.assert_allclose(aligned.sharp[mask == 1], sharp[..., ::-1][mask == 1] / 255, atol=1e-7)


def test_psnr_is_of_the_masked_pixels(shifted: tuple[Pair, Alignment]) -> None:
    _, aligned = shifted
    inside = aligned.mask[..., 0] == 1
    errors = aligned.sharp[inside].astype(np.float64) - aligned.restored[inside]
    assert aligned.psnr() == pytest.approx(-10 * np.log10(np.mean(errors**2)), abs=1e-4)


def test_ssim_is_skimages_map_under_the_mask(shifted: tuple[Pair, Alignment]) -> None:
    _, aligned = shifted
    _, similarity = structural_similarity(
        aligned.sharp.astype(np.float64),
        aligned.restored.astype(np.float64),
        channel_axis=2,
        data_range=1.0,
        gaussian_weights=True,
        use_sample_covariance=False,
        full=True,
    )
    inner = ndimage.binary_erosion(np.ones(aligned.mask.shape[:2], bool), np.ones((11, 11)))
    counted = inner & (aligned.mask[..., 0] == 1)
    assert aligned.ssim() == pytest.approx(similarity[counted].mean(), abs=1e-9)


def test_pair_that_cannot_be_aligned_is_scored_as_it_is(gopro_crop: Pair) -> None:
    black, sharp = np.zeros((40, 50, 3), np.uint8), gopro_crop[1][:40, :50]
    with pytest.warns(AlignmentWarning, match='does not converge'):
        aligned = align(black, sharp)
    assert not aligned.converged
    assert aligned.mask.all()
    assert aligned.psnr() == pytest.approx(psnr_rgb(black, sharp), abs=1e-4)


def test_other_faults_of_opencv_are_not_hidden(gopro_crop: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment, 'GAUSSIAN_SIDE', 4)  # OpenCV wants an odd side
    a, b = (image[:30, :30] for image in gopro_crop)
    with pytest.raises(cv2.error):
        align(a, b)


def test_one_pair_is_aligned_once(gopro_crop: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    estimate = cv2.findTransformECC
    pairs: list[Any] = []

    def counted(*arguments: Any) -> Any:
        pairs.append(arguments)
        return estimate(*arguments)

    monkeypatch.setattr(cv2, 'findTransformECC', counted)
    a, b = (image[:50, :60] for image in gopro_crop)
    first = align(a, b)
    assert align(a.copy(), b.copy()) is first
    assert len(pairs) == 1
    assert align(b, a) is not first
    assert len(pairs) == 2
