"""Blur from video: the mean of consecutive frames in linear light, paired with their middle frame.

This is how GoPro (Nah et al., CVPR 2017) and REDS (Nah et al., CVPRW 2019) were made.  A shutter
that closes between frames leaves gaps in the streaks; frames interpolated along the optical flow
fill them, as in REDS.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dsgformer_arch.data.image_files import read_image
from dsgformer_arch.data.prepare.blur.frames import frame_files
from dsgformer_arch.data.prepare.blur.realism import Realism
from dsgformer_arch.data.prepare.blur.response import response
from dsgformer_arch.data.prepare.blur.settings import check_range
from dsgformer_arch.data.prepare.blur.sources import Sample, odd_numbers
from dsgformer_arch.data.prepare.layouts import make_key
from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.progress import track

Image = NDArray[np.uint8]

VIDEO_SUFFIXES = frozenset({'.mp4', '.mov', '.m4v', '.mkv', '.avi', '.webm', '.mpg', '.mpeg', '.mts'})
THUMBNAIL = (64, 36)
"""Width and height of the thumbnails in which cuts and static parts are found; they contain little noise."""
CUT_CHANGE, CUT_RATIO, CUT_NEIGHBOURS = 12.0, 4.0, 8
"""Lower bounds for a cut: the mean change of the thumbnail in levels, and its ratio to the changes around it,
as a fast pan changes all frames alike."""
FASTEST_SHARE = 99.0
"""Percentile of the optical flow's lengths that decides how many frames are interpolated."""


class Clip(ABC):
    """Consecutive frames.

    Attributes:
        path: a video file or a folder of frames.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def scan(self) -> Iterator[tuple[int, Image]]:
        """All frames, uint8 RGB (H, W, 3), each with its stamp, by which `frames` finds it again."""

    @abstractmethod
    def frames(self, stamp: int) -> Iterator[Image]:
        """The frame of a stamp and those after it."""


class FolderClip(Clip):
    """A folder of frames, one image each, in the order of their names."""

    def scan(self) -> Iterator[tuple[int, Image]]:
        return enumerate(self.frames(0))

    def frames(self, stamp: int) -> Iterator[Image]:
        return map(read_image, frame_files(self.path)[stamp:])


class FileClip(Clip):
    """A video file, decoded by PyAV (FFmpeg).  Stamps are presentation times in the stream's unit."""

    def scan(self) -> Iterator[tuple[int, Image]]:
        return self._decode(None)

    def frames(self, stamp: int) -> Iterator[Image]:
        frames = self._decode(stamp)
        found = next(frames, None)
        while found is not None and found[0] < stamp:
            found = next(frames, None)
        if found is None or found[0] != stamp:
            # Some containers seek past the requested stamp.
            frames = ((number, image) for number, image in self._decode(None) if number >= stamp)
        else:
            yield found[1]
        for _, image in frames:
            yield image

    def _decode(self, near: int | None) -> Iterator[tuple[int, Image]]:
        """Frames from the key frame before a stamp on, or from the start."""
        av = _pyav()
        try:
            with av.open(str(self.path)) as container:
                stream = container.streams.video[0]
                stream.thread_type = 'AUTO'
                if near is not None:
                    container.seek(near, stream=stream)
                for number, frame in enumerate(container.decode(stream)):
                    # Raw streams have no times: there, frames are counted, and seeking finds no stamp.
                    stamp = frame.pts if frame.pts is not None else number
                    yield int(stamp), frame.to_ndarray(format='rgb24')
        except (av.FFmpegError, IndexError) as error:
            raise UserError(f'{self.path} cannot be decoded as video ({error}); convert it') from None


def _pyav() -> Any:
    try:
        import av  # an optional dependency
    except ImportError:
        raise UserError('reading video files takes PyAV: pip install dsgformer[video]') from None
    return av


def find_clips(roots: Sequence[Path]) -> list[Clip]:
    """Video files and folders of frames: those that are named, and those below the folders that are named.

    Raises:
        UserError: a path does not exist, or there is nothing.
    """
    clips: list[Clip] = []
    for root in roots:
        if root.is_file():
            clips.append(FileClip(root))
        elif root.is_dir():
            for path in (root, *sorted(root.rglob('*'))):
                if path.is_dir() and len(frame_files(path)) > 1:
                    clips.append(FolderClip(path))
                elif path.is_file() and path.suffix.lower() in VIDEO_SUFFIXES:
                    clips.append(FileClip(path))
        else:
            raise UserError(f'{root} does not exist; give video files or folders of frames')
    if not clips:
        raise UserError(f'{roots[0]} holds neither video files nor folders of frames')
    return clips


@dataclass(frozen=True)
class Averaging:
    """How frames are averaged.

    Attributes:
        frames: how many, the fewest and the most; odd numbers in between are drawn, so that there is a
            middle.
        camera: the frames' response; see `response`.
        interpolate: at most so many steps from frame to frame, of which all but the last are interpolated
            along the optical flow; 1 for none.  As many are taken as keep the fastest motion below
            `step` pixels.
        step: in pixels.
        static: a window in which no part of the image changes by this many levels is skipped.
        realism: what the camera adds to the average.
    """

    frames: tuple[int, int] = (5, 15)
    camera: str = 'srgb'
    interpolate: int = 1
    step: float = 1.5
    static: float = 3.0
    realism: Realism = field(default_factory=Realism)

    def __post_init__(self) -> None:
        check_range('frames', self.frames, least=1)
        if not odd_numbers(self.frames):
            raise ValueError(f'frames is {list(self.frames)}, but should hold an odd number')
        if not isinstance(self.interpolate, int) or self.interpolate < 1:
            raise ValueError(f'interpolate is {self.interpolate!r}, but should be a whole number, 1 for none')
        if not isinstance(self.step, (int, float)) or not self.step > 0:
            raise ValueError(f'step is {self.step!r}, but should be a number of pixels above 0')
        if not isinstance(self.static, (int, float)) or not self.static >= 0:
            raise ValueError(f'static is {self.static!r}, but should be a number of levels of at least 0')
        response(self.camera)


