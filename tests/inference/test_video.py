"""Videos keep their time stamps, sound, subtitles and colours; an interrupted run continues."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dsgformer_arch import Deblurrer
from dsgformer_arch.inference import video
from dsgformer_arch.inference.deblur import Result
from dsgformer_arch.utils.errors import UserError

av = pytest.importorskip('av')


class Darker(nn.Module):
    """Subtracts 0.1, and counts what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 0 if x.is_meta else len(x)
        return x - 0.1


def scene(i: int, width: int = 64, height: int = 48) -> NDArray[np.uint8]:
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack([x / width, y / height, 0.5 + 0.4 * np.sin((x + 3 * i) / 9)], -1) * 0.5 + 0.3
    return (image * 255).astype(np.uint8)


STAMPS = [0, 40, 80, 125, 160, 240, 250, 300, 340, 420, 500, 505, 560, 600, 650, 700, 760, 800, 900, 1000]
"""Milliseconds of the frames: a variable rate."""


def write(
    path: Path, codec: str = 'libx264', pixel_format: str = 'yuv420p', sound: bool = True, full: bool = False
) -> Path:
    with av.open(str(path), 'w') as container:
        stream = container.add_stream(codec, rate=25, options={'crf': '10'} if codec == 'libx264' else {})
        stream.width, stream.height, stream.pix_fmt = 64, 48, pixel_format
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        stream.codec_context.color_range = 2 if full else 1
        audio = (
            container.add_stream('aac' if path.suffix == '.mp4' else 'libopus', rate=48000) if sound else None
        )
        container.metadata['title'] = 'A title'
        for i, stamp in enumerate(STAMPS):
            frame = av.VideoFrame.from_ndarray(scene(i), format='rgb24')
            frame = frame.reformat(format=pixel_format, dst_color_range=2 if full else 1)
            frame.pts, frame.time_base = stamp, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        if audio is not None:
            wave = np.sin(np.arange(48000) / 20).astype(np.float32)[None]
            sample = av.AudioFrame.from_ndarray(wave, format='fltp', layout='mono')
            sample.sample_rate, sample.pts, sample.time_base = 48000, 0, Fraction(1, 48000)
            resampler = av.AudioResampler(format=audio.codec_context.format, layout='mono', rate=48000)
            fifo = av.AudioFifo()
            for part in resampler.resample(sample):
                fifo.write(part)
            for part in fifo.read_many(audio.codec_context.frame_size or 960, partial=True):
                container.mux(audio.encode(part))
            container.mux(audio.encode(None))
        container.mux(stream.encode(None))
    return path


def frames(path: Path) -> list[Any]:
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


def packets(path: Path, kind: str) -> list[tuple[float, bytes]]:
    with av.open(str(path)) as container:
        stream = next(stream for stream in container.streams if stream.type == kind)
        return [(float(p.pts * p.time_base), bytes(p)) for p in container.demux(stream) if p.size]


def deblur(source: Path, target: Path, network: nn.Module | None = None, **settings: Any) -> Result:
    result = Result(str(source), str(target))
    video.deblur_video(Deblurrer(network or Darker(), **settings), str(source), str(target), result)
    return result


def seconds(found: list[Any]) -> list[float]:
    return [round(float(frame.pts * frame.time_base), 3) for frame in found]


@pytest.mark.parametrize('suffix', ['.mp4', '.mkv'])
def test_time_stamps_sound_and_metadata_are_kept(tmp_path: Path, suffix: str) -> None:
    source = write(tmp_path / f'in{suffix}')
    result = deblur(source, tmp_path / f'out{suffix}')
    before, after = frames(source), frames(tmp_path / f'out{suffix}')
    assert seconds(after) == seconds(before) == [stamp / 1000 for stamp in STAMPS]
    assert result.frames == len(STAMPS)
    assert result.notes == []
    sound = packets(source, 'audio')
    assert len(sound) > 20
    assert packets(tmp_path / f'out{suffix}', 'audio') == sound
    with av.open(str(tmp_path / f'out{suffix}')) as container:
        assert {key.lower(): value for key, value in container.metadata.items()}['title'] == 'A title'
    for a, b in zip(before, after, strict=True):
        difference = b.to_ndarray(format='rgb24').astype(int) - a.to_ndarray(format='rgb24')
        assert difference.mean() == pytest.approx(-25.5, abs=1.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f'in{suffix}', f'out{suffix}']


