"""Camera effects other than motion blur: saturation, noise, colour, demosaicing, JPEG.

Networks trained on averaged frames fail on real blur because these are missing (Rim et al., "Realistic Blur
Synthesis for Learning Image Deblurring", ECCV 2022).  The order is the camera's: the sensor saturates, sees
one colour a pixel in its own colour space, and adds noise; the image signal processor (ISP) demosaics,
balances white, converts colours, applies the response, and compresses.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from dsgformer_arch.data.prepare.blur.response import Response
from dsgformer_arch.data.prepare.blur.settings import Range, check_probability, check_range
from dsgformer_arch.data.prepare.blur.shake import log_uniform

SATURATED = 0.95
"""Linear light relative to white above which a pixel of a photograph counts as clipped."""

SHOT_TO_READ = (2.18, 1.20, 0.26)
"""log(read) = 2.18·log(shot) + 1.20, with a standard deviation of 0.26: fitted to the cameras of the
Darmstadt Noise Dataset by Brooks et al., "Unprocessing Images for Learned Raw Denoising", CVPR 2019,
section 3.1."""
RED_GAIN, BLUE_GAIN = (1.9, 2.4), (1.5, 1.9)
"""White balance relative to green; the same paper, section 3.2."""

XYZ_TO_SRGB = np.array(
    [
        [3.2404542, -1.5371385, -0.4985314],
        [-0.9692660, 1.8760108, 0.0415560],
        [0.0556434, -0.2040259, 1.0572252],
    ]
)
"""IEC 61966-2-1, D65."""
XYZ_TO_CAMERA = {
    'Sony ILCE-7R': ((4913, -541, -202), (-6130, 13513, 2906), (-1564, 2151, 7183)),
    'Sony ILCE-7S': ((5838, -1430, -246), (-3497, 11477, 2297), (-748, 1885, 5778)),
    'Sony ILCE-7': ((5271, -712, -347), (-6153, 13653, 2763), (-1601, 2366, 7242)),
    'Sony ILCE-7RM2': ((6629, -1900, -483), (-4618, 12349, 2550), (-622, 1381, 6514)),
}
"""Colour matrices in units of 1/10000, as Adobe publishes them for raw files (tabulated in dcraw)."""

MOSAIC_BLACK, MOSAIC_WHITE = 4096.0, 49152.0
"""16-bit codes of black and white during demosaicing; noise may fall below black."""


@dataclass(frozen=True)
class Realism:
    """Switches and parameters of the camera effects.

    Each switch is the probability of the effect; true and false mean always and never.

    Attributes:
        saturation: highlights that the photograph clips are made brighter before the exposure, so that they
            leave saturated streaks after it.
        noise: shot and read noise, of variance shot·y + read at linear light y, white being 1.
        isp: noise (and the mosaic) are in a camera's own colours, with its white balance.
        demosaic: the sensor sees one colour a pixel (RGGB), the others are interpolated.
        jpeg: the blurred image goes through JPEG.
        highlight: how much light a clipped pixel has beyond white, where white is 1.
        shot: range of the shot noise's factor, drawn log-uniformly.  The read noise follows from it by
            `SHOT_TO_READ`.
        read: range of the read noise's variance instead, drawn log-uniformly, for a specific camera.
        quality: range of JPEG qualities.
    """

    saturation: float = 1.0
    noise: float = 1.0
    isp: float = 1.0
    demosaic: float = 1.0
    jpeg: float = 0.5
    highlight: Range = (0.25, 1.75)
    shot: Range = (1e-5, 1e-3)
    read: Range | None = None
    quality: Range = (75, 98)

    def __post_init__(self) -> None:
        for name in ('saturation', 'noise', 'isp', 'demosaic', 'jpeg'):
            check_probability(name, getattr(self, name))
        check_range('highlight', self.highlight)
        check_range('shot', self.shot, most=1.0)
        if self.read is not None:
            check_range('read', self.read, most=1.0)
        check_range('quality', self.quality, least=1, most=100)

    def draw(self, rng: np.random.Generator) -> Camera:
        """Draw one camera.  All settings consume the same random numbers, so switches are independent."""
        on = rng.random(5) < [self.saturation, self.noise, self.isp, self.demosaic, self.jpeg]
        highlight = rng.uniform(*self.highlight)
        shot = log_uniform(rng, self.shot)
        slope, offset, spread = SHOT_TO_READ
        read = float(np.exp(slope * np.log(shot) + offset + spread * rng.standard_normal()))
        drawn_read = log_uniform(rng, self.read or (1.0, 1.0))
        read = read if self.read is None else drawn_read
        colours = _draw_colours(rng)
        quality = round(rng.uniform(*self.quality))
        return Camera(
            highlight=highlight if on[0] else 0.0,
            shot=shot if on[1] else 0.0,
            read=read if on[1] else 0.0,
            colours=colours if on[2] else None,
            demosaic=bool(on[3]),
            quality=quality if on[4] else None,
        )


PLAIN = Realism(saturation=0, noise=0, isp=0, demosaic=0, jpeg=0)
"""Settings without any effect but the exposure and the response."""


def _draw_colours(rng: np.random.Generator) -> NDArray[np.float32]:
    """A camera's colours, white balance included: the matrix from linear sRGB to raw values, (3, 3).

    White becomes (1/red gain, 1, 1/blue gain).
    """
    weights = rng.dirichlet(np.ones(len(XYZ_TO_CAMERA)))
    xyz_to_camera = np.tensordot(weights, np.array(list(XYZ_TO_CAMERA.values())) / 1e4, axes=1)
    matrix = xyz_to_camera @ np.linalg.inv(XYZ_TO_SRGB)
    matrix /= matrix.sum(1, keepdims=True)  # neutral colours stay neutral, as after white balance
    gains = np.array([rng.uniform(*RED_GAIN), 1.0, rng.uniform(*BLUE_GAIN)])
    return np.asarray(matrix / gains[:, None], dtype=np.float32)


@dataclass(frozen=True)
class Camera:
    """One camera with its settings; see `Realism`.  Effects that are off are 0 or None.

    Attributes:
        highlight: light beyond white of clipped pixels.
        shot: factor of the noise's variance.
        read: constant part of the noise's variance.
        colours: (3, 3), linear sRGB to raw values.
        demosaic: whether the sensor has a colour filter array.
        quality: of JPEG.
    """

    highlight: float = 0.0
    shot: float = 0.0
    read: float = 0.0
    colours: NDArray[np.float32] | None = None
    demosaic: bool = False
    quality: int | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it has no effect."""
        return not (self.highlight or self.shot or self.read or self.demosaic or self.quality)

    def brighten(self, light: NDArray[np.float32], white: NDArray[np.float32]) -> NDArray[np.float32]:
        """Brighten clipped highlights beyond white; applied before the exposure.

        Args:
            light: linear light, float32 (H, W, 3).
            white: (3,): the light at which the image clips.
        """
        if not self.highlight:
            return light
        start = SATURATED * white
        clipped = np.clip((light - start) / (white - start), 0, 1)
        clipped *= np.float32(self.highlight) * white
        return np.asarray(light + clipped, dtype=np.float32)

    def develop(
        self, light: NDArray[np.float32], curve: Response, rng: np.random.Generator
    ) -> NDArray[np.uint8]:
        """Convert exposed light to the image that the camera stores.

        Args:
            light: linear light, float32 (H, W, 3); what exceeds the response's white saturates here.
            curve: the camera's response.
            rng: source of the noise.

        Returns:
            uint8 RGB (H, W, 3).
        """
        if self.highlight:
            light = np.minimum(light, curve.white)
        light = self.sense(light, rng, float(curve.white.max()))
        image = curve.to_display(light)
        if self.quality is not None:
            image = jpeg(image, self.quality)
        return image

    def sense(
        self, light: NDArray[np.float32], rng: np.random.Generator, white: float = 1.0
    ) -> NDArray[np.float32]:
        """Apply colours, mosaic and noise of the sensor, and invert colours and mosaic as an ISP does.

        Args:
            light: linear light, float32 (H, W, 3).
            rng: source of the noise.
            white: the largest light of interest; above 1 for responses with more range than sRGB.

        Returns:
            float32 (H, W, 3); not clipped.
        """
        if not (self.shot or self.read or self.demosaic):
            return light
        raw = light if self.colours is None else _transformed(light, self.colours)
        if self.demosaic:
            raw = demosaiced(self.noisy(mosaic(raw), rng), white)
        else:
            raw = self.noisy(raw, rng)
        if self.colours is not None:
            raw = _transformed(raw, np.linalg.inv(self.colours))
        return raw

    def noisy(self, raw: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
        """Add Gaussian noise of variance shot·y + read (Foi et al., IEEE TIP 2008)."""
        if not (self.shot or self.read):
            return raw
        deviation = np.maximum(raw, 0)
        deviation *= np.float32(self.shot)
        deviation += np.float32(self.read)
        np.sqrt(deviation, out=deviation)
        deviation *= rng.standard_normal(raw.shape, dtype=np.float32)
        return np.asarray(raw + deviation, dtype=np.float32)


def _transformed(light: NDArray[np.float32], matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(cv2.transform(light, matrix), dtype=np.float32)


def mosaic(raw: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sample an image (H, W, 3) with an RGGB colour filter array: (H, W)."""
    seen = raw[..., 1].copy()
    seen[::2, ::2] = raw[::2, ::2, 0]
    seen[1::2, 1::2] = raw[1::2, 1::2, 2]
    return seen


def demosaiced(seen: NDArray[np.float32], white: float = 1.0) -> NDArray[np.float32]:
    """Interpolate the missing colours of an RGGB mosaic along edges (OpenCV's edge-aware method).

    Args:
        seen: float32 (H, W), may be a little below 0 and above `white`.
        white: light of the highest code, less some headroom.

    Returns:
        float32 (H, W, 3).
    """
    scale = (MOSAIC_WHITE - MOSAIC_BLACK) / white
    codes = np.clip(seen * np.float32(scale) + np.float32(MOSAIC_BLACK + 0.5), 0, 65535).astype(np.uint16)
    full = cv2.cvtColor(codes, cv2.COLOR_BayerRGGB2RGB_EA).astype(np.float32)
    full -= MOSAIC_BLACK
    full *= 1 / scale
    return full


def jpeg(image: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    """Compress with JPEG (4:2:0) and decode again."""
    data = cv2.imencode('.jpg', image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    decoded = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), dtype=np.uint8)
    return np.ascontiguousarray(decoded[..., ::-1])
