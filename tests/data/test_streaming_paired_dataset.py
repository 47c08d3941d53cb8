"""Streams: the same crops as from an LMDB, in an order that follows from seed and position, from anywhere."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr.data.paired_image_dataset import PairedImageDataset
from hypothesis import given
from hypothesis import strategies as st

from dsgformer_arch.cli import basicsr
from dsgformer_arch.data import stream_files
from dsgformer_arch.data.paired_crop_dataset import PairedCropDataset
from dsgformer_arch.data.sampler import SampleStream, training_loader
from dsgformer_arch.data.stream_cache import Shards
from dsgformer_arch.data.stream_files import INDEX, Shard, open_stream, parse_index, read_item
from dsgformer_arch.data.streaming_paired_dataset import ShardOrder, StreamingPairedDataset
from dsgformer_arch.utils.errors import UserError
from tests.cli.test_basicsr import assert_same_end
from tests.cli.test_survival import Child, finish, free_port
from tests.streams import options, write_images, write_lmdbs, write_stream
from tests.trees import ROOT, tiny_options, write_project

pytest.importorskip('litdata')

PAIRS = 14


@pytest.fixture(scope='session')
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp('pairs'), PAIRS)


@pytest.fixture
def local(images: Path, tmp_path: Path) -> str:
    return write_stream(images, tmp_path / 'stream')


@pytest.fixture
def remote(images: Path, bucket: str) -> str:
    return write_stream(images, bucket)


@pytest.fixture(params=['local', 'remote'])
def stream(request: pytest.FixtureRequest) -> str:
    address: str = request.getfixturevalue(request.param)
    return address


def rewrite_index(address: str, change: Callable[[dict[str, Any]], Any]) -> None:
    path = Path(address, INDEX)
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


# --- samples ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('augment', [False, True])
def test_crops_are_those_of_an_lmdb(augment: bool, images: Path, local: str, tmp_path: Path) -> None:
    write_lmdbs(images, tmp_path / 'lmdb')
    changes = {'use_hflip': augment, 'use_rot': augment}
    roots = {f'dataroot_{side}': str(tmp_path / 'lmdb' / f'train_{side}.lmdb') for side in ('gt', 'lq')}
    theirs = PairedCropDataset(options(local, io_backend={'type': 'lmdb'}, **roots, **changes))
    ours = StreamingPairedDataset(options(local, **changes))
    assert len(ours) == len(theirs) == PAIRS
    for draw in range(2 * PAIRS):
        random.seed(draw)
        a = ours[draw % PAIRS]
        random.seed(draw)
        b = theirs[draw % PAIRS]
        assert a['lq_path'] == b['lq_path']
        assert torch.equal(a['gt'], b['gt'])
        assert torch.equal(a['lq'], b['lq'])


def test_whole_images_for_validation(images: Path, stream: str, tmp_path: Path) -> None:
    ours = StreamingPairedDataset(options(stream, tmp_path / 'cache', phase='val'))
    theirs = PairedImageDataset({
        'phase': 'val', 'scale': 1, 'io_backend': {'type': 'disk'}, 'filename_tmpl': '{}',
        'dataroot_gt': str(images / 'gt'), 'dataroot_lq': str(images / 'gt'),
    })  # fmt: skip
    expected = {Path(pair['gt_path']).stem: pair['gt'] for pair in theirs}
    for index in range(PAIRS):
        assert ours[index]['gt_path'] == f'{index:03d}'
        assert torch.equal(ours[index]['gt'], expected[f'{index:03d}'])


def test_litdata_reads_the_stream(images: Path, local: str) -> None:
    """The format is LitData's, not only like it."""
    from litdata import StreamingDataset

    items = list(StreamingDataset(local))
    assert [bytes(item[0]).decode() for item in items] == [f'{index:03d}' for index in range(PAIRS)]
    assert all(
        bytes(item[2]) == (images / 'gt' / f'{i:03d}.png').read_bytes() for i, item in enumerate(items)
    )


def test_small_images_are_padded(tmp_path: Path) -> None:
    address = write_stream(write_images(tmp_path / 'images', 2, 12, 40), tmp_path / 'out')
    sample = StreamingPairedDataset(options(address, pad_to_gt_size=True))[0]
    assert sample['lq'].shape == (3, 16, 16)


# --- order --------------------------------------------------------------------------------------------------