@pytest.mark.parametrize('clockwise', [90, 180, 270])
def test_rotation_is_applied(tmp_path: Path, clockwise: int) -> None:
    """A phone's video: frames as the sensor saw them, and a matrix that says how to show them."""
    source = write(tmp_path / 'in.mp4', sound=False)
    cosine, sine = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[clockwise]
    data = bytearray(source.read_bytes())
    start = data.find(b'tkhd') + 4 + 40  # the matrix of a track header of version 0
    unit = 1 << 16
    data[start : start + 36] = struct.pack(
        '>9i', cosine * unit, sine * unit, 0, -sine * unit, cosine * unit, 0, 0, 0, 1 << 30
    )
    source.write_bytes(data)
    result = deblur(source, tmp_path / 'out.mp4')
    assert result.frames == len(STAMPS)
    after = frames(tmp_path / 'out.mp4')
    assert seconds(after) == [stamp / 1000 for stamp in STAMPS]
    for i in (0, len(STAMPS) - 1):
        assert after[i].rotation == 0  # nothing left to be turned by a player
        shown = np.rot90(scene(i), -clockwise // 90).astype(int)
        restored = after[i].to_ndarray(format='rgb24')
        assert restored.shape == shown.shape
        assert np.abs(restored - (shown - 25.5)).mean() < 4
    described = video.describe_video(str(source))
    assert (described['width'], described['height']) == (shown.shape[1], shown.shape[0])


@pytest.mark.parametrize('full', [False, True])
@pytest.mark.parametrize(
    ('codec', 'pixel_format'), [('ffv1', 'yuv420p'), ('ffv1', 'yuv420p10le'), ('ffv1', 'yuv444p')]
)
def test_colours_come_back(tmp_path: Path, codec: str, pixel_format: str, full: bool) -> None:
    """With strength 0 only the conversion to RGB and back remains."""
    source = write(tmp_path / 'in.mkv', codec, pixel_format, sound=False, full=full)
    deblur(source, tmp_path / 'out.mkv', strength=0)
    for a, b in zip(frames(source), frames(tmp_path / 'out.mkv'), strict=True):
        assert (b.format.name, b.color_range) == (a.format.name, a.color_range)
        luma = [np.asarray(frame.to_ndarray()[:48, :64], int) for frame in (a, b)]
        depth = 4 if pixel_format.endswith('10le') else 1
        assert np.abs(luma[0] - luma[1]).max() <= 2 * depth
        assert np.abs((luma[0] - luma[1]).mean()) < 0.45 * depth


def test_subtitles_are_copied(tmp_path: Path) -> None:
    (tmp_path / 'a.srt').write_text('1\n00:00:00,100 --> 00:00:00,800\nHello\n')
    plain = write(tmp_path / 'plain.mkv', 'mjpeg', 'yuvj420p', sound=False, full=True)
    with (
        av.open(str(tmp_path / 'in.mkv'), 'w') as output,
        av.open(str(plain)) as plain_file,
        av.open(str(tmp_path / 'a.srt')) as text_file,
    ):
        pairs = [
            (f, f.streams[0], output.add_stream_from_template(f.streams[0])) for f in (plain_file, text_file)
        ]
        for file, stream, copied in pairs:
            for packet in file.demux(stream):
                if packet.dts is not None:
                    packet.stream = copied
                    output.mux(packet)
    deblur(tmp_path / 'in.mkv', tmp_path / 'out.mkv')
    assert packets(tmp_path / 'out.mkv', 'subtitle') == packets(tmp_path / 'in.mkv', 'subtitle')
    assert packets(tmp_path / 'out.mkv', 'subtitle')[0][1] == b'Hello'


def stopping() -> nn.Module:
    """A `Darker` that is interrupted at its 16th frame."""
    network = Darker()

    def hook(module: Any, inputs: Any) -> None:
        if network.count == 15:
            raise KeyboardInterrupt

    network.register_forward_pre_hook(hook)
    return network


def test_an_interrupted_run_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, 'PART', 6)
    source = write(tmp_path / 'in.mp4')

    with pytest.raises(KeyboardInterrupt):
        deblur(source, tmp_path / 'out.mp4', stopping())
    assert not (tmp_path / 'out.mp4').exists()
    again = Darker()
    deblur(source, tmp_path / 'out.mp4', again)
    assert again.count == len(STAMPS) - 12  # two parts of six were there
    assert seconds(frames(tmp_path / 'out.mp4')) == [stamp / 1000 for stamp in STAMPS]
    whole = deblur(source, tmp_path / 'whole.mp4')
    assert whole.frames == len(STAMPS)
    for a, b in zip(frames(tmp_path / 'out.mp4'), frames(tmp_path / 'whole.mp4'), strict=True):
        assert np.abs(a.to_ndarray().astype(int) - b.to_ndarray()).max() <= 4


