"""Camera responses: from the 256 display levels to linear light, and back.

Light adds up linearly on a sensor, display levels do not.  Averages over an exposure are therefore taken in
linear light, and the response maps linear light to display levels.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from dsgformer_arch.utils.errors import UserError

MID_GREY = 128
"""The level at which a tabulated response is scaled to sRGB's linear value, since its unit is arbitrary."""
RELIABLE, SLOPE_OVER = 250, 15
"""Estimated responses are unreliable near black and white (Debevec & Malik, SIGGRAPH 1997).  Above this
level a table is extrapolated with the slope of so many levels before it.  Otherwise saturated pixels of the
GoPro table would be four times as bright as those one level below, differently in each channel, and leave
coloured fringes."""
CODES = 2**16
"""Entries of the table that encodes.  The square root of linear light indexes it, which resolves the darkest
levels of every response in use."""


class Response:
    """The mapping between linear light and display levels of a camera.

    Attributes:
        name: what it was made from: `'srgb'`, `'gamma2.2'`, `'linear'` or a file.
        levels: float32 (256, 3), RGB: the linear light of each display level, not decreasing.
        white: float32 (3,): the linear light at which a channel saturates.
    """

    def __init__(
        self, name: str, levels: NDArray[np.floating], thresholds: NDArray[np.floating] | None = None
    ) -> None:
        """
        Args:
            name: for messages.
            levels: (256, 3), RGB, not decreasing.
            thresholds: (255, 3): linear light from which on the next level is nearest; by default half-way
                between the levels' light.
        """
        self.name = name
        self.levels = np.ascontiguousarray(levels, np.float32)
        self.white = self.levels[-1]
        self._decoder = self.levels[None]
        if thresholds is None:
            thresholds = (levels[1:] + levels[:-1]) / 2
        self._scale = ((CODES - 1) / np.sqrt(self.white)).astype(np.float32)
        codes = (np.arange(CODES)[:, None] / self._scale.astype(np.float64)) ** 2
        self._encoder = np.stack(
            [np.searchsorted(thresholds[:, c], codes[:, c], side='right') for c in range(3)]
        ).astype(np.uint8)

    def to_linear(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Display levels to linear light.

        Args:
            image: uint8 RGB (H, W, 3).

        Returns:
            float32 (H, W, 3), 0 to `white`.
        """
        return np.asarray(cv2.LUT(image, self._decoder), dtype=np.float32)

    def to_display(self, linear: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Linear light to the nearest display levels; light above `white` saturates.

        Args:
            linear: float32 RGB (H, W, 3).

        Returns:
            uint8 RGB (H, W, 3).
        """
        codes = np.sqrt(np.clip(linear, 0, self.white))
        codes *= self._scale
        codes += 0.5
        index = codes.astype(np.uint16)
        return np.stack([self._encoder[c][index[..., c]] for c in range(3)], axis=-1)


@cache
def response(name: str) -> Response:
    """The camera response of a name.

    Args:
        name: `'srgb'` (IEC 61966-2-1), `'linear'`, `'gamma2.2'` or another exponent, or the path of a `.npy`
            file with an inverse response of 256 entries for blue, green and red, such as those that
            `cv2.createCalibrateDebevec` estimates and REDS comes with (Nah et al., CVPRW 2019).

    Raises:
        UserError: the name is unknown, or the file is not an inverse response.
    """
    if name.endswith('.npy'):
        return Response(name, _tabulated(Path(name).expanduser()))
    level, threshold = np.arange(256) / 255, (np.arange(255) + 0.5) / 255
    if name == 'srgb':
        curves = [_srgb(display) for display in (level, threshold)]
    elif name == 'linear':
        curves = [level, threshold]
    elif name.startswith('gamma') and _number(name[5:]) > 0:
        curves = [display ** _number(name[5:]) for display in (level, threshold)]
    else:
        raise UserError(f'{name!r} is not a camera response; give srgb, linear, gamma2.2 or a .npy file')
    return Response(name, *(np.repeat(curve[:, None], 3, axis=1) for curve in curves))


def _srgb(display: NDArray[np.floating]) -> NDArray[np.floating]:
    return np.where(display <= 0.04045, display / 12.92, ((display + 0.055) / 1.055) ** 2.4)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def _tabulated(path: Path) -> NDArray[np.floating]:
    try:
        table = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f'cannot read the camera response {path}: {error}') from None
    if table.size != 256 * 3 or table.shape[0] != 256 or table.dtype.kind != 'f':
        raise UserError(f'{path} is not a camera response: it should hold 256 × 3 numbers (blue, green, red)')
    levels = table.reshape(256, 3)[:, ::-1].astype(np.float64)
    levels -= levels[0]  # the sensor's output without light
    slope = (levels[RELIABLE] - levels[RELIABLE - SLOPE_OVER]) / SLOPE_OVER
    levels[RELIABLE:] = levels[RELIABLE] + slope * np.arange(256 - RELIABLE)[:, None]
    if not np.isfinite(levels).all() or levels[MID_GREY].min() <= 0 or levels[-1].min() <= 0:
        raise UserError(f'{path} is not a camera response: its values should rise from level 0 to level 255')
    rising = np.stack([_rising(levels[:, c]) for c in range(3)], axis=1)
    return rising * (_srgb(np.array(MID_GREY / 255)) / rising[MID_GREY])


def _rising(curve: NDArray[np.floating]) -> NDArray[np.floating]:
    """Interpolate where a curve decreases, which estimated tables do because of noise."""
    index = np.arange(len(curve))
    good = curve > np.concatenate([[-np.inf], np.maximum.accumulate(curve)[:-1]])
    return np.interp(index, index[good], curve[good])