def test_a_pass_touches_few_shards_at_a_time() -> None:
    sizes, window = [5, 3, 8, 6] * 10, 4
    order, _, shards = ShardOrder(sizes, window)(seed=3)
    assert sorted(order.tolist()) == list(range(sum(sizes)))
    assert sorted(shards.tolist()) == list(range(40))
    owner = [number for number, size in enumerate(sizes) for _ in range(size)]
    visited = [owner[sample] for sample in order]
    first = {shard: visited.index(shard) for shard in range(40)}
    last = {shard: len(visited) - visited[::-1].index(shard) for shard in range(40)}
    live = [sum(first[s] <= place < last[s] for s in range(40)) for place in range(len(visited))]
    assert max(live) <= window + 1
    assert sum(live) / len(live) > window / 2, 'shards are read one after another'
    assert order.tolist() != ShardOrder(sizes, window)(seed=4)[0].tolist()
    assert order.tolist() == ShardOrder(sizes, window)(seed=3)[0].tolist()


def test_a_window_of_all_shards_reads_like_an_lmdb() -> None:
    whole = SampleStream(20, batch_size=4, batches=15, seed=5)
    order = ShardOrder([10, 10], window=2)
    sharded = SampleStream(20, 4, 15, seed=5, order=lambda seed: order(seed)[0].tolist())
    assert list(whole) == list(sharded)


def test_following_shards_are_those_that_come_next() -> None:
    order = ShardOrder([4] * 12, window=3)
    seen: set[int] = set()
    from dsgformer_arch.data.sampler import PASS, derived_seed

    samples = order(derived_seed(7, PASS, 0))[0]
    shards = order(derived_seed(7, PASS, 0))[2].tolist()
    next_pass = order(derived_seed(7, PASS, 1))[2].tolist()
    for position in range(48):
        seen.add(int(samples[position]) // 4)
        following = order.following(position, seed=7, count=2)
        assert len(following) == 2
        ahead = (shards + next_pass)[(shards + next_pass).index(following[0], 1 if position else 0) :]
        assert following == ahead[:2]
        if following[0] in seen:
            assert following[0] in next_pass[:2], 'a shard that was read already'


def loaded(dataset: StreamingPairedDataset, workers: int, start: int = 0, batches: int = 14) -> list[Any]:
    stream = SampleStream(len(dataset), 3, batches - start, seed=2, start=3 * start, order=dataset.order)
    found = list(training_loader(dataset, stream, workers, False, False))
    assert not [batch['error'] for batch in found if 'error' in batch]
    return found


@pytest.mark.parametrize('workers', [0, 2])
def test_a_run_continues_with_the_same_crops(workers: int, stream: str, tmp_path: Path) -> None:
    """Three passes, in one go and from the middle of the second one on, into an empty cache."""
    expected = loaded(StreamingPairedDataset(options(stream, tmp_path / 'first')), 0)
    found = loaded(StreamingPairedDataset(options(stream, tmp_path / 'second')), workers, start=6)
    for before, after in zip(expected[6:], found, strict=True):
        assert before['lq_path'] == after['lq_path']
        assert torch.equal(before['lq'], after['lq'])
        assert torch.equal(before['gt'], after['gt'])


def test_downloads_leave_the_random_state_alone(remote: str, tmp_path: Path) -> None:
    """boto3 and LitData draw from the module `random`, as crops do."""
    dataset = StreamingPairedDataset(options(remote, tmp_path))
    random.seed(5)
    state = random.getstate()
    dataset.at(0, 0, seed=1)
    assert random.getstate() == state
    assert cached(tmp_path)


def test_two_processes_get_equal_and_disjoint_batches(remote: str, tmp_path: Path) -> None:
    """Ranks of a gloo group, which share a cache, read together what one process reads."""
    alone = loaded(StreamingPairedDataset(options(remote, tmp_path / 'cache')), 0, batches=8)
    port = free_port()
    children = []
    for rank in (0, 1):
        child = os.fork()
        if child:
            children.append(child)
            continue
        status = 1
        try:
            torch.distributed.init_process_group('gloo', f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)
            dataset = StreamingPairedDataset(options(remote, tmp_path / 'shared'))
            share = SampleStream(len(dataset), 3, 4, 2, 0, rank, 2, dataset.order)
            mine = [batch['lq_path'] for batch in training_loader(dataset, share, 0, False, False)]
            both: list[Any] = [None, None]
            torch.distributed.all_gather_object(both, mine)
            assert len(both[0]) == len(both[1]) == 4
            assert all(len(batch) == 3 for batches in both for batch in batches)
            together = [batch for pair in zip(*both, strict=True) for batch in pair]
            assert together == [batch['lq_path'] for batch in alone]
            read = [key for batch in together for key in batch]
            assert len(set(read[:PAIRS])) == PAIRS
            torch.distributed.destroy_process_group()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]


