"""`tools/create_stream.py`: whole streams or none, in folders and in an S3 store."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dsgformer_arch.data.prepare import stream_writer
from dsgformer_arch.data.stream_files import INDEX, Bucket, Folder, open_stream, place_of
from dsgformer_arch.data.streaming_paired_dataset import StreamingPairedDataset
from dsgformer_arch.utils.errors import UserError
from tests.streams import options, write_images, write_stream
from tests.tools import scripts
from tests.tools.test_create_lmdb import save

pytest.importorskip('litdata')


def run(*arguments: object) -> int:
    """The status that the command would exit with."""
    return scripts.run('create_stream', *arguments)


@pytest.fixture
def gopro(tmp_path: Path) -> Path:
    root = tmp_path / 'GOPRO_Large'
    for number, folder in enumerate(('train/GOPR0372_07_00', 'train/GOPR0374_11_01', 'test/GOPR0384_11_00')):
        for kind in ('blur', 'blur_gamma', 'sharp'):
            save(root / folder / kind / '000001.png', seed=10 * number + len(kind))
    return root


def content(address: str | Path) -> dict[str, bytes]:
    """The files of a stream."""
    place = place_of(str(address))
    files = {name: place.read(name, 2**30) for name in place.names()}
    return {name: data for name, data in files.items() if data is not None and not name.startswith('.')}


def keys(address: str | Path) -> list[str]:
    return [entry.key for entry in open_stream(str(address)).entries]


def test_a_preset_becomes_streams(gopro: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / 'datasets/gopro_stream'
    assert run('gopro', gopro, out, '--verify', '--workers', 2) == 0
    assert sorted(path.name for path in out.iterdir()) == ['test', 'train']
    assert keys(out / 'train') == ['GOPR0372_07_00-000001', 'GOPR0374_11_01-000001']
    assert keys(out / 'test') == ['GOPR0384_11_00-000001']
    said = capsys.readouterr()
    assert f'wrote {out}/train: 2 pairs in 1 shards' in said.out
    assert 'verified 2 streams' in said.out
    assert 'writing train: 2 done' in said.err


def test_shards_have_the_size_that_is_asked_for(tmp_path: Path) -> None:
    images = write_images(tmp_path / 'images', 12)
    stream = open_stream(write_stream(images, tmp_path / 'out', shard_bytes=20_000))
    assert 2 < len(stream.index.chunks) < 12
    assert all(shard.chunk_bytes < 21_000 for shard in stream.index.chunks)
    one = open_stream(write_stream(images, tmp_path / 'single', shard_bytes=1))
    assert [shard.chunk_size for shard in one.index.chunks] == [1] * 12


def test_twice_is_once_and_other_files_need_force(
    gopro: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / 'out'
    assert run('gopro', gopro, out) == 0
    before = content(out / 'train')
    assert run('gopro', gopro, out) == 0
    assert capsys.readouterr().out.count('complete already') == 2
    assert run('gopro_gamma', gopro, out) == 2
    assert '--force to replace' in capsys.readouterr().err
    assert content(out / 'train') == before
    assert run('gopro_gamma', gopro, out, '--force', '--verify') == 0
    after = content(out / 'train')
    assert len(after) == len(before)
    assert not {name for name in before if name.startswith('chunk')} & set(after)


def test_problems_are_listed_and_nothing_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_images(tmp_path / 'images', 8)
    out = tmp_path / 'out'
    assert run('pairs', images, out, '--shard-size', 1) == 0
    before = content(out / 'train')
    for name in ('gt/004.png', 'gt/007.png'):
        (images / name).write_bytes((images / name).read_bytes()[:-30])
    (images / 'lq/001.png').unlink()
    assert run('pairs', images, out, '--force') == 2
    error = capsys.readouterr().err
    assert '3 problems with the images, so no stream was written' in error
    assert all(
        name in error for name in ('004.png: is truncated', '007.png: is truncated', '001.png: has no')
    )
    assert content(out / 'train') == before
    assert run('pairs', images, tmp_path / 'new') == 2
    assert not (tmp_path / 'new' / 'train').exists()


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_images(tmp_path / 'images/train', 2).parent
    assert run('pairs', images / 'train', images) == 2
    assert 'holds other files, such as gt/000.png' in capsys.readouterr().err
    assert len(list(images.rglob('*.*'))) == 4


def interrupted(images: Path, out: str, after: int) -> None:
    """Write a stream and kill the process before one of its writes."""
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status), 'it ended before it was killed'
        return
    try:
        count = 0

        def killing(write: Callable[..., None]) -> Callable[..., None]:
            def wrapped(place: object, name: str, data: object) -> None:
                nonlocal count
                count += 1
                if count > after:
                    os.kill(os.getpid(), signal.SIGKILL)
                write(place, name, data)

            return wrapped

        Folder.write = killing(Folder.write)  # type: ignore[method-assign]
        Bucket.write = killing(Bucket.write)  # type: ignore[method-assign]
        write_stream(images, out)
    finally:
        os._exit(0)


@pytest.mark.parametrize('where', ['folder', 'bucket'])
@pytest.mark.parametrize('after', [0, 1, 4, -1])
def test_a_killed_run_leaves_no_stream_and_is_continued(
    where: str,
    after: int,
    tmp_path: Path,
    bucket: str,
) -> None:
    images = write_images(tmp_path / 'images', 8)
    whole = content(write_stream(images, tmp_path / 'whole'))
    shards = len(open_stream(str(tmp_path / 'whole/train')).index.chunks)
    assert shards >= 3
    out = str(tmp_path / 'out') if where == 'folder' else f'{bucket}/out'
    after = after if after >= 0 else 2 * shards + 1  # before the index
    interrupted(images, out, after)
    with pytest.raises(UserError, match='holds no finished stream'):
        StreamingPairedDataset(options(f'{out}/train'))
    said: list[str] = []
    write_stream(images, out, say=said.append, verify=True)
    assert content(f'{out}/train') == whole
    assert any('took over' in line for line in said) == (after > 1)


def test_shards_of_an_interrupted_run_of_other_files_are_not_used(tmp_path: Path) -> None:
    images = write_images(tmp_path / 'images', 8)
    out = str(tmp_path / 'out')
    interrupted(images, out, 4)
    file = images / 'gt/000.png'
    file.write_bytes((images / 'gt/003.png').read_bytes())
    write_stream(images, out, verify=True)
    place = Folder(f'{out}/train')
    assert not [name for name in place.names() if name.startswith('partial')]
    listed = {shard.filename for shard in open_stream(f'{out}/train').index.chunks}
    assert {name for name in place.names() if name.startswith('chunk')} == listed


def test_an_object_store_holds_the_same(tmp_path: Path, bucket: str) -> None:
    images = write_images(tmp_path / 'images', 5)
    assert run('pairs', images, f'{bucket}/some/prefix', '--verify') == 0
    assert run('pairs', images, tmp_path / 'out') == 0
    assert content(f'{bucket}/some/prefix/train') == content(tmp_path / 'out/train')


def test_a_full_disk_is_reported_and_the_run_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_images(tmp_path / 'images', 6)
    store = stream_writer._Target.store
    count = 0

    def full(target: stream_writer._Target, number: int, waiting: list[stream_writer.Prepared]) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise OSError(errno.ENOSPC, 'No space left on device')
        store(target, number, waiting)

    monkeypatch.setattr(stream_writer._Target, 'store', full)
    with pytest.raises(UserError, match='is full; free some space and run the same command again'):
        write_stream(images, tmp_path / 'out')
    assert not (tmp_path / 'out/train' / INDEX).exists()
    monkeypatch.setattr(stream_writer._Target, 'store', store)
    said: list[str] = []
    write_stream(images, tmp_path / 'out', say=said.append)
    assert 'took over 1 shards' in said[0]


def test_damage_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_images(tmp_path / 'images', 4)
    out = tmp_path / 'out'
    assert run('pairs', images, out) == 0
    (shard,) = (out / 'train').glob('chunk-*.bin')
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    assert run('pairs', images, out, '--verify') == 2
    assert 'differs from what is stored of it' in capsys.readouterr().err
    assert run('pairs', images, out, '--verify', '--force') == 0
    shard.write_bytes(data[:-1])
    assert run('pairs', images, out) == 2
    assert 'not whole' in capsys.readouterr().err


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    images = write_images(tmp_path / 'images', 2)
    target = stream_writer._Target(
        stream_writer.Split('train'), str(tmp_path / 'out'), 'pairs', shard_bytes=1
    )
    with stream_writer._alone(target), pytest.raises(UserError, match='another run is writing'):
        write_stream(images, tmp_path / 'out')


@pytest.mark.parametrize(
    ('arguments', 'sentence'),
    [
        (['gopo', 'ROOT', 'OUT'], "invalid choice: 'gopo'"),
        (['gopro', 'ROOT/nowhere', 'OUT'], 'nowhere is not a folder'),
        (['gopro', 'ROOT', 'OUT', '--lq', 'blur'], '--lq and --gt belong to the preset pairs'),
        (['gopro', 'ROOT', 'OUT', '--shard-size', '0'], "'0' is not a whole number of at least 1"),
        (['gopro', 'ROOT', 'OUT', '--shard-size', '5000'], 'shards have at most 1024 MB'),
        (['gopro', 'ROOT', 's3://-/x'], 's3://-/x/train is not an address of the form s3://bucket/prefix'),
        (['gopro', 'ROOT', 'gs://b/x'], 'is neither a folder nor an address s3://bucket/prefix'),
        (['gopro', 'ROOT', 's3://nowhere/x'], 'there is no bucket nowhere'),
        (['gopro', 'ROOT', 'ROOT/train/GOPR0372_07_00/sharp/000001.png'], 'cannot write to'),
    ],
)
def test_wrong_arguments_are_reported_in_one_sentence(
    arguments: list[str],
    sentence: str,
    gopro: Path,
    tmp_path: Path,
    bucket: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(gopro.rglob('*'))
    filled = [each.replace('ROOT', str(gopro)).replace('OUT', str(tmp_path / 'out')) for each in arguments]
    assert run(*filled) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert 'Traceback' not in error
    assert sorted(gopro.rglob('*')) == before


def test_without_litdata_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = write_images(tmp_path / 'images', 1)
    monkeypatch.setitem(sys.modules, 'litdata', None)
    with pytest.raises(UserError, match=r"pip install 'dsgformer\[stream\]'"):
        write_stream(images, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
