"""Motion blur of a hand-held camera: a random path of the camera, its kernel, and the blurred photograph.

The path is the Markov process of Boracchi & Foi, "Modeling the Performance of Image Restoration from Motion
Blur" (IEEE TIP 2012), with the parameter ranges that Kupyn et al. (DeblurGAN, CVPR 2018, algorithm 1) draw
from.  Light adds up linearly on a sensor, so the blur happens on linear intensities: gamma 2.2 is undone
before and applied again after it, as Nah et al. (CVPR 2017) do for GoPro.

A seed gives the same pixels on every machine: random numbers come from `numpy.random.RandomState`, which
NumPy has frozen; intensities and kernel weights are integers, which removes the last bits in which
mathematical libraries differ; and their sums of products are far below 2^53, so that float64 additions in any
order, or an FFT, round to the same integer.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.signal import oaconvolve

GAMMA = 2.2
STEPS = 2000
LINEAR_WHITE = 2**20
KERNEL_SUM = 2**16


def hand_shake_path(rng: np.random.RandomState, length: float) -> NDArray[np.complex128]:
    """Draw the path of the image over the sensor during one exposure.

    The speed is constant; the direction changes by a Gaussian tremor, by a pull back to the start, and by
    sudden jerks that nearly reverse it (Boracchi & Foi, section IV; DeblurGAN, algorithm 1).

    Args:
        rng: source of randomness.
        length: length of the path in pixels; the distance between its ends is at most this.

    Returns:
        `STEPS` positions in pixels, x + iy, whose mean is 0: the sharp photograph that belongs to the
        blurred one shows the camera's mean position.
    """
    anxiety = rng.uniform(0.003, 0.01)
    jerk_probability = anxiety * rng.uniform(0, 0.2)
    tremor = anxiety * rng.uniform(0, 10)
    pull = anxiety * rng.uniform(0, 0.7)
    direction = np.exp(2j * np.pi * rng.random_sample())
    kicks = tremor * (rng.standard_normal(STEPS) + 1j * rng.standard_normal(STEPS))
    jerks = rng.random_sample(STEPS) < jerk_probability
    turns = np.exp(1j * (np.pi + rng.uniform(-0.5, 0.5, STEPS)))
    path = np.zeros(STEPS, np.complex128)
    for step in range(1, STEPS):
        change = kicks[step] - pull * path[step - 1]
        if jerks[step]:
            change += 2 * direction * turns[step]
        direction = (direction + change) / abs(direction + change)
        path[step] = path[step - 1] + direction * (length / (STEPS - 1))
    return path - path.mean()


def blur_kernel(path: NDArray[np.complex128]) -> NDArray[np.int64]:
    """The blur kernel of a path: the image of a point of light.

    Each position spreads over its four neighbouring pixels bilinearly.

    Args:
        path: positions in pixels, x + iy, about 0.

    Returns:
        Integer weights that sum to `KERNEL_SUM`, square, with the smallest odd side that holds the path
        about the centre.
    """
    radius = int(np.ceil(max(np.abs(path.real).max(), np.abs(path.imag).max())))
    weights = np.zeros((2 * radius + 2, 2 * radius + 2))
    left, top = np.floor(path.real).astype(int), np.floor(path.imag).astype(int)
    right_part, bottom_part = path.real - left, path.imag - top
    for dy, y_part in ((0, 1 - bottom_part), (1, bottom_part)):
        for dx, x_part in ((0, 1 - right_part), (1, right_part)):
            np.add.at(weights, (top + radius + dy, left + radius + dx), y_part * x_part)
    weights = weights[:-1, :-1]
    kernel = np.rint(weights * (KERNEL_SUM / len(path))).astype(np.int64)
    # Rounding changes the sum by a few units; the largest weight absorbs them with the least relative change.
    kernel[np.unravel_index(kernel.argmax(), kernel.shape)] += KERNEL_SUM - kernel.sum()
    return kernel


def blurred_pair(
    photograph: NDArray[np.uint8],
    kernel: NDArray[np.int64],
    rng: np.random.RandomState,
    shot_noise: float = 0.0,
    read_noise: float = 0.0,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Blur a photograph in linear light, add the sensor's noise, and round to 8 bits.

    Only pixels that receive light from inside the photograph are kept, so no border has to be assumed.

    Args:
        photograph: sharp, H×W×3, 8 bits, gamma 2.2.
        kernel: k×k weights from `blur_kernel`, k odd and at most H and W.
        rng: source of the noise.
        shot_noise: a in the noise's variance a·y + b at linear intensity y in [0, 1] (Foi et al., IEEE TIP
            2008).
        read_noise: b in that variance.

    Returns:
        The blurred and the sharp photograph, both (H-k+1)×(W-k+1)×3, 8 bits, aligned.
    """
    linear = _linear_levels()[photograph]
    exposed = np.rint(oaconvolve(linear, kernel[..., None].astype(np.float64), mode='valid', axes=(0, 1)))
    if shot_noise or read_noise:
        white = LINEAR_WHITE * KERNEL_SUM
        deviation = white * np.sqrt(shot_noise * exposed / white + read_noise)
        exposed = np.rint(exposed + deviation * rng.standard_normal(exposed.shape))
    blurred = np.searchsorted(_rounding_thresholds(), exposed, side='right').astype(np.uint8)
    margin = len(kernel) // 2
    height, width = blurred.shape[:2]
    return blurred, photograph[margin : margin + height, margin : margin + width]


def _linear_levels() -> NDArray[np.float64]:
    """Integer linear intensity of each of the 256 display levels."""
    return np.rint(LINEAR_WHITE * (np.arange(256) / 255) ** GAMMA)


def _rounding_thresholds() -> NDArray[np.float64]:
    """Exposures (linear intensity times `KERNEL_SUM`) from which on the next of the 256 levels is nearest."""
    return np.rint(LINEAR_WHITE * KERNEL_SUM * ((np.arange(255) + 0.5) / 255) ** GAMMA)