def test_other_settings_start_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, 'PART', 6)
    source = write(tmp_path / 'in.mp4', sound=False)

    with pytest.raises(KeyboardInterrupt):
        deblur(source, tmp_path / 'out.mp4', stopping(), strength=0.5)
    again = Darker()
    deblur(source, tmp_path / 'out.mp4', again, strength=1)
    assert again.count == len(STAMPS)


def test_broken_frames_pass_through_and_are_counted(tmp_path: Path) -> None:
    source = write(tmp_path / 'in.mkv', 'mjpeg', 'yuvj420p', sound=False, full=True)
    data = bytearray(source.read_bytes())
    images = packets(source, 'video')
    for i in (5, 11):
        start = data.find(images[i][1][:200])
        middle = start + len(images[i][1]) // 2
        data[middle : middle + 60] = bytes(60)
    source.write_bytes(data)
    result = deblur(source, tmp_path / 'out.mkv')
    assert result.frames >= len(STAMPS) - 2
    after = frames(tmp_path / 'out.mkv')
    assert len(after) == result.frames
    for frame in (after[0], after[-1]):
        i = 0 if frame is after[0] else len(STAMPS) - 1
        difference = frame.to_ndarray(format='rgb24').astype(int) - scene(i)
        assert difference.mean() == pytest.approx(-25.5, abs=3)


def test_a_truncated_video_is_restored_as_far_as_it_goes(tmp_path: Path) -> None:
    source = write(tmp_path / 'in.mkv', sound=False)
    source.write_bytes(source.read_bytes()[: source.stat().st_size * 2 // 3])
    result = deblur(source, tmp_path / 'out.mkv')
    assert 3 <= result.frames < len(STAMPS)
    assert len(frames(tmp_path / 'out.mkv')) == result.frames


def test_what_a_decoder_calls_corrupt_is_not_restored(tmp_path: Path) -> None:
    source = write(tmp_path / 'in.mkv', sound=False)
    plan = video._plan(av, str(source))

    class Frame:
        """A frame that the decoder has marked."""

        is_corrupt = True

        def __init__(self, frame: Any) -> None:
            self.frame = frame

        def __getattr__(self, name: str) -> Any:
            return getattr(self.frame, name)

    decoded: list[Any] = frames(source)
    decoded[3] = Frame(decoded[3])
    counts = video._Counts()
    network = Darker()
    restored = list(video._restored(Deblurrer(network), plan, decoded, counts))
    assert (counts.frames, counts.damaged, network.count) == (len(STAMPS), 1, len(STAMPS) - 1)
    changes = [
        (b.to_ndarray(format='rgb24').astype(int) - a.to_ndarray(format='rgb24')).mean()
        for a, b in zip(frames(source), restored, strict=True)
    ]
    assert abs(changes[3]) < 2
    assert all(change < -20 for i, change in enumerate(changes) if i != 3)


def test_a_container_that_does_not_take_a_stream_is_reported(tmp_path: Path) -> None:
    source = write(tmp_path / 'in.mkv')
    with pytest.raises(UserError, match=r'in\.mkv'):
        deblur(source, tmp_path / 'out.webm')  # H.264 does not go into WebM
    assert not (tmp_path / 'out.webm').exists()


def test_no_video(tmp_path: Path) -> None:
    path = tmp_path / 'a.mp4'
    path.write_bytes(b'nothing')
    with pytest.raises(UserError, match=r'a\.mp4'):
        deblur(path, tmp_path / 'b.mp4')
    with pytest.raises(UserError, match=r'a\.mp4'):
        video.describe_video(str(path))


def test_description(tmp_path: Path) -> None:
    found = video.describe_video(str(write(tmp_path / 'in.mp4')))
    assert (found['codec'], found['width'], found['height']) == ('h264', 64, 48)
    assert found['other streams'] == ['audio (aac)']


def test_drawing_ahead_keeps_order_and_errors() -> None:
    assert list(video._ahead(range(100), 3)) == list(range(100))

    def fails() -> Any:
        yield 1
        raise ValueError('broken')

    drawn = video._ahead(fails(), 3)
    assert next(drawn) == 1
    with pytest.raises(ValueError, match='broken'):
        next(drawn)
    stopped = video._ahead(iter(int, 1), 3)  # endless
    next(stopped)
    stopped.close()
    assert torch.is_grad_enabled()