@pytest.mark.long
@pytest.mark.parametrize('workers', [0, 2])
def test_a_killed_training_run_ends_like_an_uninterrupted_one(
    workers: int, remote: str, tmp_path: Path
) -> None:
    settings = tiny_options(iterations=24)
    train = settings['datasets']['train']
    for key in ('dataroot_gt', 'dataroot_lq', 'io_backend'):
        del train[key]
    train |= {'type': 'StreamingPairedDataset', 'dataroot': remote, 'shuffle_shards': 2}
    train |= {'num_worker_per_gpu': workers, 'cache_dir': str(tmp_path / 'cache'), 'dataset_enlarge_ratio': 1}
    settings['logger'] |= {'save_checkpoint_freq': 3, 'print_freq': 10}
    file = write_project(tmp_path, settings)
    arguments = ['train', '-opt', str(file)]
    finish([*arguments, '--force_yml', 'name=whole'], tmp_path / 'whole.log')
    for iterations in (5, 7):
        child = Child([*arguments, '--auto_resume'], tmp_path / 'killed.log')
        assert child.wait_for(b'i', iterations), child.log.read_text()[-2000:]
        os.kill(child.pid, signal.SIGKILL)
        assert child.end() == -signal.SIGKILL
    finish([*arguments, '--auto_resume'], tmp_path / 'killed.log')
    assert_same_end(tmp_path / 'experiments/whole', tmp_path / 'experiments/tiny', 24)


# --- the cache ----------------------------------------------------------------------------------------------


def cached(folder: Path) -> dict[str, int]:
    return {
        path.name: path.stat().st_size for path in folder.glob('*/chunk-*.bin*') if path.suffix != '.lock'
    }


def test_the_cache_stays_within_its_bound(remote: str, tmp_path: Path) -> None:
    listing = open_stream(remote)
    shards = listing.index.chunks
    largest = max(shard.chunk_bytes for shard in shards)
    assert len(shards) >= 5
    cache = Shards(listing, str(tmp_path), limit=2 * largest, most_open=2)
    for turn in range(2):
        for number, shard in enumerate(shards):
            for item in range(shard.chunk_size):
                key = read_item(cache.descriptor(number), shard, item, remote)[0]
                assert key.decode() in {entry.key for entry in listing.entries}
            assert sum(cached(tmp_path).values()) <= 2 * largest, turn
    assert shards[-1].filename in cached(tmp_path)
    assert shards[0].filename not in cached(tmp_path)


def test_a_removed_shard_can_still_be_read_and_comes_back(remote: str, tmp_path: Path) -> None:
    listing = open_stream(remote)
    shard = listing.index.chunks[0]
    cache = Shards(listing, str(tmp_path), limit=10**9, most_open=3)
    first = read_item(cache.descriptor(0), shard, 0, remote)
    for path in tmp_path.glob('*/*.bin'):
        path.unlink()
    assert read_item(cache.descriptor(0), shard, 0, remote) == first
    assert read_item(cache.descriptor(1), listing.index.chunks[1], 0, remote) != first
    assert read_item(cache.descriptor(0), shard, 0, remote) == first
    assert len(cached(tmp_path)) == 2


def test_what_a_killed_download_left_is_removed(remote: str, tmp_path: Path) -> None:
    listing = open_stream(remote)
    limit = 2 * max(shard.chunk_bytes for shard in listing.index.chunks)
    cache = Shards(listing, str(tmp_path), limit, most_open=2)
    cache.folder.mkdir()
    (cache.folder / f'{listing.index.chunks[1].filename}.part').write_bytes(bytes(limit))
    cache.descriptor(0)
    assert list(cached(tmp_path)) == [listing.index.chunks[0].filename]


def test_shards_are_downloaded_ahead(remote: str, tmp_path: Path) -> None:
    listing = open_stream(remote)
    cache = Shards(listing, str(tmp_path), limit=10**9, most_open=2)
    cache.expect([3, 1])
    wanted = {listing.index.chunks[number].filename for number in (1, 3)}
    patience = time.monotonic() + 60
    while set(cached(tmp_path)) != wanted and time.monotonic() < patience:
        time.sleep(0.01)
    assert set(cached(tmp_path)) == wanted


# --- what is wrong ------------------------------------------------------------------------------------------


