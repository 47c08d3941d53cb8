"""Averages of video frames: in linear light, around a sharp frame, without cuts and static parts."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest

from dsgformer_arch.data.prepare.blur.realism import PLAIN
from dsgformer_arch.data.prepare.blur.response import response
from dsgformer_arch.data.prepare.blur.settings import from_options
from dsgformer_arch.data.prepare.blur.video import (
    Averaging,
    FileClip,
    FolderClip,
    average,
    find_clips,
    find_windows,
    interpolated,
    optical_flows,
)
from dsgformer_arch.utils.errors import UserError
from tests.trees import random_image

SIZE = (72, 128)


def pan(count: int, step: int = 2, seed: int = 0) -> list[np.ndarray]:
    """Frames of a camera that moves along a scene by whole pixels, uint8 RGB."""
    scene = random_image(seed, SIZE[0], SIZE[1] + step * count)
    return [np.ascontiguousarray(scene[:, step * n : step * n + SIZE[1]]) for n in range(count)]


def save(folder: Path, frames: list[np.ndarray]) -> Path:
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames):
        assert cv2.imwrite(str(folder / f'{number:05d}.png'), frame[..., ::-1])
    return folder


def encode(path: Path, frames: list[np.ndarray], codec: str = 'ffv1', gop: int = 1) -> Path:
    av = pytest.importorskip('av', reason='PyAV is an optional dependency')
    with av.open(str(path), 'w') as container:
        stream = container.add_stream(codec, rate=Fraction(60))
        stream.height, stream.width = SIZE
        # FFV1 keeps RGB as it is; others are compared with what they decode to.
        stream.pix_fmt = 'bgr0' if codec == 'ffv1' else 'yuv420p'
        stream.codec_context.gop_size = gop
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format='rgb24')))
        container.mux(stream.encode())
    return path


def windows(root: Path, how: Averaging, seed: int = 0) -> list[tuple[int, int]]:
    return [(window.first, window.count) for window in find_windows(find_clips([root]), how, seed)]


def test_the_average_is_of_linear_light_around_the_middle_frame(tmp_path: Path) -> None:
    frames = pan(9)
    root = save(tmp_path / 'run', frames)
    how = Averaging(frames=(9, 9), realism=PLAIN)
    (window,) = find_windows(find_clips([root]), how, 0)
    sample = average(window, how, np.random.default_rng(0))
    np.testing.assert_array_equal(sample.gt, frames[4])
    light = np.mean([response('srgb').to_linear(frame).astype(np.float64) for frame in frames], axis=0)
    expected = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055) * 255
    assert np.abs(sample.lq - expected).max() < 0.51
    assert np.abs(sample.lq - np.mean(frames, axis=0)).max() > 3, 'display levels were averaged'


def test_windows_follow_upon_each_other(tmp_path: Path) -> None:
    root = save(tmp_path / 'run', pan(40))
    found = windows(root, Averaging(frames=(3, 8)), seed=3)
    position = 0
    for first, count in found:
        assert first == position
        assert count in (3, 5, 7)
        position += count
    assert 40 - position < 3
    assert len({count for _, count in found}) > 1
    assert found == windows(root, Averaging(frames=(3, 8)), seed=3)
    assert found != windows(root, Averaging(frames=(3, 8)), seed=4)


def test_no_window_holds_a_cut(tmp_path: Path) -> None:
    root = save(tmp_path / 'run', [*pan(13), *pan(13, seed=1)])
    found = windows(root, Averaging(frames=(5, 5)))
    assert found == [(0, 5), (5, 5), (13, 5), (18, 5)]


def test_a_fast_pan_is_not_a_cut(tmp_path: Path) -> None:
    root = save(tmp_path / 'run', pan(20, step=24))
    assert windows(root, Averaging(frames=(5, 5))) == [(0, 5), (5, 5), (10, 5), (15, 5)]


def test_static_stretches_are_skipped_and_small_motion_is_not_static(tmp_path: Path) -> None:
    large = [cv2.resize(frame, (640, 360)) for frame in pan(11)]
    still = large[0]
    rng = np.random.default_rng(0)
    noisy = [np.clip(still + rng.normal(0, 2, still.shape), 0, 255).astype(np.uint8) for _ in range(10)]
    root = save(tmp_path / 'run', [*noisy, *large[1:]])
    assert windows(root, Averaging(frames=(5, 5))) == [(10, 5), (15, 5)]
    ball = [cv2.circle(still.copy(), (90 + 5 * n, 40), 12, (255, 255, 255), -1) for n in range(10)]
    assert windows(save(tmp_path / 'ball', ball), Averaging(frames=(5, 5))) == [(0, 5), (5, 5)]
    with pytest.raises(UserError, match='no 5 frames in a row in which something moves'):
        windows(save(tmp_path / 'still', noisy), Averaging(frames=(5, 5)))


@pytest.mark.parametrize(('codec', 'suffix'), [('ffv1', '.mkv'), ('mpeg4', '.mp4'), ('mpeg4', '.avi')])
def test_video_files_are_read_from_where_a_window_starts(tmp_path: Path, codec: str, suffix: str) -> None:
    frames = pan(40)
    clip = FileClip(encode(tmp_path / f'x{suffix}', frames, codec, gop=12))
    scanned = list(clip.scan())
    assert len(scanned) == 40
    if codec == 'ffv1':
        for (_, image), frame in zip(scanned, frames, strict=True):
            np.testing.assert_array_equal(image, frame)
    for number in (0, 7, 23, 39):
        stamp, expected = scanned[number]
        rest = list(clip.frames(stamp))
        assert len(rest) == 40 - number
        np.testing.assert_array_equal(rest[0], expected)


def test_a_file_and_a_folder_of_its_frames_give_the_same_pair(tmp_path: Path) -> None:
    frames = pan(12)
    how = Averaging(frames=(5, 5))
    of_folder = find_windows([FolderClip(save(tmp_path / 'run', frames))], how, 0)
    of_file = find_windows([FileClip(encode(tmp_path / 'run.mkv', frames))], how, 0)
    assert [(w.first, w.count, w.key) for w in of_folder] == [(w.first, w.count, w.key) for w in of_file]
    a, b = (average(found[1], how, np.random.default_rng(1)) for found in (of_folder, of_file))
    np.testing.assert_array_equal(a.lq, b.lq)
    np.testing.assert_array_equal(a.gt, b.gt)


def test_interpolation_moves_things(tmp_path: Path) -> None:
    """Half-way between two frames that are 6 pixels apart lies the frame between them."""
    before, between, after = (pan(3, step=3)[n] for n in range(3))
    flows = optical_flows(before, after)
    assert np.median(flows[0][..., 0]) == pytest.approx(-6, abs=0.2)
    light = [frame.astype(np.float32) / 255 for frame in (before, after)]
    made = interpolated(*light, *flows, 0.5)
    inner = (slice(8, -8), slice(12, -12))
    error = np.abs(made - between.astype(np.float32) / 255)[inner].mean()
    blend = np.abs((light[0] + light[1]) / 2 - between.astype(np.float32) / 255)[inner].mean()
    assert error < 0.25 * blend


def test_interpolated_averages_have_no_ghosts(tmp_path: Path) -> None:
    """Every fourth frame with interpolation comes close to the average of all frames."""
    dense = pan(33, step=1)
    plain = {'realism': PLAIN, 'camera': 'linear'}
    every = save(tmp_path / 'every', dense)
    fourth = save(tmp_path / 'fourth', dense[::4])
    (window,) = find_windows(find_clips([every]), Averaging(frames=(33, 33)), 0)
    truth = average(window, Averaging(frames=(33, 33), **plain), np.random.default_rng(0)).lq.astype(float)
    (window,) = find_windows(find_clips([fourth]), Averaging(frames=(9, 9)), 0)
    errors = []
    for interpolate in (1, 4):
        how = Averaging(frames=(9, 9), interpolate=interpolate, step=1.0, **plain)
        lq = average(window, how, np.random.default_rng(0)).lq
        errors.append(np.abs(lq - truth)[8:-8, 20:-20].mean())
    assert errors[1] < 0.5 * errors[0]


def test_clips_are_found(tmp_path: Path) -> None:
    save(tmp_path / 'b' / 'run', pan(2))
    save(tmp_path / 'a', pan(2))
    (tmp_path / 'c.MP4').write_bytes(b'')
    (tmp_path / 'notes.txt').write_text('')
    assert [clip.path.name for clip in find_clips([tmp_path])] == ['a', 'run', 'c.MP4']


@pytest.mark.parametrize(
    ('change', 'sentence'),
    [
        ({'frames': [4, 4]}, 'should hold an odd number'),
        ({'frames': [9, 3]}, 'should rise'),
        ({'interpolate': 0}, 'interpolate is 0'),
        ({'step': 0}, 'step is 0'),
        ({'static': -1}, 'static is -1'),
        ({'camera': 'x'}, "'x' is not a camera response"),
        ({'realism': {'noise': 2}}, 'realism: noise is 2'),
    ],
)
def test_wrong_settings_are_reported(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        from_options(Averaging, change, 'settings')


def test_files_other_than_a_video_are_reported(tmp_path: Path) -> None:
    pytest.importorskip('av', reason='PyAV is an optional dependency')
    broken = tmp_path / 'x.mp4'
    broken.write_bytes(b'no video at all')
    with pytest.raises(UserError, match=r'x\.mp4 cannot be decoded as video .*; convert it'):
        find_windows(find_clips([broken]), Averaging(), 0)
    with pytest.raises(UserError, match='does not exist'):
        find_clips([tmp_path / 'nowhere'])
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='holds neither video files nor folders of frames'):
        find_clips([tmp_path / 'empty'])
    for name in ('a/run', 'b/run'):
        save(tmp_path / name, pan(5))
    with pytest.raises(UserError, match='have one name; rename one of them'):
        find_windows(find_clips([tmp_path / 'a', tmp_path / 'b']), Averaging(frames=(5, 5)), 0)
