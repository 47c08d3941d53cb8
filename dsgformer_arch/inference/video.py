"""Restore videos with PyAV: frames are decoded, restored and encoded; all other streams are copied.

Frames are written in parts of a few seconds.  Each part is an encoded file, written atomically to a folder
next to the result.  A run that was interrupted restores only the missing parts.  At the end the parts are
joined with the other streams of the source, without encoding anything again.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.files import write_atomically, write_text
from dsgformer_arch.utils.progress import track
from dsgformer_arch.utils.text import one_line

if TYPE_CHECKING:
    from dsgformer_arch.inference.deblur import Result
    from dsgformer_arch.inference.deblurrer import Deblurrer

T = TypeVar('T')

ENCODERS: dict[str, tuple[str, dict[str, str]]] = {
    # Without B-frames, decoding order is display order, so that parts can be joined.
    'h264': ('libx264', {'crf': '16', 'preset': 'medium', 'bf': '0'}),
    'hevc': ('libx265', {'crf': '18', 'preset': 'medium', 'x265-params': 'bframes=0:log-level=error'}),
    'vp8': ('libvpx', {'crf': '10', 'b': '8M'}),
    'vp9': ('libvpx-vp9', {'crf': '22', 'b': '0', 'row-mt': '1', 'auto-alt-ref': '0'}),
    'av1': ('libsvtav1', {'crf': '22', 'preset': '8', 'svtav1-params': 'pred-struct=1'}),
    'mpeg4': ('mpeg4', {'qscale': '2', 'bf': '0'}),
    'mjpeg': ('mjpeg', {'qscale': '2'}),
    'prores': ('prores_ks', {}),
    'ffv1': ('ffv1', {'level': '3'}),
    'rawvideo': ('rawvideo', {}),
}
"""Encoder and its options by codec of the source.  Any other codec is encoded as H.264."""

PART = 64
"""Frames of a part; an interrupted run restores at most these again."""

AHEAD = 16
"""Frames that are decoded ahead."""


@dataclass
class _Counts:
    """Statistics of a part, or of all parts.

    Attributes:
        frames: frames written.
        damaged: frames that are damaged in the source; they are copied.
        lost: packets that cannot be decoded.
        notes: remarks of the restorer, as sentences.
    """

    frames: int = 0
    damaged: int = 0
    lost: int = 0
    notes: list[str] = field(default_factory=list)


def deblur_video(
    restorer: Deblurrer,
    source: str,
    target: str,
    result: Result,
    tick: Callable[[float], None] = lambda fraction: None,
) -> None:
    """Restore a video.

    Frame rate, time stamps (also of a variable rate), audio, subtitles, metadata, colour range and colour
    space are kept; a rotation is applied.  Frames that are damaged in the source are copied.

    Args:
        restorer: restores the frames.
        source: path of the video.
        target: path of the result; its suffix names the container.
        result: filled in: frames, megapixels, seconds, notes.
        tick: called with the fraction of the frames that is done.

    Raises:
        UserError: PyAV is missing, the file is not a video, or its streams do not fit the container.
    """
    av = _pyav()
    os.makedirs(os.path.dirname(os.path.abspath(target)), exist_ok=True)
    folder = Path(f'{target}.parts')
    try:
        plan = _plan(av, source)
        _open_folder(folder, {**plan.identity, **_settings(restorer)})
        counts = _restore_parts(av, restorer, source, plan, folder, result, tick)
        if not counts.frames:
            raise UserError(f'{source}: not one frame of this video can be decoded')
        write_atomically(lambda path: _join(av, source, plan, folder, path, target), target)
    except av.error.FFmpegError as error:
        raise UserError(f'{source} cannot be restored: {one_line(error)}') from None
    shutil.rmtree(folder)
    result.frames = counts.frames
    result.megapixels = round(counts.frames * plan.width * plan.height / 1e6, 6)
    result.notes += counts.notes
    if counts.damaged:
        result.notes.append(f'{counts.damaged} damaged frames were copied')
    if counts.lost:
        result.notes.append(f'{counts.lost} packets could not be decoded; their frames are missing')


def describe_video(path: str) -> dict[str, Any]:
    """Describe a video file.

    Raises:
        UserError: PyAV is missing, or the file is not a video.
    """
    av = _pyav()
    try:
        plan = _plan(av, path)
        with av.open(path, metadata_errors='replace') as container:
            others = [
                f'{s.type} ({s.codec_context.name})'
                for s in container.streams
                if s.type != 'video' and s.codec_context
            ]
            duration = None if container.duration is None else float(container.duration / av.time_base)
    except av.error.FFmpegError as error:
        raise UserError(f'{path} cannot be read: {one_line(error)}') from None
    return {
        'kind': 'video',
        'codec': plan.codec,
        'width': plan.width,
        'height': plan.height,
        'frames per second': None if plan.rate is None else round(float(plan.rate), 3),
        'seconds': duration,
        'pixel format': plan.pixel_format,
        'other streams': others,
    }


@dataclass(frozen=True)
class _Plan:
    """Properties of a video that are known before its frames are decoded; size after its rotation."""

    identity: dict[str, Any]
    index: int
    codec: str
    width: int
    height: int
    pixel_format: str
    rate: Fraction | None
    time_base: Fraction
    turns: int
    frames: int | None
    colours: dict[str, Any]
    aspect: Fraction | None

    @property
    def rgb_format(self) -> str:
        """Pixel format of the arrays that are restored: 16 bits where the video has more than 8."""
        return (
            'rgb48le'
            if any(mark in self.pixel_format for mark in ('10', '12', '14', '16', '48'))
            else 'rgb24'
        )


def _plan(av: Any, source: str) -> _Plan:
    with av.open(source, metadata_errors='replace') as container:
        videos = [stream for stream in container.streams.video if not _is_cover(stream)]
        if not videos:
            raise UserError(f'{source} has no video stream')
        stream = videos[0]
        context = stream.codec_context
        first = next(container.decode(stream), None)
        turns = (round(first.rotation / 90) if first is not None else 0) % 4
        width, height = context.width, context.height
        count = stream.frames
        if not count and stream.duration and stream.average_rate:
            count = round(float(stream.duration * stream.time_base * stream.average_rate))
        colours = {
            name: int(getattr(context, name))
            for name in ('color_range', 'colorspace', 'color_primaries', 'color_trc')
        }
        aspect = context.sample_aspect_ratio
        stat = os.stat(source)
        return _Plan(
            {'source': os.path.abspath(source), 'bytes': stat.st_size, 'modified': stat.st_mtime_ns},
            stream.index, context.name, *((height, width) if turns % 2 else (width, height)),
            context.pix_fmt or 'yuv420p', stream.average_rate, stream.time_base, turns, count or None,
            colours,
            (1 / aspect if turns % 2 else aspect) if aspect else None,
        )  # fmt: skip


def _is_cover(stream: Any) -> bool:
    return 'ATTACHED_PIC' in str(stream.disposition).upper()


def _settings(restorer: Deblurrer) -> dict[str, Any]:
    """Settings that the restored frames depend on."""
    return {
        'network': restorer.name,
        'weights': restorer.fingerprint,
        'precision': restorer.precision,
        'strength': restorer.strength,
        'part': PART,
    }


def _open_folder(folder: Path, identity: dict[str, Any]) -> None:
    """Keep the parts of an earlier run of the same source and settings; remove others."""
    file = folder / 'identity.json'
    text = json.dumps(identity, sort_keys=True)
    if file.is_file() and file.read_text(encoding='utf-8') == text:
        return
    if folder.exists() and not file.is_file() and any(folder.iterdir()):
        raise UserError(f'{folder} is in the way; move it elsewhere')
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_text(text, file)


def _part(folder: Path, number: int) -> Path:
    return folder / f'{number:06d}.nut'


def _restore_parts(
    av: Any,
    restorer: Deblurrer,
    source: str,
    plan: _Plan,
    folder: Path,
    result: Result,
    tick: Callable[[float], None],
) -> _Counts:
    """Write all parts that are missing."""

    total = _Counts()
    decoded = _decoded(av, source, plan)
    frames: Iterator[Any] = track(
        _ahead(decoded, AHEAD), f'deblurring {Path(source).name}', plan.frames, unit='frames'
    )
    numbered = itertools.count()
    while chunk := list(itertools.islice(frames, PART)):
        path = _part(folder, next(numbered))
        about = path.with_suffix('.json')
        if path.is_file() and about.is_file():
            counts = _Counts(**json.loads(about.read_text(encoding='utf-8')))
        else:
            begun = time.perf_counter()
            counts = _Counts()
            restored = _restored(restorer, plan, chunk, counts)
            write_atomically(lambda to, frames=restored: _encode(av, plan, frames, to), path)
            write_text(json.dumps(asdict(counts)), about)
            result.seconds += time.perf_counter() - begun
        total.frames += counts.frames
        total.damaged += counts.damaged
        total.notes += [note for note in counts.notes if note not in total.notes]
        if plan.frames:
            tick(min(1.0, total.frames / plan.frames))
    total.lost = decoded.lost
    return total


class _decoded:  # noqa: N801 (an iterator that counts)
    """The frames of a video in order of display; packets that cannot be decoded are counted in `lost`."""

    def __init__(self, av: Any, source: str, plan: _Plan) -> None:
        self.av, self.source, self.plan = av, source, plan
        self.lost = 0

    def __iter__(self) -> Iterator[Any]:
        with self.av.open(self.source, metadata_errors='replace') as container:
            stream = container.streams[self.plan.index]
            stream.thread_type = 'AUTO'
            packets = container.demux(stream)
            while True:
                try:
                    packet = next(packets)
                except StopIteration:
                    return
                except self.av.error.FFmpegError:  # the file ends in the middle of a packet
                    self.lost += 1
                    return
                try:
                    yield from packet.decode()
                except self.av.error.FFmpegError:
                    self.lost += 1


def _restored(restorer: Deblurrer, plan: _Plan, frames: list[Any], counts: _Counts) -> Iterator[Any]:
    """Restored frames, with the time stamps and colour properties of the given ones."""
    restorer.report.notes.clear()
    intact = (_pixels(frame, plan) for frame in frames if not frame.is_corrupt)
    restored = restorer.restore(intact)
    for frame in frames:
        counts.frames += 1
        if frame.is_corrupt:
            counts.damaged += 1
            pixels = _pixels(frame, plan)
        else:
            pixels = next(restored)
        yield _frame(pixels, frame, plan)
    counts.notes += restorer.report.notes


def _pixels(frame: Any, plan: _Plan) -> NDArray[Any]:
    """RGB, (H, W, 3), upright."""
    rgb = frame.reformat(
        format=plan.rgb_format,
        src_colorspace=frame.colorspace,
        src_color_range=_range(frame.color_range),
        dst_color_range=FULL,
        interpolation=EXACT,
    ).to_ndarray()
    return np.ascontiguousarray(np.rot90(rgb, plan.turns)) if plan.turns else rgb


EXACT = 4 | 0x2000 | 0x4000 | 0x40000
"""FFmpeg's bicubic filter, chroma in full at input and output, and accurate rounding.

