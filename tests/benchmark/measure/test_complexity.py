"""MACs, against counts made by hand and against those of the official implementations."""

from __future__ import annotations

import pytest

from dsgformer_arch import zoo
from dsgformer_arch.benchmark.measure.complexity import count, multiply_adds
from tests.small_systems import SMALL

OFFICIAL = {
    'dsgformer': 55.5,
    'restormer': 154.9,
    'mprnet': 759.4,
    'stripformer': 154.7,
    'convir_l': 125.7,
    'mb_taylorformer_v2_l': 93.2,
    'nafnet64': 63.1,
    'fftformer': 131.4,
    'drsformer': 243.0,
    'mhnet': 126.1,
}
"""GMACs at 256×256, counted on the official implementations (DSGformer: its specification)."""


@pytest.mark.long
@pytest.mark.parametrize('name', OFFICIAL)
def test_counts_agree_with_those_of_the_official_implementations(name: str) -> None:
    total = count(name).published + zoo.get(name).release_excess
    assert total / 1e9 == pytest.approx(OFFICIAL[name], abs=0.051)


@pytest.mark.long
def test_the_small_dsgformer_counts_as_specified_at_1920_by_1200() -> None:
    assert count('dsgformer_s', 1200, 1920).published / 1e9 == pytest.approx(175, abs=0.5)


def test_dsgformer_t_counts_as_specified() -> None:
    assert count('dsgformer_t').published / 1e9 == pytest.approx(2.7, abs=0.051)


def dsgformer_by_hand(
    width: int, blocks: tuple[int, ...], heads: tuple[int, ...], size: int
) -> tuple[int, int, int]:
    """Convolutions, products and transforms of DSGformer, layer by layer."""
    convolutions = 2 * 9 * 3 * width * size**2 + 9 * 3 * width * size**2  # tail of 2C, head of C
    products = transforms = 0
    stages = [(blocks[i], width << i, heads[i], size >> i) for i in range(4)]
    stages += [(blocks[i], width << i, heads[i], size >> i) for i in (2, 1)]
    stages += [(blocks[0], 2 * width, heads[0], size)]
    for number, c, h, side in stages:
        pixels = side**2
        convolutions += number * pixels * (4 * c * c + 9 * 4 * c + c * c)
        products += number * 2 * pixels * c * c // h
        # Two transforms of each 8×8 block: 5/2 · 64 · log2(64) operations, half as many MACs.
        transforms += number * 2 * c * (pixels // 64) * 480
    for i in range(3):
        convolutions += 4 * (width << i) * (width << (i + 1)) * (size >> (i + 1)) ** 2  # down, 2×2
    for c_in, c_out, side in ((8, 4, size >> 3), (4, 2, size >> 2), (2, 2, size >> 1)):
        convolutions += c_in * width * 4 * c_out * width * side**2  # up, 1×1
    return convolutions, products, transforms


def test_dsgformer_is_counted_as_by_hand() -> None:
    settings = {'width': 16, 'num_blocks': (1, 2, 1, 1), 'heads': (1, 2, 4, 8)}
    found = count('dsgformer', 64, **settings)
    expected = dsgformer_by_hand(16, (1, 2, 1, 1), (1, 2, 4, 8), 64)
    assert (found.convolutions, found.products, found.fourier) == expected
    assert found.published == sum(expected[:2])
    assert found.total == multiply_adds('dsgformer', 64, 64, **settings) == sum(expected)


def test_attention_of_a_fused_kernel_is_counted_as_its_two_products() -> None:
    """Stripformer calls PyTorch's attention, for which its own counter has no entry on every device."""
    plain = count('stripformer', 32, **SMALL['stripformer'])
    wide = count('stripformer', 32, 64, **SMALL['stripformer'])
    # Twice the pixels: convolutions and linear layers double, attention along rows does more than that.
    assert wide.convolutions == 2 * plain.convolutions
    assert wide.products > 2 * plain.products


def test_what_is_padded_is_counted_too() -> None:
    restormer = SMALL['restormer']
    assert count('restormer', 57, 63, **restormer) == count('restormer', 64, **restormer)
    assert count('restormer', 64, **restormer).fourier == 0


def test_complex_transforms_count_twice_the_real_ones() -> None:
    fftformer = SMALL['fftformer']
    small, large = (count('fftformer', side, **fftformer).fourier for side in (64, 128))
    assert large == 4 * small > 0
