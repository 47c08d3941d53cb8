"""`dsgformer deblur`: files in, files out, exit statuses, and nothing lost when something fails."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from dsgformer_arch import Deblurrer
from dsgformer_arch.cli import dsgformer
from tests.small_systems import save_gentle_weights


@pytest.fixture(scope='module')
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small network whose result differs from its input, but by little."""
    return save_gentle_weights(tmp_path_factory.mktemp('weights') / 'net.pth')


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with images in a tree."""
    for i, name in enumerate(('in/a.png', 'in/b.jpg', 'in/deep/c.tif')):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene(i)).save(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def scene(seed: int = 0) -> NDArray[np.uint8]:
    y, x = np.mgrid[0:48, 0:72]
    image = np.stack([x / 72, y / 48, (x // 9 + y // 9 + seed) % 2], -1) * 0.6 + 0.2
    return (image * 255).astype(np.uint8)


def run(*arguments: str | Path, weights: Path | None = None) -> int:
    extra = ['--weights', str(weights)] if weights else []
    return dsgformer.main(['deblur', *map(str, arguments), *extra])


def test_a_folder(folder: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run('in', '-o', 'out', weights=weights) == 0
    assert sorted(str(path.relative_to('out')) for path in Path('out').rglob('*.*')) == [
        'a.png',
        'b.jpg',
        'deep/c.tif',
    ]
    restored = np.asarray(Image.open('out/a.png'))
    assert np.array_equal(restored, Deblurrer(weights=weights).restore(scene(0)))
    assert not np.array_equal(restored, scene(0))
    assert 'restored 3' in capsys.readouterr().err


def test_what_is_done_is_skipped(folder: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run('in/a.png', weights=weights) == 0
    result = Path('in/a_deblurred.png')
    before = result.stat().st_mtime_ns
    assert run('in/a.png', weights=weights) == 0
    assert result.stat().st_mtime_ns == before
    assert 'skipped 1' in capsys.readouterr().err
    assert run('in/a.png', '--force', weights=weights) == 0
    assert result.stat().st_mtime_ns > before
    os.utime('in/a.png')
    os.utime(result, (1, 1))
    assert run('in/a.png', weights=weights) == 0
    assert result.stat().st_mtime > 1


def test_one_damaged_file_does_not_stop_the_others(
    folder: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path('in/b.jpg').write_bytes(Path('in/b.jpg').read_bytes()[:300])
    assert run('in', '-o', 'out', '--json', weights=weights) == 1
    out, err = capsys.readouterr()
    lines = {line['input']: line for line in map(json.loads, out.splitlines())}
    assert [lines[name]['status'] for name in ('in/a.png', 'in/b.jpg', 'in/deep/c.tif')] == [
        'restored', 'failed', 'restored',
    ]  # fmt: skip
    assert 'in/b.jpg' in lines['in/b.jpg']['error']
    assert 'error: in/b.jpg' in err
    assert 'Traceback' not in err
    assert not Path('out/b.jpg').exists()
    assert Path('out/deep/c.tif').exists()


def test_json_names_skipped_files_too(
    folder: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run('in/a.png', weights=weights)
    capsys.readouterr()
    assert run('in/a.png', 'in/b.jpg', '--json', weights=weights) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record['status'] for record in records] == ['skipped', 'restored']
    assert records[1]['megapixels'] == pytest.approx(48 * 72 / 1e6)
    assert records[1]['output'] == 'in/b_deblurred.jpg'


def test_shards_cover_everything_once(folder: Path, weights: Path) -> None:
    for i in (1, 2):
        assert run('in', '-o', f'out{i}', '--shard', f'{i}/2', weights=weights) == 0
    names = [sorted(path.name for path in Path(f'out{i}').rglob('*.*')) for i in (1, 2)]
    assert names == [['a.png', 'c.tif'], ['b.jpg']]


def test_comparison(folder: Path, weights: Path) -> None:
    assert run('in/a.png', '--compare', weights=weights) == 0
    both = np.asarray(Image.open('in/a_deblurred_compare.jpg'), int)
    assert both.shape == (48, 144, 3)
    assert np.abs(both[:, :72] - scene(0)).mean() < 4
    assert np.abs(both[:, 72:] - np.asarray(Image.open('in/a_deblurred.png'))).mean() < 4


def test_strength_and_format(folder: Path, weights: Path) -> None:
    assert run('in/a.png', '-o', 'x/', '--format', 'tif', '--strength', '0', weights=weights) == 0
    assert np.array_equal(np.asarray(Image.open('x/a.tif')), scene(0))


def test_standard_input_to_standard_output(
    folder: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    class Standard:
        buffer = io.BytesIO(Path('in/a.png').read_bytes())

    monkeypatch.setattr(sys, 'stdin', Standard)
    assert run('-', weights=weights) == 0
    image = Image.open(io.BytesIO(capfdbinary.readouterr().out))
    assert image.format == 'PNG'
    assert np.array_equal(np.asarray(image), Deblurrer(weights=weights).restore(scene(0)))


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['in/a.png', '-o', 'in/a.png'], 'not overwritten'),
        (['missing.png'], 'no such file'),
        (['in', '--shard', '3/2'], 'I/N'),
        (['in', '--shard', '0/2'], 'I/N'),
        (['in', '--tile', '3'], 'pixels'),
        (['in', '--strength', '2'], 'between 0'),
        (['in', '--format', 'gif'], 'choose one of'),
        (['in', '--model', 'restormr'], 'did you mean'),
        (['in', '--weights', 'nowhere.pth'], 'no such file'),
        (['in', '--weights', 'in/a.png'], 'in/a.png'),
        (['in', '--device', 'tpu'], 'no device'),
        (['-', '--json'], 'standard output'),
        ([], 'INPUT'),
    ],
)
def test_mistakes_end_with_status_2_and_write_nothing(
    folder: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert 'Traceback' not in err
    assert {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()} == before


def test_a_full_disk_fails_the_file_and_leaves_nothing(
    folder: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = Image.Image.save

    def full(self: Any, stream: Any, *arguments: Any, **options: Any) -> None:
        if 'a.png' in str(stream):
            Path(stream).write_bytes(b'half')
            raise OSError(28, 'No space left on device')
        save(self, stream, *arguments, **options)

    monkeypatch.setattr(Image.Image, 'save', full)
    assert run('in', '-o', 'out', weights=weights) == 1
    assert 'no space left on device' in capsys.readouterr().err
    assert sorted(path.name for path in Path('out').rglob('*.*')) == ['b.jpg', 'c.tif']


def test_an_interrupt_leaves_whole_files_only(
    folder: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bands = Deblurrer.bands

    def interrupted(self: Any, rows: Any, size: Any, *rest: Any) -> Any:
        if len(list(Path('out').rglob('*.*'))) >= 1:
            raise KeyboardInterrupt
        return bands(self, rows, size, *rest)

    monkeypatch.setattr(Deblurrer, 'bands', interrupted)
    with pytest.raises(SystemExit) as caught:
        run('in', '-o', 'out', weights=weights)
    assert caught.value.code == 130
    for path in Path('out').rglob('*.*'):
        Image.open(path).load()
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert run('in', '-o', 'out', weights=weights) == 0
    assert len(list(Path('out').rglob('*.*'))) == 3


def test_reading_restoring_and_writing_overlap(
    folder: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next image is read before this one is restored, on another thread; writing has one of its own."""
    import threading

    from dsgformer_arch.inference import deblur

    threads: dict[str, set[int]] = {'read': set(), 'write': set()}
    order: list[str] = []
    read, finish, bands = deblur._read, deblur._finish, Deblurrer.bands

    def reading(job: Any) -> Any:
        threads['read'].add(threading.get_ident())
        order.append(f'read {job.source}')
        return read(job)

    def finishing(*arguments: Any) -> None:
        threads['write'].add(threading.get_ident())
        finish(*arguments)

    def restoring(self: Any, *arguments: Any) -> Any:
        order.append('restore')
        return bands(self, *arguments)

    monkeypatch.setattr(deblur, '_read', reading)
    monkeypatch.setattr(deblur, '_finish', finishing)
    monkeypatch.setattr(Deblurrer, 'bands', restoring)
    assert run('in', '-o', 'out', weights=weights) == 0
    ids = {threading.get_ident(), *threads['read'], *threads['write']}
    assert len(ids) == 3
    assert order.count('restore') == 3


