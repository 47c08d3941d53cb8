"""Camera paths, their kernels, and blur in linear light, against direct float64 computations."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from numpy.typing import NDArray

from dsgformer_arch.data.prepare.motion_blur import (
    GAMMA,
    KERNEL_SUM,
    STEPS,
    blur_kernel,
    blurred_pair,
    hand_shake_path,
)


def random_photograph(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.RandomState(5).randint(0, 256, (height, width, 3)).astype(np.uint8)


def grey_ramp() -> NDArray[np.uint8]:
    """All 256 levels, one a row."""
    return np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None, None], (256, 40, 3))


def seeded(seed: int) -> np.random.RandomState:
    return np.random.RandomState(seed)


@pytest.mark.parametrize('length', [3.0, 17.5])
def test_path_has_the_length_asked_for_and_is_centred(length: float) -> None:
    path = hand_shake_path(seeded(1), length)
    assert path.shape == (STEPS,)
    assert np.abs(np.diff(path)).sum() == pytest.approx(length, rel=1e-9)
    assert abs(path.mean()) < 1e-12


def test_paths_of_different_seeds_differ_in_shape() -> None:
    """They span between a point-like tangle and a straight line, and turn gradually."""
    paths = [hand_shake_path(seeded(seed), 20.0) for seed in range(40)]
    spans = np.array([max(np.ptp(path.real), np.ptp(path.imag)) for path in paths])
    assert spans.max() > 12
    assert spans.min() < 8
    assert spans.max() <= 20
    turns = np.abs(np.concatenate([np.angle(np.diff(path)[1:] / np.diff(path)[:-1]) for path in paths]))
    assert np.mean(turns < 0.5) > 0.99
    assert turns.max() > 2  # a jerk


def test_kernel_is_the_time_spent_at_each_pixel() -> None:
    path = hand_shake_path(seeded(3), 15.0)
    kernel = blur_kernel(path)
    radius = len(kernel) // 2
    expected = np.zeros((len(kernel) + 2, len(kernel) + 2))
    for position in path:
        for y in range(len(expected)):
            for x in range(len(expected)):
                weight_x = max(0.0, 1 - abs(position.real + radius + 1 - x))
                weight_y = max(0.0, 1 - abs(position.imag + radius + 1 - y))
                if weight_x and weight_y:
                    expected[y, x] += weight_x * weight_y / STEPS
    assert not expected[[0, -1]].any()
    assert not expected[:, [0, -1]].any()
    assert kernel.sum() == KERNEL_SUM
    assert kernel.min() >= 0
    off = np.abs(kernel - KERNEL_SUM * expected[1:-1, 1:-1])
    assert np.sort(off.ravel())[-2] <= 0.5 + 1e-6  # all weights but the one that makes up the sum
    assert off.max() < 50


def test_kernel_is_centred_on_the_mean_position() -> None:
    for seed in range(10):
        kernel = blur_kernel(hand_shake_path(seeded(seed), 25.0)) / KERNEL_SUM
        offsets = np.arange(len(kernel)) - len(kernel) // 2
        assert abs(kernel.sum(0) @ offsets) < 0.01
        assert abs(kernel.sum(1) @ offsets) < 0.01


def test_no_movement_changes_no_pixel() -> None:
    kernel = blur_kernel(np.zeros(STEPS, np.complex128))
    np.testing.assert_array_equal(kernel, [[KERNEL_SUM]])
    blurred, sharp = blurred_pair(grey_ramp(), kernel, seeded(0))
    np.testing.assert_array_equal(blurred, grey_ramp())
    np.testing.assert_array_equal(sharp, grey_ramp())


def test_uniform_areas_keep_their_level() -> None:
    kernel = blur_kernel(hand_shake_path(seeded(2), 20.0))
    for level in range(256):
        photograph = np.full((len(kernel), len(kernel), 3), level, np.uint8)
        blurred, _ = blurred_pair(photograph, kernel, seeded(0))
        assert blurred.tolist() == [[[level] * 3]]


def test_blur_adds_up_the_light_along_the_path() -> None:
    """Against the mean of shifted photographs in linear light, in float64 and without a convolution."""
    photograph = random_photograph(30, 34)
    kernel = blur_kernel(hand_shake_path(seeded(4), 12.0))
    blurred, sharp = blurred_pair(photograph, kernel, seeded(0))
    side, margin = len(kernel), len(kernel) // 2
    height, width = 30 - side + 1, 34 - side + 1
    linear = (photograph / 255.0) ** GAMMA
    light = np.zeros((height, width, 3))
    for y in range(side):
        for x in range(side):
            # The image of a point at the centre lies at (y, x): what lies at the centre came from the
            # opposite side.
            top, left = side - 1 - y, side - 1 - x
            light += kernel[y, x] / KERNEL_SUM * linear[top : top + height, left : left + width]
    expected = 255 * light ** (1 / GAMMA)
    assert blurred.shape == sharp.shape == (height, width, 3)
    np.testing.assert_array_equal(sharp, photograph[margin:-margin, margin:-margin])
    # Linear levels are whole numbers, which moves a level by less than 0.001.
    assert np.abs(blurred - expected).max() < 0.501


def test_noise_has_the_variance_asked_for_in_linear_light() -> None:
    shot, read = 4e-4, 1e-5
    still = blur_kernel(np.zeros(STEPS, np.complex128))
    for level in (100, 180):
        photograph = np.full((200, 200, 3), level, np.uint8)
        noisy, _ = blurred_pair(photograph, still, seeded(0), shot, read)
        linear = (noisy / 255.0) ** GAMMA
        intensity = (level / 255) ** GAMMA
        step = intensity - ((level - 1) / 255) ** GAMMA
        rounding = step**2 / 12
        assert linear.var() == pytest.approx(shot * intensity + read + rounding, rel=0.03)
        assert linear.mean() == pytest.approx(intensity, abs=step / 10)


def test_pixels_are_those_of_every_other_machine() -> None:
    rng = seeded(7)
    kernel = blur_kernel(hand_shake_path(rng, 16.0))
    blurred, _ = blurred_pair(random_photograph(90, 100), kernel, rng, 1e-4, 1e-6)
    assert hashlib.sha256(kernel.tobytes()).hexdigest()[:16] == '54203b8b9e682fa8'
    assert hashlib.sha256(blurred.tobytes()).hexdigest()[:16] == '7c8ad8c965805542'