def refused(settings: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        StreamingPairedDataset(settings)
    return str(caught.value)


@pytest.mark.parametrize(
    ('changes', 'sentence'),
    [
        ({'dataroot': 'nowhere'}, 'there is no folder nowhere; tools/create_stream.py makes it'),
        ({'dataroot': 'gs://bucket/x'}, 'is neither a folder nor an address s3://bucket/prefix'),
        ({'dataroot': 's3://B/x'}, 's3://B/x is not an address of the form'),
        ({'gt_size': 41}, 'gt_size is 41, but the image 000 is only 48×40'),
        ({'scale': 2}, 'has no scale 2'),
        ({'color': 'y'}, "has no color 'y'"),
    ],
)
def test_wrong_options_are_reported_in_one_sentence(
    changes: dict[str, Any], sentence: str, local: str
) -> None:
    assert sentence in refused(options(local) | changes)


def test_a_small_cache_is_refused(remote: str, tmp_path: Path) -> None:
    fault = refused(options(remote, tmp_path, max_cache_size=1e-5))
    assert 'max_cache_size is 1e-05, but 5 shards take up to' in fault
    assert 'or lower shuffle_shards' in fault


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ('damage', 'sentence'),
    [
        (lambda folder: (folder / INDEX).unlink(), 'holds no finished stream: it has no index.json'),
        (lambda folder: (folder / INDEX).write_text('{'), 'index.json is damaged or of another kind'),
        (lambda folder: (folder / INDEX).write_text('[]'), 'index.json is damaged or of another kind'),
        (lambda folder: (folder / 'meta_info.txt').unlink(), 'meta_info.txt is missing'),
        (lambda folder: truncate(folder / 'meta_info.txt'), 'meta_info.txt does not belong to index.json'),
        (lambda folder: truncate(sorted(folder.glob('*.bin'))[1]), '.bin is truncated: it has'),
        (lambda folder: sorted(folder.glob('*.bin'))[1].unlink(), 'lacks the shard chunk-'),
    ],
)
def test_a_damaged_stream_is_reported_in_one_sentence(
    damage: Callable[[Path], Any], sentence: str, local: str
) -> None:
    damage(Path(local))
    fault = refused(options(local))
    assert sentence in fault
    assert 'tools/create_stream.py' in fault
    assert '\n' not in fault


@pytest.mark.parametrize(
    'change',
    [
        lambda index: index['chunks'][0].update(filename='../../chunk-0-0.bin'),
        lambda index: index['chunks'][0].update(filename='/etc/passwd'),
        lambda index: index['chunks'][0].update(chunk_bytes=2**40),
        lambda index: index['chunks'][0].update(chunk_size=0),
        lambda index: index['chunks'][1].update(filename=index['chunks'][0]['filename']),
        lambda index: index['config'].update(data_format=['pickle', 'bytes', 'bytes']),
        lambda index: index['config'].update(compression='zstd'),
        lambda index: index.update(chunks=[]),
    ],
)
def test_an_index_of_another_kind_is_refused(change: Callable[[dict[str, Any]], Any], local: str) -> None:
    rewrite_index(local, change)
    assert 'index.json is damaged' in refused(options(local))


def test_a_count_that_does_not_fit_is_refused(local: str) -> None:
    rewrite_index(local, lambda index: index['chunks'].pop())
    assert 'counts' in refused(options(local))


def test_a_damaged_image_is_named(local: str, tmp_path: Path) -> None:
    shard = open_stream(local).index.chunks[0]
    path = Path(local, shard.filename)
    data = path.read_bytes()
    start = data.index(b'IDAT') + 10
    path.write_bytes(data[:start] + bytes(40) + data[start + 40 :])
    dataset = StreamingPairedDataset(options(local))
    stream = SampleStream(PAIRS, PAIRS, 1, seed=0)
    (batch,) = training_loader(dataset, stream, 0, False, False)
    assert f'{path}: the image 000' in batch['error']
    (batch,) = training_loader(dataset, stream, 0, True, False)
    assert len(batch['lq_path']) == PAIRS
    assert len(batch['faults']) == 1


