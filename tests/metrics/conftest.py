"""Real image pairs, from the data that lies beside the checkout."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from dsgformer_arch.metrics.metric import Image

DATA = Path(__file__).resolve().parents[2] / '..' / 'shared' / 'data'


def read_pair(restored: str, sharp: str) -> tuple[Image, Image]:
    """Two images of the shared data as uint8 BGR."""
    if not DATA.is_dir():
        pytest.skip('the shared images do not lie beside this checkout')
    images = [cv2.imread(str(DATA / name)) for name in (restored, sharp)]
    assert all(image is not None for image in images)
    first, second = (np.asarray(image, np.uint8) for image in images)
    return first, second


@pytest.fixture(scope='session')
def gopro() -> tuple[Image, Image]:
    """A blurred frame of GoPro and its sharp partner, 1280×720."""
    return read_pair('gopro_pair/blur/istanbul.png', 'gopro_pair/sharp/istanbul.png')


@pytest.fixture(scope='session')
def gopro_crop(gopro: tuple[Image, Image]) -> tuple[Image, Image]:
    """300 rows from row 100 and 400 columns from column 200 of the GoPro pair."""
    blurred, sharp = (image[100:400, 200:600] for image in gopro)
    return blurred, sharp


@pytest.fixture(scope='session', params=[1, 2, 3])
def rain(request: pytest.FixtureRequest) -> tuple[int, Image, Image]:
    """The number, rainy image and clean image of a pair of Rain200H, 481×321."""
    return request.param, *read_pair(
        f'rain200h/input/{request.param}.png', f'rain200h/target/{request.param}.png'
    )


@pytest.fixture(scope='session')
def ecc_tolerance() -> tuple[float, float]:
    """Largest difference in PSNR (dB) and in SSIM from numbers that were recorded with OpenCV 5.0.

    Older versions take other steps of ECC; see `metrics.alignment`.
    """
    return (1e-4, 1e-6) if int(cv2.__version__.split('.')[0]) >= 5 else (1e-3, 1e-4)