Without these a conversion to RGB and back darkens a video by 1/255.
"""

LIMITED, FULL = 1, 2
"""FFmpeg's constants for colour ranges, 16 to 235 and 0 to 255."""


def _range(number: int) -> int:
    return FULL if int(number) == FULL else LIMITED  # FFmpeg treats an unspecified range as limited


def _frame(pixels: NDArray[Any], original: Any, plan: _Plan) -> Any:
    """A frame for the encoder."""
    av = _pyav()
    rgb = av.VideoFrame.from_ndarray(pixels, format=plan.rgb_format)
    frame = rgb.reformat(
        format=plan.pixel_format,
        src_color_range=FULL,
        dst_color_range=_range(original.color_range),
        dst_colorspace=original.colorspace,
        interpolation=EXACT,
    )
    frame.pts, frame.time_base = original.pts, original.time_base
    for name in ('color_range', 'colorspace'):
        setattr(frame, name, getattr(original, name))
    return frame


def _encode(av: Any, plan: _Plan, frames: Iterable[Any], path: str) -> None:
    """Write frames as one part."""
    name, options = ENCODERS.get(plan.codec, ENCODERS['h264'])
    if name not in av.codecs_available:
        name, options = ENCODERS['h264']
    with av.open(path, 'w', format='nut') as container:
        stream = container.add_stream(name, rate=plan.rate or 25, options=dict(options))
        stream.width, stream.height = plan.width, plan.height
        stream.pix_fmt = _encodable(av, name, plan.pixel_format)
        stream.time_base = plan.time_base
        context = stream.codec_context
        context.time_base = plan.time_base
        if plan.aspect:
            context.sample_aspect_ratio = plan.aspect
        for attribute, value in plan.colours.items():
            setattr(context, attribute, value)
        if name == 'prores_ks':
            context.profile = 'HQ' if '422' in plan.pixel_format else '4444'
        stamps: set[int] = set()
        for frame in frames:
            if frame.pts is None or frame.pts in stamps:  # without a time stamp of its own
                frame.pts = max(stamps, default=-1) + 1
            stamps.add(frame.pts)
            if frame.format.name != stream.pix_fmt:
                frame = frame.reformat(format=stream.pix_fmt)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _encodable(av: Any, name: str, wanted: str) -> str:
    """The pixel format, or the nearest one that the encoder supports."""
    formats = [one.name for one in av.Codec(name, 'w').video_formats or ()]
    if not formats or wanted in formats:
        return wanted
    deep = any(mark in wanted for mark in ('10', '12', '14', '16'))
    for choice in (
        ('yuv420p10le', 'yuv422p10le', 'yuv444p10le') if deep else ('yuv420p', 'yuvj420p', 'yuv444p')
    ):
        if choice in formats:
            return choice
    return formats[0]


