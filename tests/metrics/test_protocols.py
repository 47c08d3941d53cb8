"""The protocols: their columns, their channel order, their rounding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from basicsr.utils import tensor2img

from dsgformer_arch.metrics import PROTOCOLS, protocol, to_uint8
from dsgformer_arch.metrics.metric import Image
from dsgformer_arch.metrics.mhnet import psnr_mhnet, ssim_mhnet
from dsgformer_arch.metrics.psnr_ssim import psnr_rgb, ssim_basicsr, ssim_matlab_rgb, ssim_skimage
from dsgformer_arch.metrics.rain import psnr_rain, ssim_rain
from dsgformer_arch.metrics.realblur import psnr_realblur, ssim_realblur
from dsgformer_arch.metrics.rsblur import psnr_rsblur, ssim_rsblur
from dsgformer_arch.utils.errors import UserError

Pair = tuple[Image, Image]
Metric = Callable[[Image, Image], float]


def test_names() -> None:
    assert list(PROTOCOLS) == ['gopro', 'hide', 'realblur', 'rsblur', 'rain', 'mhnet']
    for name in PROTOCOLS:
        chosen = protocol(name)
        assert chosen.name == name
        assert list(chosen.columns)[:2] == ['psnr', 'ssim']
        assert chosen.source
        assert chosen.rounding


def test_an_unknown_name() -> None:
    with pytest.raises(UserError, match='no protocol gorpo; choose one of gopro, hide, realblur'):
        protocol('gorpo')


def test_the_gopro_pair(gopro: Pair) -> None:
    blurred, sharp = (image[..., ::-1] for image in gopro)
    scores = protocol('gopro').evaluate(blurred, sharp)
    assert scores['psnr'] == pytest.approx(24.05, abs=5e-3)
    assert scores['ssim'] == pytest.approx(0.796293, abs=1e-6)
    assert scores['ssim'] > scores['ssim_basicsr'] > scores['ssim_skimage']


def test_columns_of_gopro(gopro_crop: Pair) -> None:
    restored, sharp = gopro_crop
    assert protocol('gopro').evaluate(restored[..., ::-1], sharp[..., ::-1]) == {
        'psnr': psnr_rgb(restored, sharp),
        'ssim': ssim_matlab_rgb(restored, sharp),
        'ssim_skimage': ssim_skimage(restored, sharp),
        'ssim_basicsr': ssim_basicsr(restored, sharp),
    }


def test_hide_is_measured_as_gopro() -> None:
    assert protocol('hide').columns == protocol('gopro').columns


@pytest.mark.parametrize(
    ('name', 'psnr', 'ssim'),
    [('realblur', psnr_realblur, ssim_realblur), ('rsblur', psnr_rsblur, ssim_rsblur)],
)
def test_real_blur_is_listed_next_to_its_unaligned_values(
    gopro_crop: Pair, name: str, psnr: Metric, ssim: Metric
) -> None:
    restored, sharp = (image[:120, :160] for image in gopro_crop)
    pair = (restored, sharp)
    scores = protocol(name).evaluate(restored[..., ::-1], sharp[..., ::-1])
    assert scores == {
        'psnr': psnr(*pair),
        'ssim': ssim(*pair),
        'psnr_unaligned': psnr_rgb(*pair),
        'ssim_unaligned': ssim_basicsr(*pair),
        'ecc_converged': 1.0,
    }
    assert scores['psnr'] > scores['psnr_unaligned']


def test_rain_takes_rgb(rain: tuple[int, Image, Image]) -> None:
    _, rainy, clean = rain
    rainy = rainy.copy()
    rainy[..., 0] //= 2  # takes blue away, so that a swap of the channels shows
    scores = protocol('rain').evaluate(rainy[..., ::-1], clean[..., ::-1])
    assert scores == {'psnr': psnr_rain(rainy, clean), 'ssim': ssim_rain(rainy, clean)}
    assert abs(scores['psnr'] - psnr_rain(rainy[..., ::-1], clean[..., ::-1])) > 0.01


def test_mhnet_takes_rgb(rain: tuple[int, Image, Image]) -> None:
    _, rainy, clean = rain
    rainy = rainy.copy()
    rainy[..., 0] //= 2  # takes blue away, so that a swap of the channels shows
    scores = protocol('mhnet').evaluate(rainy[..., ::-1], clean[..., ::-1])
    assert scores == {'psnr': psnr_mhnet(rainy, clean), 'ssim': ssim_mhnet(rainy, clean)}
    assert abs(scores['psnr'] - psnr_mhnet(rainy[..., ::-1], clean[..., ::-1])) > 0.01


def test_a_protocol_cannot_be_changed_by_its_users() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        protocol('gopro').name = 'mine'  # type: ignore[misc]


def test_rounding_is_that_of_basicsr() -> None:
    generator = torch.Generator().manual_seed(0)
    output = torch.rand(1, 3, 40, 50, generator=generator) * 1.4 - 0.2
    output[0, :, 0] = ((torch.arange(50) + 0.5) / 255)[None]
    expected = tensor2img(output.clone(), rgb2bgr=False)
    np.testing.assert_array_equal(to_uint8(output), expected)
    np.testing.assert_array_equal(to_uint8(output[0]), expected)
    assert expected.min() == 0
    assert expected.max() == 255


def test_rounding_by_hand() -> None:
    levels = (
        torch.tensor([-3.0, 0.0, 0.4, 0.6, 1.5, 2.5, 254.4, 254.6, 255.0, 900.0], dtype=torch.float64) / 255
    )
    rounded = to_uint8(levels.expand(3, 1, 10))
    assert rounded.shape == (1, 10, 3)
    assert rounded[0, :, 0].tolist() == [0, 0, 0, 1, 2, 2, 254, 255, 255, 255]


def test_half_precision_is_rounded_after_it_is_widened() -> None:
    output = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    np.testing.assert_array_equal(to_uint8(output), to_uint8(output.float()))


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), float('-inf')])
def test_an_output_that_is_not_an_image(bad: float) -> None:
    output = torch.zeros(3, 4, 5)
    output[1, 2, 3] = bad
    with pytest.raises(ValueError, match='1 of the 60 values'):
        to_uint8(output)
    with pytest.raises(ValueError, match='shape'):
        to_uint8(torch.zeros(2, 3, 4, 5))
