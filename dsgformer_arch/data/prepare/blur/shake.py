"""Camera shake: a camera that moves in six degrees of freedom while the shutter is open.

The scene is a plane, generally not parallel to the sensor, so depth changes across the image.  A camera that
is rotated by R and moved by t sees the plane n·X = 1 through the homography K (R + t nᵀ) K⁻¹ (Hartley &
Zisserman, "Multiple View Geometry", 2nd edition, section 13.1).  The blurred image is the mean of the views
over the exposure in linear light, so it varies across the image with rotation, depth and focal length and
needs no approximation by kernels (Whyte et al., "Non-uniform Deblurring for Shaken Images", IJCV 2012).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from dsgformer_arch.data.prepare.blur.settings import Range, check_range

LINEAR_WHITE = 65535
"""The 16-bit code of linear light 1."""
NODES = 65
"""Instants of the exposure at which a path is drawn; between them it is straight."""
SENSOR_WIDTH = 36.0
"""Width of the sensor in millimetres to which focal lengths refer (35 mm film)."""
SPACING = 1.25
"""Largest distance in pixels between two of the views that are averaged."""
MOST_VIEWS = 96
STILL = 1e-3
"""Motion in pixels below which an image counts as static."""
SHALLOWEST = 0.2
"""Smallest inverse depth of the scene in an image's corner, where the image's centre has 1."""

Homographies = NDArray[np.float64]
"""(N, 3, 3): each maps a pixel (x, y, 1) of the blurred image to where its light comes from in the sharp one,
at one of N instants that share the exposure equally."""


class Region(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Shake:
    """The distribution of camera paths.

    Rotations about the sensor's two axes (pitch and yaw) dominate hand-held blur; the weights below compare
    the other four degrees of freedom with them, by how far they move the image.

    Attributes:
        roll: weight of the rotation about the optical axis, drawn from this range.
        shift: weight of the translation parallel to the sensor, which blurs near objects more.
        approach: weight of the translation along the optical axis.
        tilt: angle between the scene's plane and the sensor in degrees.
        focal_length: in millimetres for a 36 mm wide sensor, drawn log-uniformly.
        steadiness: correlation time of the motion in exposures, drawn log-uniformly: below 1 the path is
            shaky, far above 1 it is straight.
    """

    roll: Range = (0.0, 0.6)
    shift: Range = (0.0, 0.6)
    approach: Range = (0.0, 0.3)
    tilt: Range = (0.0, 60.0)
    focal_length: Range = (24.0, 85.0)
    steadiness: Range = (0.15, 4.0)

    def __post_init__(self) -> None:
        for name in ('roll', 'shift', 'approach'):
            check_range(name, getattr(self, name))
        check_range('tilt', self.tilt, most=80.0)
        check_range('focal_length', self.focal_length, least=8.0)
        check_range('steadiness', self.steadiness, least=0.05)

    def draw(self, rng: np.random.Generator, height: int, width: int, length: float) -> Homographies:
        """Draw the path of a camera during one exposure.

        Args:
            rng: source of randomness.
            height: of the image in pixels.
            width: of the image in pixels.
            length: of the blur in pixels; see `Strength`.

        Returns:
            `NODES` homographies whose mean is the identity: blurred and sharp image are aligned.
        """
        motion = smooth_path(rng, 6, log_uniform(rng, self.steadiness))
        focal = log_uniform(rng, self.focal_length) / SENSOR_WIDTH * max(height, width)
        roll, shift, approach = (rng.uniform(*r) for r in (self.roll, self.shift, self.approach))
        radius = np.hypot(height, width) / 4
        motion[:, :3] *= 1 / focal, 1 / focal, roll / radius
        motion[:, 3:] *= shift / focal, shift / focal, approach / radius
        slope = np.tan(np.radians(rng.uniform(*self.tilt)))
        slope = min(slope, (1 - SHALLOWEST) * focal / (2 * radius))
        azimuth = rng.uniform(0, 2 * np.pi)
        plane = np.array([slope * np.cos(azimuth), slope * np.sin(azimuth), 1.0])
        camera = np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1.0]])
        views = _views(motion, plane, camera)
        present = path_length(views, height, width)
        return views if not present else _views(motion * (length / present), plane, camera)


def smooth_path(rng: np.random.Generator, dimensions: int, correlation_time: float) -> NDArray[np.float64]:
    """A random smooth path: the position of a critically damped spring that white noise drives.

    This second-order process is the Gaussian process with covariance (1 + r)·exp(-r), r = √3·|Δt| / τ
    (Matérn 3/2; Rasmussen & Williams, "Gaussian Processes for Machine Learning", section 4.2.1).

    Args:
        rng: source of randomness.
        dimensions: how many independent coordinates.
        correlation_time: τ, where the exposure lasts 1.

    Returns:
        (NODES, dimensions), with mean 0 over time.
    """
    time = np.linspace(0, 1, NODES)
    distance = np.sqrt(3) * np.abs(time[:, None] - time) / correlation_time
    covariance = (1 + distance) * np.exp(-distance) + 1e-9 * np.eye(NODES)
    path = np.linalg.cholesky(covariance) @ rng.standard_normal((NODES, dimensions))
    return path - path.mean(0)


def log_uniform(rng: np.random.Generator, bounds: Range) -> float:
    """A log-uniform random number."""
    low, high = np.log(np.maximum(bounds, 1e-12))
    return float(np.exp(rng.uniform(low, high)))


def _views(
    motion: NDArray[np.float64], plane: NDArray[np.float64], camera: NDArray[np.float64]
) -> Homographies:
    """Homographies of camera poses (N, 6): a rotation vector and a translation each."""
    angle = np.linalg.norm(motion[:, :3], axis=1)[:, None, None]
    x, y, z = motion[:, :3].T
    zero = np.zeros_like(x)
    cross = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=1).reshape(-1, 3, 3)
    # Rodrigues' formula; sinc keeps it exact at angle 0.
    rotation = (
        np.eye(3) + np.sinc(angle / np.pi) * cross + np.sinc(angle / (2 * np.pi)) ** 2 / 2 * cross @ cross
    )
    views = camera @ (rotation + motion[:, 3:, None] * plane) @ np.linalg.inv(camera)
    return centred(views)


def centred(views: Homographies) -> Homographies:
    """Compose each homography with the inverse of their mean, which makes the mean the identity."""
    views = views / views[:, 2:, 2:]
    views = np.linalg.inv(views.mean(0)) @ views
    return np.asarray(views, dtype=np.float64)


def displacements(views: Homographies, points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Displacement of each view, (N, P, 2) in pixels, at points (P, 2) of the form (x, y)."""
    mapped = np.concatenate([points, np.ones((len(points), 1))], axis=1) @ views.transpose(0, 2, 1)
    return np.asarray(mapped[..., :2] / mapped[..., 2:] - points, dtype=np.float64)