def _join(av: Any, source: str, plan: _Plan, folder: Path, path: str, target: str) -> None:
    """Write the parts and the source's other streams into one file."""
    parts = sorted(folder.glob('*.nut'))
    suffix = Path(target).suffix.lower()
    container_format = _container(av, target)
    options = {'movflags': '+faststart'} if suffix in ('.mp4', '.mov', '.m4v') else {}
    with (
        av.open(path, 'w', format=container_format, options=options) as output,
        av.open(source, metadata_errors='replace') as given,
        av.open(str(parts[0])) as first,
    ):
        output.metadata.update({key: value for key, value in given.metadata.items() if key != 'encoder'})
        streams: dict[int, Any] = {}
        video = None
        for stream in given.streams:
            if stream.index == plan.index:
                video = _added(av, output, first.streams.video[0], source, target)
                video.time_base = plan.time_base
                video.metadata.update(stream.metadata)
                for attribute, value in plan.colours.items():  # a part's container does not keep all of them
                    setattr(video.codec_context, attribute, value)
                continue
            if (
                stream.type not in ('audio', 'subtitle', 'video', 'attachment')
                or stream.codec_context is None
            ):
                continue  # data streams, which containers rarely take
            streams[stream.index] = _added(av, output, stream, source, target)
            streams[stream.index].metadata.update(stream.metadata)
            streams[stream.index].disposition = stream.disposition
        packets = heapq.merge(
            _video_packets(av, parts, video), _copied_packets(given, streams), key=lambda item: item[0]
        )
        for _, packet in packets:
            output.mux(packet)


