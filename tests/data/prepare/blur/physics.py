"""What the tests of physics share: scenes and measurements that know nothing of the code under test."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def texture(side: int, seed: int = 0, slope: float = 1.0) -> NDArray[np.uint16]:
    """Linear light of a scene with a 1/f spectrum, uint16 (side, side, 3)."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None])
    frequency[0, 0] = 1
    scene = np.fft.ifft2(np.fft.fft2(rng.standard_normal((side, side))) / frequency**slope).real
    scene = (scene - scene.min()) / np.ptp(scene)
    return np.rint(scene * 60000).astype(np.uint16)[..., None].repeat(3, 2)


def shift_by_phase(a: NDArray[np.floating], b: NDArray[np.floating], band: float) -> NDArray[np.float64]:
    """Shift from `a` to `b`, (y, x) in pixels, by phase correlation of the frequencies below `band`.

    A point-spread function that is not symmetric turns the phase of high frequencies by its shape; at low
    ones, its phase is that of the shift of its centre of gravity.  Frequencies are in cycles a pixel.
    """
    height, width = a.shape
    window = np.outer(np.hanning(height), np.hanning(width))
    first, second = (np.fft.fft2((image - image.mean()) * window) for image in (a, b))
    product = second * np.conj(first)
    fy, fx = np.broadcast_arrays(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    low = (np.hypot(fy, fx) < band) & (np.hypot(fy, fx) > 0)
    weight = np.sqrt(np.abs(product[low]))
    slopes = -2 * np.pi * np.stack([fy[low], fx[low]], axis=1)
    solution = np.linalg.lstsq(slopes * weight[:, None], np.angle(product[low]) * weight, rcond=None)[0]
    return np.asarray(solution, dtype=np.float64)