@dataclass(frozen=True)
class Window:
    """Consecutive frames of a clip that make one pair.

    Attributes:
        clip: the clip.
        first: number of the first frame.
        count: how many frames, an odd number.
        stamp: of the first frame; see `Clip`.
    """

    clip: Clip
    first: int
    count: int
    stamp: int

    @property
    def key(self) -> str:
        name = self.clip.path.stem if isinstance(self.clip, FileClip) else self.clip.path.name
        return f'{make_key(name)}-{self.first:06d}-{self.count:02d}'


def find_windows(clips: Sequence[Clip], how: Averaging, seed: int) -> list[Window]:
    """Divide clips into consecutive windows, without cuts and static parts.

    Args:
        clips: what to divide.
        how: how frames are averaged.
        seed: for the lengths of the windows.

    Raises:
        UserError: there is no window at all, or two clips have one name.
    """
    windows: list[Window] = []
    choices = odd_numbers(how.frames)
    for number, clip in enumerate(clips):
        stamps, thumbnails = [], []
        for stamp, frame in track(clip.scan(), f'looking through {clip.path.name}'):
            stamps.append(stamp)
            thumbnails.append(_thumbnail(frame))
        rng = np.random.default_rng([seed, number])
        for first, last in _shots(thumbnails):
            while last - first >= choices[0]:
                count = int(rng.choice([n for n in choices if n <= last - first]))
                change = _change(thumbnails[first], thumbnails[first + count - 1]).max()
                if count == 1 or change >= how.static:
                    windows.append(Window(clip, first, count, stamps[first]))
                first += count
    if not windows:
        raise UserError(
            f'{clips[0].path} and the others have no {choices[0]} frames in a row in which something moves; '
            'lower the number of frames or the threshold for static parts'
        )
    keys = {window.key: window.clip.path for window in windows}
    for window in windows:
        if keys[window.key] != window.clip.path:
            raise UserError(f'{window.clip.path} and {keys[window.key]} have one name; rename one of them')
    return windows


def _thumbnail(frame: Image) -> Image:
    grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    return np.asarray(cv2.resize(grey, THUMBNAIL, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def _change(a: Image, b: Image) -> NDArray[np.uint8]:
    return np.asarray(cv2.absdiff(a, b), dtype=np.uint8)


def _shots(thumbnails: Sequence[Image]) -> list[tuple[int, int]]:
    """The first frame of each shot and the first one after it."""
    changes = np.array([_change(a, b).mean() for a, b in pairwise(thumbnails)])
    cuts = []
    for place, change in enumerate(changes):
        start = max(0, place - CUT_NEIGHBOURS)
        around = np.delete(changes[start : place + 1 + CUT_NEIGHBOURS], place - start)
        if change >= CUT_CHANGE and (not len(around) or change > CUT_RATIO * np.median(around)):
            cuts.append(place + 1)
    return list(pairwise([0, *cuts, len(thumbnails)]))


def average(window: Window, how: Averaging, rng: np.random.Generator) -> Sample:
    """Make the pair of a window.

    Args:
        window: which frames.
        how: how they are averaged.
        rng: source of randomness for the camera.
    """
    frames = list(islice(window.clip.frames(window.stamp), window.count))
    curve, camera = response(how.camera), how.realism.draw(rng)
    light = [camera.brighten(curve.to_linear(frame), curve.white) for frame in frames]
    flows = [optical_flows(a, b) for a, b in pairwise(frames)] if how.interpolate > 1 else []
    speeds = [np.percentile(np.linalg.norm(flow, axis=2), FASTEST_SHARE) for flow, _ in flows]
    steps = int(np.clip(np.ceil(max(speeds, default=0) / how.step), 1, how.interpolate))
    total = light[0].copy()
    for number, after in enumerate(light[1:]):
        for step in range(1, steps):
            total += interpolated(light[number], after, *flows[number], step / steps)
        total += after
    total *= 1 / ((len(light) - 1) * steps + 1)
    return Sample(camera.develop(total, curve, rng), frames[len(frames) // 2], window.key)


def optical_flows(a: Image, b: Image) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The optical flow from each of two frames to the other, by DIS (Kroeger et al., ECCV 2016).

    Returns:
        Two float32 arrays (H, W, 2): x and y in pixels.
    """
    method: Any = cv2.DISOpticalFlow.create(cv2.DISOpticalFlow_PRESET_MEDIUM)
    first, second = (cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (a, b))
    return method.calc(first, second, None), method.calc(second, first, None)


def interpolated(
    a: NDArray[np.float32],
    b: NDArray[np.float32],
    forward: NDArray[np.float32],
    backward: NDArray[np.float32],
    time: float,
) -> NDArray[np.float32]:
    """A frame between two: both moved along the flow, and averaged with more weight on the nearer one.

    Args:
        a: the frame before, linear light, float32 (H, W, 3).
        b: the frame after.
        forward: optical flow from `a` to `b`.
        backward: optical flow from `b` to `a`.
        time: 0 at `a`, 1 at `b`.
    """
    height, width = a.shape[:2]
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    moved = []
    for frame, flow, part in ((a, forward, time), (b, backward, 1 - time)):
        place = np.float32(part) * flow
        moved.append(
            cv2.remap(
                frame, x - place[..., 0], y - place[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
            )
        )
    return np.asarray((1 - time) * moved[0] + time * moved[1], dtype=np.float32)
