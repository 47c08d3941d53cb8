"""The queue: one image at a time, in order, bounded, and nothing left of what nobody waits for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from dsgformer_arch import Deblurrer
from dsgformer_arch.inference import official_weights
from dsgformer_arch.inference.images import ImageError
from dsgformer_arch.serving.folder import ServerFolder
from dsgformer_arch.serving.service import (
    AbandonedError,
    BusyError,
    Job,
    Limits,
    RestorationService,
    Settings,
    StoppedError,
    TooLargeError,
    offered,
)
from dsgformer_arch.utils.errors import UserError
from tests.serving.running import PATIENCE, Darker, Held, darker, maker, pixels, png, until

PLAIN = Settings('darker')


class Bench:
    """A service, and files for it."""

    def __init__(self, folder: Path, network: Any, **limits: int) -> None:
        self.folder, self.count = folder, 0
        self.service = RestorationService({'darker': maker(network)}, Limits(**limits))

    def submit(self, content: bytes, settings: Settings = PLAIN) -> Job:
        self.count += 1
        source = self.folder / f'{self.count}.source'
        source.write_bytes(content)
        return self.service.submit(
            source, self.folder / f'{self.count}.result', f'image {self.count}', settings
        )

    def restored(self, content: bytes, settings: Settings = PLAIN) -> Any:
        result = self.submit(content, settings).done.result(PATIENCE)
        return np.asarray(Image.open(result.path))


@pytest.fixture
def held() -> Held:
    return Held()


@pytest.fixture
def bench(tmp_path: Path, held: Held) -> Iterator[Bench]:
    bench = Bench(tmp_path, held, most_waiting=2, most_pixels=10_000, most_bytes=100_000)
    yield bench
    held.open.set()
    bench.service.stop()
    assert bench.service.join(PATIENCE)


def test_the_result_is_what_the_restorer_makes_with_the_settings_of_the_job(bench: Bench, held: Held) -> None:
    held.open.set()
    image = pixels()
    assert np.abs(bench.restored(png(image)).astype(int) - darker(image)).max() <= 1
    half = bench.restored(png(image), Settings('darker', strength=0.5))
    assert np.abs(half.astype(int) - (image.astype(int) + darker(image)) / 2).max() <= 1
    # The next job has its own settings again.
    assert np.abs(bench.restored(png(image)).astype(int) - darker(image)).max() <= 1
    before = held.calls
    wide = np.ascontiguousarray(np.tile(image[:32], (1, 2, 1)))
    bench.restored(png(wide), Settings('darker', tile=64))
    assert held.calls - before > 1


def test_images_are_restored_one_at_a_time_and_in_order(bench: Bench, held: Held) -> None:
    jobs = [bench.submit(png(pixels(seed=seed))) for seed in range(3)]
    assert held.began.wait(PATIENCE)
    assert [bench.service.ahead(job) for job in jobs] == [0, 1, 2]
    order: list[int] = []
    for number, job in enumerate(jobs):
        job.done.add_done_callback(lambda _, number=number: order.append(number))
    held.open.set()
    for job in jobs:
        job.done.result(PATIENCE)
    until(lambda: len(order) == 3)
    assert order == [0, 1, 2]
    assert held.together == 1


def test_no_more_images_wait_than_may(bench: Bench, held: Held) -> None:
    jobs = [bench.submit(png(pixels())) for _ in range(3)]  # one in work, two waiting
    with pytest.raises(BusyError, match='the queue is full: 2 images wait'):
        bench.submit(png(pixels()))
    held.open.set()
    for job in jobs:
        job.done.result(PATIENCE)
    bench.submit(png(pixels())).done.result(PATIENCE)


def test_nothing_waits_where_nothing_may(tmp_path: Path, held: Held) -> None:
    bench = Bench(tmp_path, held, most_waiting=0)
    job = bench.submit(png(pixels()))
    with pytest.raises(BusyError):
        bench.submit(png(pixels()))
    held.open.set()
    job.done.result(PATIENCE)
    bench.submit(png(pixels())).done.result(PATIENCE)
    bench.service.stop()


def test_a_waiting_image_that_was_abandoned_is_not_restored(bench: Bench, held: Held) -> None:
    first, second, third = (bench.submit(png(pixels())) for _ in range(3))
    assert held.began.wait(PATIENCE)
    bench.service.abandon(second)
    with pytest.raises(AbandonedError):
        second.done.result(PATIENCE)
    assert bench.service.ahead(third) == 1
    held.open.set()
    first.done.result(PATIENCE)
    third.done.result(PATIENCE)
    assert held.calls == 2
    assert not second.target.exists()


def test_an_image_in_progress_that_was_abandoned_stops_at_its_next_tile(bench: Bench, held: Held) -> None:
    job = bench.submit(png(pixels(64, 150)), Settings('darker', tile=64))
    assert held.began.wait(PATIENCE)
    bench.service.abandon(job)
    held.open.set()
    with pytest.raises(AbandonedError):
        job.done.result(PATIENCE)
    assert held.calls == 1
    assert not job.target.exists()
    bench.submit(png(pixels())).done.result(PATIENCE)


def test_stop_refuses_new_jobs_and_reports_to_waiting_ones(bench: Bench, held: Held) -> None:
    first, second = bench.submit(png(pixels())), bench.submit(png(pixels()))
    assert held.began.wait(PATIENCE)
    bench.service.stop()
    with pytest.raises(StoppedError):
        second.done.result(PATIENCE)
    with pytest.raises(StoppedError):
        bench.submit(png(pixels()))
    held.open.set()
    assert bench.service.join(PATIENCE)
    assert first.done.done()


@pytest.mark.parametrize(
    ('content', 'kind', 'sentence'),
    [
        (b'no image', ImageError, 'image 1 is not an image; JPEG, PNG, TIFF, WebP and BMP can be read'),
        (b'', ImageError, 'image 1 is empty'),
        (b'x' * 100_001, TooLargeError, 'image 1 is too large; this server takes files of at most 0.1 MB'),
        (
            png(np.zeros((101, 100, 3), np.uint8)),
            TooLargeError,
            'image 1 has 100×101 pixels; this server takes at most 0.01 megapixels',
        ),
    ],
)
def test_other_files_or_too_large_images_never_waits(
    bench: Bench, content: bytes, kind: type[Exception], sentence: str
) -> None:
    with pytest.raises(kind) as caught:
        bench.submit(content)
    assert str(caught.value) == sentence


def test_a_damaged_image_fails_and_the_next_one_does_not(bench: Bench, held: Held) -> None:
    held.open.set()
    job = bench.submit(png(pixels())[:-200])
    with pytest.raises(ImageError, match=r'^image 1 cannot be read'):
        job.done.result(PATIENCE)
    assert not job.target.exists()
    bench.submit(png(pixels())).done.result(PATIENCE)


def test_too_little_memory_is_no_fault_of_the_image(tmp_path: Path) -> None:
    class Greedy(Darker):
        def forward_padded(self, x: Tensor) -> Tensor:
            raise MemoryError

    bench = Bench(tmp_path, Greedy())
    with pytest.raises(BusyError, match='not enough memory for image 1'):
        bench.submit(png(pixels(64, 64))).done.result(PATIENCE)
    bench.service.stop()


def test_a_model_is_loaded_once_and_only_when_it_is_asked_for(tmp_path: Path) -> None:
    made: list[str] = []

    def make(name: str) -> Any:
        def call() -> Deblurrer:
            made.append(name)
            return maker()()

        return call

    service = RestorationService({'a': make('a'), 'b': make('b')}, Limits())
    assert service.models == ['a', 'b']
    service.load('a')
    source = tmp_path / 'source'
    source.write_bytes(png(pixels()))
    for model, precision in (('a', 'fp32'), ('a', 'bf16'), ('a', 'fp32')):
        settings = Settings(model, precision=precision)
        service.submit(source, tmp_path / 'result', 'x', settings).done.result(PATIENCE)
    assert made == ['a']
    service.submit(source, tmp_path / 'result', 'x', Settings('b')).done.result(PATIENCE)
    assert made == ['a', 'b']
    with pytest.raises(UserError, match="no model '/etc/passwd' on this server; choose one of a, b"):
        service.submit(source, tmp_path / 'result', 'x', Settings('/etc/passwd'))
    service.stop()


def test_the_weights_in_the_package_and_downloaded_ones_are_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('DSGFORMER_HOME', str(tmp_path))
    assert list(offered()) == ['dsgformer_h']
    place = official_weights.place(official_weights.find('restormer/motion'))
    place.parent.mkdir(parents=True)
    place.write_bytes(b'x')
    assert list(offered()) == ['dsgformer_h', 'restormer/motion']
    # A file that went away since is reported, not downloaded again.
    make = offered()['restormer/motion']
    place.unlink()
    with pytest.raises(UserError, match='there is no such file of weights'):
        make()
    assert list(offered(['nafnet32', 'dsgformer_h'])) == ['nafnet32', 'dsgformer_h']
    assert list(offered(None, 'runs/mine.pth')) == ['mine.pth']
    with pytest.raises(UserError, match='--weights is one file'):
        offered(['a', 'b'], 'mine.pth')


def test_the_folder_removes_what_is_old_and_nothing_else(tmp_path: Path) -> None:
    folder = ServerFolder(tmp_path, 1000)
    shown, job = folder.shown(), folder.new_job()
    (shown / 'a.png').write_bytes(b'x' * 900)
    (job / 'source').write_bytes(b'x')
    folder.sweep(60)
    assert (shown / 'a.png').exists()
    assert not folder.is_full()
    (job / 'result').write_bytes(b'x' * 100)
    assert folder.is_full()
    folder.sweep(-1)  # older than a second from now
    assert not shown.exists()
    assert (job / 'source').exists()
    with folder.job() as place:
        (place / 'source').write_bytes(b'x')
    assert not place.exists()


def test_the_folder_knows_what_lies_in_it(tmp_path: Path) -> None:
    outside = tmp_path / 'outside.png'
    outside.write_bytes(b'x')
    root = tmp_path / 'root'
    root.mkdir()
    folder = ServerFolder(root, 1000)
    inside = folder.shown() / 'a.png'
    inside.write_bytes(b'x')
    (folder.page / 'link.png').symlink_to(outside)
    assert folder.contains(str(inside))
    for path in (outside, f'{folder.page}/../../outside.png', folder.page / 'link.png', folder.jobs / 'x'):
        assert not folder.contains(str(path))
    assert not folder.contains('http://localhost/a.png')
    assert not folder.contains('\0')