SCRIPT = 'import sys\nfrom dsgformer_arch.cli.dsgformer import main\nsys.exit(main())\n'
"""What pip installs as the console script."""


def as_installed(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / 'dsgformer'
    script.write_text(SCRIPT)
    root = Path(__file__).parents[3]
    return subprocess.run(
        [sys.executable, '-X', 'importtime', str(script), *arguments],
        env={**os.environ, 'PYTHONPATH': str(root)}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_help_loads_nothing_heavy(tmp_path: Path) -> None:
    for arguments in (['--help'], ['deblur', '--help'], ['batch', '--help'], ['deblur']):
        done = as_installed(tmp_path, *arguments)
        imported = {line.rpartition('|')[2].strip() for line in done.stderr.splitlines()}
        assert 'dsgformer_arch.cli.dsgformer' in imported
        assert not imported & {'torch', 'numpy', 'PIL', 'basicsr', 'tqdm', 'pyvips', 'av', 'ray', 'pyarrow'}
        assert done.returncode == (2 if arguments == ['deblur'] else 0)


@pytest.mark.long
def test_the_default_network_needs_no_more_than_torch(tmp_path: Path) -> None:
    Image.fromarray(scene()).save(tmp_path / 'a.png')
    done = as_installed(tmp_path, 'deblur', str(tmp_path / 'a.png'))
    assert done.returncode == 0, done.stderr[-500:]
    imported = {line.rpartition('|')[2].strip() for line in done.stderr.splitlines()}
    assert 'torch' in imported
    assert not imported & {'torchvision', 'basicsr', 'scipy', 'spandrel', 'requests', 'cv2'}
    assert not imported & {'torch._dynamo', 'triton', 'sympy'}
    restored = np.asarray(Image.open(tmp_path / 'a_deblurred.png'))
    assert np.abs(restored - Deblurrer().restore(scene()).astype(int)).max() <= 1


@pytest.mark.long
def test_start_and_exit_do_not_traverse_what_pytorch_made(tmp_path: Path) -> None:
    """Passes of the garbage collector over it take a third of the time for a small image."""
    Image.fromarray(scene()).save(tmp_path / 'a.png')
    script = tmp_path / 'dsgformer'
    script.write_text(
        'import atexit, gc, sys\ntraversed = []\n'
        'gc.callbacks.append(lambda *_: traversed.append(len(gc.get_objects())))\n'
        'atexit.register(lambda: print(max(traversed), len(gc.get_objects()), gc.isenabled()))\n'
        'from dsgformer_arch.cli.dsgformer import main\nsys.exit(main())\n'
    )
    done = subprocess.run(
        [sys.executable, str(script), 'deblur', str(tmp_path / 'a.png')],
        env={**os.environ, 'PYTHONPATH': str(Path(__file__).parents[3])}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-500:]
    most, left, enabled = done.stdout.split()
    assert enabled == 'True'
    assert int(most) < 50_000  # PyTorch makes more than three times as many
    assert int(left) < 1000


@pytest.mark.long
def test_the_installed_command_registers_when_it_needs_a_network(tmp_path: Path, weights: Path) -> None:
    Image.fromarray(scene()).save(tmp_path / 'a.png')
    done = as_installed(tmp_path, 'deblur', str(tmp_path / 'a.png'), '--weights', str(weights))
    assert done.returncode == 0, done.stderr[-500:]
    assert (tmp_path / 'a_deblurred.png').exists()


def peak_memory(image: Path, script: Path) -> int:
    """Bytes of memory that the command held at most while it restored an image in strips."""
    script.write_text(
        'import sys\nfrom dsgformer_arch.cli.dsgformer import main\nstatus = main()\n'
        "lines = open('/proc/self/status', encoding='utf-8').read().splitlines()\n"
        "print(next(line.split()[1] for line in lines if line.startswith('VmHWM:')))\n"
        'sys.exit(status)\n'
    )
    done = subprocess.run(
        [sys.executable, str(script), 'deblur', str(image), '--tile', '512', '--force'],
        env={**os.environ, 'PYTHONPATH': str(Path(__file__).parents[3])}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-500:]
    return int(done.stdout.split()[-1]) * 1024


@pytest.mark.long
@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='memory is read from /proc')
def test_memory_does_not_grow_with_the_height_of_a_tiff(tmp_path: Path) -> None:
    """Rows are read and written as tiles need them: 12 more megapixels, 36 MB, are never held at once."""
    peaks = []
    for height in (3000, 6000):
        path = tmp_path / f'{height}.tif'
        strip = np.tile(scene(), (2, 56, 1))[:64, :4000]
        with tifffile.TiffWriter(path) as writer:
            writer.write(
                (strip[: min(64, height - top)].tobytes() for top in range(0, height, 64)),
                shape=(height, 4000, 3), dtype=np.uint8, photometric='rgb', rowsperstrip=64,
            )  # fmt: skip
        peaks.append(peak_memory(path, tmp_path / 'dsgformer'))
    assert peaks[1] - peaks[0] < 3000 * 4000 * 3 / 2
