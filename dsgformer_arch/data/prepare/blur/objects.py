"""Moving objects: a foreground that moves over a differently moving background.

At every instant of the exposure the foreground f, premultiplied by its coverage α, is composited over the
background b: f + (1 - α)·b (Porter & Duff, SIGGRAPH 1984), in linear light.  The blurred image is the mean of
these composites.  Blurring f, α and b separately and compositing them afterwards would let the background
shine through where the two motions are correlated.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from dsgformer_arch.data.prepare.blur.settings import Range, check_range
from dsgformer_arch.data.prepare.blur.shake import (
    Homographies,
    Region,
    centred,
    expose,
    log_uniform,
    path_length,
    placed,
    reach,
    resampled,
    smooth_path,
    views_needed,
    warped,
)

OUTLINE_POINTS = 96
OVERSAMPLING = 8
"""Coverage is drawn this many times larger and reduced by an area filter, which smooths its edges.  OpenCV
fills the pixels of an outline too, so objects grow by up to half a pixel of the large drawing."""
SHIFT = 8
"""Fractional bits of polygon coordinates."""


@dataclass(frozen=True)
class Motion:
    """The distribution of objects and their motions.

    Attributes:
        count: range of the number of objects.
        radius: mean radius of an object, as a share of the image's shorter side, drawn log-uniformly.
        roughness: how far the outline departs from an ellipse, relative to its radius.
        turn: weight of an object's rotation against its translation, by how far they move its outline.
        growth: weight of its approach, likewise.
        steadiness: correlation time of its motion in exposures, drawn log-uniformly; see `Shake`.
    """

    count: Range = (1, 3)
    radius: Range = (0.06, 0.3)
    roughness: Range = (0.0, 0.35)
    turn: Range = (0.0, 0.6)
    growth: Range = (0.0, 0.3)
    steadiness: Range = (0.5, 8.0)

    def __post_init__(self) -> None:
        check_range('count', self.count, least=1, most=16)
        check_range('radius', self.radius, least=0.01, most=1.0)
        check_range('roughness', self.roughness, most=1.0)
        check_range('turn', self.turn)
        check_range('growth', self.growth)
        check_range('steadiness', self.steadiness, least=0.05)


@dataclass(frozen=True)
class Outline:
    """A closed outline.

    Attributes:
        points: (N, 2), x and y in pixels of the image.
        centre: x and y.
        radius: the mean distance from the centre.
    """

    points: NDArray[np.float64]
    centre: NDArray[np.float64]
    radius: float

    @property
    def box(self) -> Region:
        """The rectangle of pixels that it covers, with a margin of one."""
        left, top = np.floor(self.points.min(0)).astype(int) - 1
        right, bottom = np.ceil(self.points.max(0)).astype(int) + 2
        return Region(int(top), int(left), int(bottom - top), int(right - left))


@dataclass(frozen=True)
class Layer:
    """A foreground object, as it is in the sharp image.

    Attributes:
        light: float32 (h, w, 4): linear light times coverage, and coverage.
        source: its position in the image.
        views: how it moves; see `Homographies`.
    """

    light: NDArray[np.float32]
    source: Region
    views: Homographies


def draw_outline(rng: np.random.Generator, motion: Motion, height: int, width: int) -> Outline:
    """Draw an ellipse of random size, position and orientation with a few random lobes."""
    radius = log_uniform(rng, motion.radius) * min(height, width)
    centre = rng.random(2) * (width, height)
    angle = np.linspace(0, 2 * np.pi, OUTLINE_POINTS, endpoint=False)
    order = np.arange(2, 8)
    weights = rng.standard_normal((2, len(order))) / order
    lobes = weights[0] @ np.cos(np.outer(order, angle)) + weights[1] @ np.sin(np.outer(order, angle))
    size = np.maximum(1 + rng.uniform(*motion.roughness) * lobes, 0.15)
    stretch = np.exp(rng.uniform(-0.7, 0.7))
    ellipse = np.stack([stretch * np.cos(angle), np.sin(angle) / stretch], axis=1) * (radius * size[:, None])
    turn = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return Outline(ellipse @ rotation.T + centre, centre, float(radius))


def draw_motion(rng: np.random.Generator, motion: Motion, outline: Outline, length: float) -> Homographies:
    """Draw the motion of an object in the exposure: a path of `length` pixels, with rotation and scaling."""
    path = smooth_path(rng, 4, log_uniform(rng, motion.steadiness))
    turn, growth = rng.uniform(*motion.turn), rng.uniform(*motion.growth)
    path *= [1, 1, turn / outline.radius, growth / outline.radius]
    views = _similarities(path, outline.centre)
    box = outline.box
    # Lengths are measured over the object, not over the image.
    at_object = np.eye(3)
    at_object[:2, 2] = -box.left, -box.top
    local = at_object @ views @ np.linalg.inv(at_object)
    present = path_length(local, box.height, box.width)
    return views if not present else _similarities(path * (length / present), outline.centre)


def _similarities(path: NDArray[np.float64], centre: NDArray[np.float64]) -> Homographies:
    x, y, turn, growth = path.T
    a, b = np.exp(growth) * np.cos(turn), np.exp(growth) * np.sin(turn)
    zero, one = np.zeros_like(x), np.ones_like(x)
    cx, cy = centre
    moved_x, moved_y = cx + x - a * cx + b * cy, cy + y - b * cx - a * cy
    views = np.stack([a, -b, moved_x, b, a, moved_y, zero, zero, one], axis=1)
    return centred(views.reshape(-1, 3, 3))


def coverage(outline: Outline, source: Region) -> NDArray[np.float32]:
    """The coverage of each pixel of `source` by an outline, float32 (h, w) in [0, 1]."""
    # Pixel centres are whole numbers, so the larger drawing is shifted by half a pixel.
    points = (outline.points - (source.left, source.top) + 0.5) * OVERSAMPLING - 0.5
    large = np.zeros((source.height * OVERSAMPLING, source.width * OVERSAMPLING), np.uint8)
    cv2.fillPoly(large, [np.rint(points * 2**SHIFT).astype(np.int32)], 255, shift=SHIFT)
    small = cv2.resize(large, (source.width, source.height), interpolation=cv2.INTER_AREA)
    return np.asarray(small, dtype=np.float32) * np.float32(1 / 255)


def touches(outline: Outline, views: Homographies, region: Region) -> bool:
    """Whether an object with this motion may be visible in a region."""
    box = outline.box
    margin = 1 + reach(views, region)
    return (
        box.left - margin < region.left + region.width
        and box.left + box.width + margin > region.left
        and box.top - margin < region.top + region.height
        and box.top + box.height + margin > region.top
    )


def make_layer(outline: Outline, texture: NDArray[np.float32], views: Homographies) -> Layer:
    """Cut an object out of a texture.

    Args:
        outline: its outline.
        texture: linear light, float32 (h, w, 3), of the size of `outline.box`.
        views: how it moves.
    """
    alpha = coverage(outline, outline.box)[..., None]
    return Layer(np.concatenate([texture * alpha, alpha], axis=2), outline.box, views)


def composite(
    light: NDArray[np.float32], source: Region, views: Homographies, layers: list[Layer], region: Region
) -> NDArray[np.float32]:
    """Average the composites of background and objects over the exposure.

    Args:
        light: the background's linear light, float32 (h, w, 3).
        source: its position in the image.
        views: how the background moves, at `NODES` instants.
        layers: the objects, the nearest last, at the same instants.
        region: the region to render.

    Returns:
        float32 (region.height, region.width, 3).
    """
    moving = [views, *(layer.views for layer in layers)]
    count = max(views_needed(path, region) for path in moving)
    background, *foregrounds = (resampled(path, count) for path in moving)
    if not layers:
        return expose(light, source, background, region)
    total = np.zeros((region.height, region.width, 3), np.float32)
    for instant in range(count):
        scene = warped(light, placed(background[instant], region, source), region)
        for layer, path in zip(layers, foregrounds, strict=True):
            view = placed(path[instant], region, layer.source)
            flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
            front = cv2.warpPerspective(layer.light, view, (region.width, region.height), flags=flags)
            scene *= 1 - front[..., 3:]
            scene += front[..., :3]
        cv2.accumulate(scene, total)
    total *= 1 / count
    return total