def grid(region: Region, count: int) -> NDArray[np.float64]:
    """count² points (x, y) from corner to corner of a region."""
    x = np.linspace(region.left, region.left + region.width - 1, count)
    y = np.linspace(region.top, region.top + region.height - 1, count)
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)


def path_length(views: Homographies, height: int, width: int) -> float:
    """The blur's length in pixels, as `Strength` defines it."""
    moved = displacements(views, grid(Region(0, 0, height, width), 3))
    return float(np.hypot(*np.ptp(moved, axis=0).T).mean())


def views_needed(views: Homographies, region: Region) -> int:
    """The number of views for which no point of a region moves by more than `SPACING` between two of them.

    At most `MOST_VIEWS`, and one if nothing moves.
    """
    moved = displacements(views, grid(region, 2))
    speed = np.linalg.norm(np.diff(moved, axis=0), axis=2).max() * (len(views) - 1)
    return 1 if speed < STILL else min(1 + int(np.ceil(speed / SPACING)), MOST_VIEWS)


def resampled(views: Homographies, count: int) -> Homographies:
    """The views of a path at `count` instants, one for each equal part of the exposure."""
    instants = (np.arange(count) + 0.5) / count * (len(views) - 1)
    before = np.minimum(instants.astype(int), len(views) - 2)
    part = (instants - before)[:, None, None]
    # The mean of fewer views is only approximately the identity.
    return centred((1 - part) * views[before] + part * views[before + 1])


def reach(views: Homographies, region: Region) -> int:
    """The margin around a region from which it receives light, in whole pixels."""
    furthest = np.abs(displacements(views, grid(region, 3))).max()
    return int(np.ceil(furthest)) + 2 if furthest else 0


def placed(view: NDArray[np.float64], region: Region, source: Region) -> NDArray[np.float64]:
    """The homography from pixels of `region` to pixels of `source`, of one between whole images."""
    to_source, from_region = np.eye(3), np.eye(3)
    to_source[:2, 2] = -source.left, -source.top
    from_region[:2, 2] = region.left, region.top
    return np.asarray(to_source @ view @ from_region, dtype=np.float64)


def cut(image: NDArray[np.uint16], region: Region, margin: int) -> tuple[NDArray[np.float32], Region]:
    """A region of an image in linear light, with a margin where the image extends beyond it.

    Returns:
        float32 (h, w, 3), 1 is white; and its position.
    """
    top, left = max(region.top - margin, 0), max(region.left - margin, 0)
    bottom = min(region.top + region.height + margin, image.shape[0])
    right = min(region.left + region.width + margin, image.shape[1])
    part = image[top:bottom, left:right].astype(np.float32)
    part *= 1 / LINEAR_WHITE
    return part, Region(top, left, bottom - top, right - left)


def expose(
    light: NDArray[np.float32], source: Region, views: Homographies, region: Region
) -> NDArray[np.float32]:
    """Average the views of an image over the exposure.

    Args:
        light: linear light of a part of the image, float32 (h, w, 3); mirrored beyond its border.
        source: position of that part.
        views: from `resampled`.
        region: the region to render.

    Returns:
        float32 (region.height, region.width, 3).
    """
    total = np.zeros((region.height, region.width, 3), np.float32)
    for view in views:
        cv2.accumulate(warped(light, placed(view, region, source), region), total)
    total *= 1 / len(views)
    return total


def warped(
    light: NDArray[np.float32],
    view: NDArray[np.float64],
    region: Region,
) -> NDArray[np.float32]:
    """One view.

    Interpolation is cubic: linear interpolation would also blur across the motion, and a network would learn
    to sharpen accordingly.  Next to bright points it undershoots 0 by a few per cent of their light.
    """
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    size = (region.width, region.height)
    return np.asarray(
        cv2.warpPerspective(light, view, size, flags=flags, borderMode=cv2.BORDER_REFLECT_101), np.float32
    )
