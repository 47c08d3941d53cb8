"""Verification of exported files against the network in PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from dsgformer_arch.archs.layers.network import RestorationNetwork
from dsgformer_arch.export.image_to_image import ImageToImage, Interface, Precision
from dsgformer_arch.utils.errors import UserError

TOLERANCES: dict[Precision, float] = {'fp32': 1e-4, 'fp16': 1 / 255}
"""Largest difference of a value in [0, 1] from the reference implementation in float32.

Float16 rounds values near 1 by up to 2.4e-4, and every layer adds to that: its results may differ by one
step of an 8-bit image.
"""

Run = Callable[[np.ndarray], np.ndarray]
"""A file loaded in its runtime: maps (N, 3, H, W), float32, to the same."""


class VerificationError(UserError):
    """A file whose results differ from those of the network."""


def verify(run: Run, network: RestorationNetwork, interface: Interface, what: str) -> float:
    """Compare a file in its runtime with the reference implementation in PyTorch.

    Args:
        run: the file in its runtime.
        network: the network, in float32.
        interface: of the file; defines the sizes of the images, which differ from that of the export.
        what: what the message calls the file.

    Returns:
        The largest absolute difference.

    Raises:
        VerificationError: it is above `TOLERANCES`, or the runtime refuses the file.
    """
    reference = ImageToImage(network, exported=False)
    tolerance = TOLERANCES[interface.precision]
    worst = 0.0
    for shape in interface.verification_shapes():
        image = test_image(shape)
        with torch.no_grad():
            expected = reference(torch.from_numpy(image)).numpy()
        size = f'{shape[3]}×{shape[2]}'
        try:
            found = run(image)
        except Exception as error:  # runtimes raise classes of their own
            raise VerificationError(f'{what} does not run at {size} pixels: {first_line(error)}') from error
        if found.shape != expected.shape:
            raise VerificationError(f'{what} returns {found.shape} at {size} pixels, not {expected.shape}')
        difference = float(np.abs(found.astype(np.float64) - expected).max())
        if not difference <= tolerance:  # NaN is not a result either
            raise VerificationError(
                f'{what} differs from PyTorch by {difference:.2g} at {size} pixels, more than {tolerance:.2g}'
            )
        worst = max(worst, difference)
    return worst


def test_image(shape: tuple[int, int, int, int]) -> np.ndarray:
    """Images (N, 3, H, W) in [0, 1], float32: smooth waves of every colour, and noise; always the same."""
    random = np.random.default_rng(shape)
    n, channels, height, width = shape
    row, column = np.mgrid[0:height, 0:width] / 16
    frequency, phase = (
        random.uniform(0.5, 2, (2, n, channels, 1, 1)),
        random.uniform(0, 6, (n, channels, 1, 1)),
    )
    waves = np.sin(frequency[0] * row + frequency[1] * column + phase)
    noise = random.uniform(-0.5, 0.5, shape)
    return (0.5 + 0.3 * waves + 0.4 * noise).clip(0, 1).astype(np.float32)


def first_line(error: Exception) -> str:
    """An error's class and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f'{type(error).__name__}: {lines[0][:200]}' if lines else type(error).__name__