def test_a_damaged_shard_in_a_bucket_is_named(remote: str, tmp_path: Path) -> None:
    shard = open_stream(remote).index.chunks[0]
    name = f'{remote}/{shard.filename}'
    place = stream_files.Bucket(remote)
    data = place.read(shard.filename, 2**30)
    assert data is not None
    dataset = StreamingPairedDataset(options(remote, tmp_path / 'cache'))
    for damaged, sentence in (
        (data[:-1], f'the shard {name} is truncated: it has {len(data) - 1} bytes instead of {len(data)}'),
        (bytes(len(data)), f"the shard {name} is damaged: its SHA-256 is not the index's"),
    ):
        place.write(shard.filename, damaged)
        with pytest.raises(UserError) as caught:
            dataset[0]
        assert sentence in str(caught.value)
    place.delete(shard.filename)
    with pytest.raises(UserError, match=f'lacks the shard {shard.filename}'):
        dataset[0]
    assert not cached(tmp_path / 'cache')
    place.write(shard.filename, data)
    assert dataset[0]['lq_path'] == '000'


def test_a_store_that_does_not_let_in_is_reported(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 'there is no bucket nowhere' in refused(options('s3://nowhere/train'))
    assert 'holds no finished stream' in refused(options(f'{remote}/other'))
    monkeypatch.setenv('AWS_ENDPOINT_URL', f'http://127.0.0.1:{free_port()}')
    assert 'cannot be reached' in refused(options(remote))
    monkeypatch.delenv('AWS_ACCESS_KEY_ID')
    monkeypatch.delenv('AWS_SECRET_ACCESS_KEY')
    stream_files._client.cache_clear()
    assert 'set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY' in refused(options(remote))


def test_option_files_are_checked_against_the_stream(
    local: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tiny_options()
    train = settings['datasets']['train']
    for key in ('dataroot_gt', 'dataroot_lq', 'io_backend'):
        del train[key]
    train |= {'type': 'StreamingPairedDataset', 'dataroot': local, 'gt_size': 64, 'max_cache_size': 0}
    file = write_project(tmp_path, settings)
    with pytest.raises(SystemExit) as stop:
        basicsr.main(['train', '-opt', str(file)])
    assert stop.value.code == 2
    assert 'datasets: train: max_cache_size is 0, but should be a number above 0' in capsys.readouterr().err
    train['max_cache_size'] = 1
    write_project(tmp_path, settings)
    with pytest.raises(SystemExit):
        basicsr.main(['train', '-opt', str(file)])
    assert 'datasets: train: gt_size is 64, but the image 000 is only 48×40' in capsys.readouterr().err


def test_without_litdata_folders_are_read_and_the_extra_is_named(local: str) -> None:
    code = f"""
import sys
sys.modules['litdata'] = sys.modules['boto3'] = sys.modules['botocore'] = None
from dsgformer_arch.data.streaming_paired_dataset import StreamingPairedDataset
from dsgformer_arch.utils.errors import UserError
opt = dict(phase='train', scale=1, gt_size=16, use_hflip=True, use_rot=True)
print(StreamingPairedDataset(dict(opt, dataroot={local!r}))[3]['lq'].shape)
try:
    StreamingPairedDataset(dict(opt, dataroot='s3://bucket/train'))
except UserError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert ran.stderr == ''
    assert ran.stdout.startswith('torch.Size([3, 16, 16])')
    assert "which is missing; install it: pip install 'dsgformer[stream]'" in ran.stdout


@given(st.binary(max_size=300))
def test_any_index_is_read_or_refused(text: bytes) -> None:
    with pytest.raises(UserError, match='damaged or of another kind'):
        parse_index(text, 'somewhere')


@given(st.integers(0, 119), st.binary(min_size=1, max_size=8), st.integers(0, 2), st.integers(0, 120))
def test_any_shard_is_read_or_refused(place: int, change: bytes, number: int, length: int) -> None:
    items = [b''.join(len(b).to_bytes(4, 'little') for b in leaves) + b''.join(leaves)
             for leaves in ([b'k', b'lq' * i, b'gt'] for i in (1, 2, 3))]  # fmt: skip
    offsets, position = [], 4 * 5
    for item in items:
        offsets.append(position)
        position += len(item)
    numbers = [3, *offsets, position]
    data = bytearray(b''.join(n.to_bytes(4, 'little') for n in numbers) + b''.join(items))
    digest = hashlib.sha256(data).hexdigest()
    shard = Shard(filename='chunk-0-0.bin', chunk_bytes=len(data), chunk_size=3, sha256=digest)
    data[place : place + len(change)] = change
    descriptor = os.memfd_create('shard')
    try:
        os.write(descriptor, data[:length] if length < 60 else data)
        with contextlib.suppress(UserError):
            assert sum(map(len, read_item(descriptor, shard, number, 'somewhere'))) <= len(data)
    finally:
        os.close(descriptor)
