"""Sources of pairs of blurred and sharp images: one class per kind, with a common interface.

A source is a dataclass of settings.  `prepare` reads its data.  `sample` then draws a crop, or a whole image,
which depends on the random generator only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import cv2
import numpy as np
from numpy.typing import NDArray

from dsgformer_arch.data.prepare.blur.frames import FrameFolders
from dsgformer_arch.data.prepare.blur.objects import (
    Motion,
    Outline,
    composite,
    draw_motion,
    draw_outline,
    make_layer,
    touches,
)
from dsgformer_arch.data.prepare.blur.photographs import Photographs, Reduction
from dsgformer_arch.data.prepare.blur.realism import PLAIN, Camera, Realism
from dsgformer_arch.data.prepare.blur.response import response
from dsgformer_arch.data.prepare.blur.settings import Strength, check_range
from dsgformer_arch.data.prepare.blur.shake import (
    Homographies,
    Region,
    Shake,
    cut,
    expose,
    reach,
    resampled,
    views_needed,
)
from dsgformer_arch.utils.errors import UserError

CONTEXT = 8
"""Pixels around a crop that are rendered too, because demosaicing and JPEG depend on them."""
JPEG_BLOCK = 8

Image = NDArray[np.uint8]


@dataclass(frozen=True)
class Sample:
    """A pair.

    Attributes:
        lq: the blurred image, uint8 RGB (H, W, 3).
        gt: the sharp one, of the same size.
        name: of the image or frames that it was made from.
        length: of its blur in pixels, if known.
    """

    lq: Image
    gt: Image
    name: str
    length: float | None = None


class Source(ABC):
    """The interface of a source of pairs."""

    @abstractmethod
    def prepare(self, preload: bool = True) -> None:
        """Read the data that `sample` draws from.

        Args:
            preload: read the images that fit into memory now instead of on demand.

        Raises:
            UserError: it is missing or unusable.
        """

    @abstractmethod
    def sample(self, rng: np.random.Generator, side: int | None = None, number: int | None = None) -> Sample:
        """Draw a pair.

        Args:
            rng: source of randomness.
            side: height and width of a crop; None for a whole image.
            number: of the image, modulo their count; None draws one.
        """


def random_region(rng: np.random.Generator, height: int, width: int, side: int, name: str) -> Region:
    """A random square in an image.

    Raises:
        UserError: the image is smaller.
    """
    if min(height, width) < side:
        raise UserError(
            f'{name} is {width}×{height}, smaller than crops of {side}; lower gt_size or leave it out'
        )
    return Region(int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1)), side, side)


def detailed_region(
    rng: np.random.Generator, image: NDArray[Any], side: int, name: str, candidates: int
) -> Region:
    """Draw several squares in an image and return the one with most detail.

    Detail is the mean absolute difference of neighbouring pixels, of every second green value in brightness.

    Raises:
        UserError: the image is smaller.
    """
    height, width = image.shape[:2]
    regions = [random_region(rng, height, width, side, name) for _ in range(candidates)]
    return regions[0] if candidates == 1 else max(regions, key=lambda region: _detail(part(image, region)))


def _detail(image: NDArray[Any]) -> float:
    green = image[::2, ::2, 1].astype(np.float32)
    if image.dtype == np.uint16:  # linear light
        green = np.sqrt(green)
    return float(np.abs(np.diff(green, axis=0)).mean() + np.abs(np.diff(green, axis=1)).mean())


def check_candidates(candidates: int) -> None:
    """Raise ValueError unless it is a count."""
    if isinstance(candidates, bool) or not isinstance(candidates, int) or candidates < 1:
        raise ValueError(f'candidates is {candidates!r}, but should be a whole number of at least 1')


def with_context(region: Region, camera: Camera, rng: np.random.Generator) -> tuple[Region, Region]:
    """Widen a crop by the margin that the camera model needs.

    Returns:
        The wider region, and the position of the crop in it.
    """
    # A crop of a JPEG image begins anywhere in its grid of blocks.
    top, left = (int(offset) + CONTEXT for offset in rng.integers(JPEG_BLOCK, size=2))
    if camera.is_plain:
        return region, Region(0, 0, region.height, region.width)
    height, width = region.height + top + CONTEXT, region.width + left + CONTEXT
    wide = Region(region.top - top, region.left - left, height, width)
    return wide, Region(top, left, region.height, region.width)


def grown(region: Region, margin: int) -> Region:
    """A region with a margin."""
    return Region(
        region.top - margin, region.left - margin, region.height + 2 * margin, region.width + 2 * margin
    )


def part(image: NDArray[Any], region: Region) -> NDArray[Any]:
    """The pixels of a region within an image."""
    return image[region.top : region.top + region.height, region.left : region.left + region.width]


_opened: WeakValueDictionary[tuple[object, ...], Photographs] = WeakValueDictionary()
"""Open photographs by their settings, shared by the sources of a mixture."""


@dataclass
class _Rendered(Source):
    """Base of the sources that render photographs.

    Attributes:
        root: folder of sharp photographs, or several; subfolders count.
        match: pattern of file names.
        camera: the photographs' response, by which they become linear; see `response`.
        responses: those of the simulated cameras; one is drawn for each pair.
        reduction: how photographs are reduced.
        strength: how strong blurs are.
        realism: what the camera adds.
        candidates: number of crops that are drawn; the one with most detail is used.
        memory: megabytes for reduced photographs.
    """

    root: str | tuple[str, ...]
    match: str = '*'
    camera: str = 'srgb'
    responses: tuple[str, ...] = ('srgb',)
    reduction: Reduction = field(default_factory=Reduction)
    strength: Strength = field(default_factory=Strength)
    realism: Realism = field(default_factory=Realism)
    candidates: int = 1
    memory: float = 2048.0

    def __post_init__(self) -> None:
        if isinstance(self.responses, str):
            self.responses = (self.responses,)
        if not self.responses:
            raise ValueError('responses is empty; name one, such as srgb')
        check_candidates(self.candidates)
        for name in (self.camera, *self.responses):
            response(name)

    def prepare(self, preload: bool = True) -> None:
        what = (tuple(folders(self.root)), self.match, self.reduction, self.camera, self.memory)
        known = _opened.get(what)
        self.photographs = known or Photographs(*what, preload)
        _opened[what] = self.photographs

    def photograph(self, rng: np.random.Generator, number: int | None) -> tuple[NDArray[np.uint16], str]:
        """A photograph and its name; see `sample`."""
        drawn = int(rng.integers(len(self.photographs)))
        index = drawn if number is None else number % len(self.photographs)
        return self.photographs[index], self.photographs.files[index].stem

    def capture(
        self,
        light: Callable[[Camera, Region], NDArray[np.float32]],
        sharp: Callable[[Region], NDArray[np.float32]],
        region: Region,
        is_crop: bool,
        rng: np.random.Generator,
    ) -> tuple[Image, Image]:
        """The blurred and the sharp image of a region, both taken with the same camera."""
        camera = self.realism.draw(rng)
        curve = response(str(rng.choice(self.responses)))
        wide, inner = with_context(region, camera, rng) if is_crop else (region, None)
        blurred = camera.develop(light(camera, wide), curve, rng)
        if inner is not None:
            blurred = part(blurred, inner)
        return blurred, curve.to_display(sharp(region))


WHITE = np.ones(3, np.float32)


@dataclass
class ShakeSource(_Rendered):
    """Photographs blurred by camera shake.

    Attributes:
        shake: distribution of camera paths.
    """

    shake: Shake = field(default_factory=Shake)

    def sample(self, rng: np.random.Generator, side: int | None = None, number: int | None = None) -> Sample:
        image, name = self.photograph(rng, number)
        height, width = image.shape[:2]
        length = self.strength.draw(rng)
        views = self.shake.draw(rng, height, width, length)
        if side is None:
            region = inside(views, height, width)
        else:
            region = detailed_region(rng, image, side, name, self.candidates)

        def light(camera: Camera, wide: Region) -> NDArray[np.float32]:
            scene, source = cut(image, wide, reach(views, wide))
            scene = camera.brighten(scene, WHITE)
            return expose(scene, source, resampled(views, views_needed(views, wide)), wide)

        lq, gt = self.capture(light, lambda r: cut(image, r, 0)[0], region, side is not None, rng)
        return Sample(lq, gt, name, length)


def inside(views: Homographies, height: int, width: int) -> Region:
    """The largest part of an image that receives no light from beyond its border."""
    margin = reach(views, Region(0, 0, height, width))
    return Region(margin, margin, max(1, height - 2 * margin), max(1, width - 2 * margin))


@dataclass
class IdentitySource(ShakeSource):
    """Sharp images paired with themselves, so that a network learns not to change them.

    By default they are neither reduced nor given noise.
    """

    reduction: Reduction = field(default_factory=lambda: Reduction(least=1.0, longest_side=0))
    strength: Strength = field(default_factory=lambda: Strength(none=1.0))
    realism: Realism = field(default_factory=lambda: PLAIN)


@dataclass
class ObjectsSource(_Rendered):
    """Pieces of photographs that move over another photograph while the camera shakes.

    Attributes:
        shake: distribution of the camera's path.
        objects: distribution of objects and their motions.
    """

    shake: Shake = field(default_factory=Shake)
    objects: Motion = field(default_factory=Motion)

    def sample(self, rng: np.random.Generator, side: int | None = None, number: int | None = None) -> Sample:
        image, name = self.photograph(rng, number)
        height, width = image.shape[:2]
        length = self.strength.draw(rng)
        views = self.shake.draw(rng, height, width, length)
        outlines = [draw_outline(rng, self.objects, height, width) for _ in range(self.count(rng))]
        if side is None:
            region = inside(views, height, width)
        else:
            if min(height, width) < side:
                random_region(rng, height, width, side, name)
            region = self.at_edge(rng, outlines[-1], side, height, width)
        around = grown(region, CONTEXT + JPEG_BLOCK)
        layers, lengths = [], [length]
        for outline in outlines:
            object_length = self.strength.draw(rng)
            motion = draw_motion(rng, self.objects, outline, object_length)
            piece = self.texture(rng, outline.box)
            if touches(outline, motion, around):
                layers.append((outline, piece(), motion))
                lengths.append(object_length)

        def light(camera: Camera, wide: Region) -> NDArray[np.float32]:
            scene, source = cut(image, wide, reach(views, wide))
            made = [
                make_layer(outline, camera.brighten(texture, WHITE), motion)
                for outline, texture, motion in layers
            ]
            return composite(camera.brighten(scene, WHITE), source, views, made, wide)

        def sharp(region: Region) -> NDArray[np.float32]:
            scene, source = cut(image, region, 0)
            still = np.eye(3)[None].repeat(2, axis=0)
            made = [make_layer(outline, texture, still) for outline, texture, _ in layers]
            return composite(scene, source, still, made, region)

        lq, gt = self.capture(light, sharp, region, side is not None, rng)
        return Sample(lq, gt, name, max(lengths))

    def count(self, rng: np.random.Generator) -> int:
        """The number of objects."""
        low, high = self.objects.count
        return int(rng.integers(int(low), int(high) + 1))

    def at_edge(
        self, rng: np.random.Generator, outline: Outline, side: int, height: int, width: int
    ) -> Region:
        """A crop that the outline of an object crosses, if the image is large enough."""
        point = outline.points[rng.integers(len(outline.points))]
        left, top = np.rint(point - side / 2 + rng.uniform(-side / 3, side / 3, 2)).astype(int)
        return Region(int(np.clip(top, 0, height - side)), int(np.clip(left, 0, width - side)), side, side)

    def texture(self, rng: np.random.Generator, box: Region) -> Callable[[], NDArray[np.float32]]:
        """Draw a piece of some photograph, mirrored where the photograph is too small.

        Returns:
            A function that reads it: float32 (h, w, 3).
        """
        image = self.photographs[int(rng.integers(len(self.photographs)))]
        top = int(rng.integers(max(1, image.shape[0] - box.height + 1)))
        left = int(rng.integers(max(1, image.shape[1] - box.width + 1)))

        def piece() -> NDArray[np.float32]:
            light, found = cut(image, Region(top, left, box.height, box.width), 0)
            below, right = box.height - found.height, box.width - found.width
            mirrored = cv2.copyMakeBorder(light, 0, below, 0, right, cv2.BORDER_REFLECT)
            return np.asarray(mirrored, dtype=np.float32)

        return piece


@dataclass
class VideoSource(Source):
    """Averages of consecutive frames of high-frame-rate video, in linear light; the middle frame is sharp.

    Attributes:
        root: folder whose subfolders hold the frames of one run each.
        match: pattern of the subfolders' names.
        frames: range of the number of averaged frames, of which odd ones are drawn.
        camera: the frames' response; see `response`.
        realism: what the camera adds to the average.
        candidates: number of crops that are drawn; the one with most detail is used.
        memory: megabytes for decoded frames.
    """

    root: str
    match: str = '*'
    frames: tuple[int, int] = (1, 13)
    camera: str = 'srgb'
    realism: Realism = field(default_factory=Realism)
    candidates: int = 1
    memory: float = 2048.0

    def __post_init__(self) -> None:
        check_candidates(self.candidates)
        check_range('frames', self.frames, least=1)
        if not odd_numbers(self.frames):
            raise ValueError(f'frames is {list(self.frames)}, but should hold an odd number')
        response(self.camera)

    def prepare(self, preload: bool = True) -> None:
        fewest = min(odd_numbers(self.frames))
        self.runs = FrameFolders(Path(self.root).expanduser(), self.match, fewest, self.memory, preload)

    def sample(self, rng: np.random.Generator, side: int | None = None, number: int | None = None) -> Sample:
        drawn = int(rng.integers(len(self.runs)))
        run = drawn if number is None else number % len(self.runs)
        available = self.runs.count(run)
        count = int(rng.choice([n for n in odd_numbers(self.frames) if n <= available]))
        first = int(rng.integers(available - count + 1))
        name = f'{self.runs.name(run)}-{first:06d}-{count}'
        camera = self.realism.draw(rng)
        middle = self.runs.frame(run, first + count // 2)
        height, width = middle.shape[:2]
        if side is None:
            region = wide = inner = Region(0, 0, height, width)
        else:
            region = detailed_region(rng, middle, side, name, self.candidates)
            wide, inner = with_context(region, camera, rng)
        curve = response(self.camera)
        total = np.zeros((wide.height, wide.width, 3), np.float32)
        for number in range(first, first + count):
            frame = mirrored_part(self.runs.frame(run, number), wide)
            cv2.accumulate(camera.brighten(curve.to_linear(frame), curve.white), total)
        total *= 1 / count
        lq = part(camera.develop(total, curve, rng), inner)
        return Sample(lq, np.ascontiguousarray(part(middle, region)), name)


def odd_numbers(bounds: tuple[float, float]) -> list[int]:
    """The odd numbers from `bounds[0]` to `bounds[1]`."""
    return [n for n in range(int(bounds[0]), int(bounds[1]) + 1) if n % 2]


def mirrored_part(image: Image, region: Region) -> Image:
    """The pixels of a region, mirrored where it reaches beyond the image."""
    height, width = image.shape[:2]
    bottom, right = region.top + region.height, region.left + region.width
    beyond = (max(-region.top, 0), max(bottom - height, 0), max(-region.left, 0), max(right - width, 0))
    known = image[max(region.top, 0) : bottom, max(region.left, 0) : right]
    return np.asarray(cv2.copyMakeBorder(known, *beyond, cv2.BORDER_REFLECT_101), dtype=np.uint8)


def folders(root: str | tuple[str, ...]) -> list[Path]:
    """One path or several, with `~` expanded."""
    return [Path(name).expanduser() for name in ((root,) if isinstance(root, str) else root)]