def _added(av: Any, output: Any, stream: Any, source: str, target: str) -> Any:
    """Add a stream like `stream` to `output`."""
    try:
        return output.add_stream_from_template(stream)
    except (ValueError, av.error.FFmpegError):
        raise UserError(
            f'{target}: its container does not support the {stream.type} stream '
            f'({stream.codec_context.name}) of {source}; give the result '
            f'the suffix {Path(source).suffix} or .mkv'
        ) from None


def _video_packets(av: Any, parts: list[Path], stream: Any) -> Iterator[tuple[float, Any]]:
    for part in parts:
        with av.open(str(part)) as container:
            for packet in container.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    yield float(packet.dts * packet.time_base), packet


def _copied_packets(given: Any, streams: dict[int, Any]) -> Iterator[tuple[float, Any]]:
    if not streams:
        return
    last = 0.0
    for packet in given.demux([given.streams[index] for index in streams]):
        if packet.dts is None and packet.size == 0:  # the end
            continue
        last = last if packet.dts is None else float(packet.dts * packet.time_base)
        packet.stream = streams[packet.stream.index]
        yield last, packet


def _container(av: Any, target: str) -> str:
    """FFmpeg's name of the container of a suffix."""
    suffix = Path(target).suffix.lower()
    names = {
        '.mp4': 'mp4', '.m4v': 'mp4', '.mov': 'mov', '.mkv': 'matroska', '.webm': 'webm', '.avi': 'avi',
        '.mpg': 'mpeg', '.mpeg': 'mpeg', '.ts': 'mpegts', '.mts': 'mpegts', '.wmv': 'asf',
    }  # fmt: skip
    return names[suffix]


def _ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """Iterate over `items` in a background thread, at most `count` items ahead."""
    waiting: queue.Queue[Any] = queue.Queue(count)
    stopped = threading.Event()
    end = object()

    def put(item: Any) -> bool:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                waiting.put(item, timeout=0.1)
                return True
        return False

    def draw() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((end, None))
        except BaseException as error:
            put((end, error))

    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    try:
        while True:
            item, error = waiting.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stopped.set()
        thread.join()


def _pyav() -> Any:
    try:
        import av
    except ImportError:
        raise UserError('videos need PyAV; install it with pip install "dsgformer[video]"') from None
    av.logging.set_level(None)
    return av
