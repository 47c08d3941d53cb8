from __future__ import annotations

import ctypes
import fcntl
import json
import os
import resource
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import lmdb
import numpy as np
import pytest
from basicsr.data.paired_image_dataset import PairedImageDataset
from basicsr.utils.lmdb_util import make_lmdb_from_imgs
from numpy.typing import NDArray

from dsgformer_arch.data import png_crop
from dsgformer_arch.data.image_files import raw_image
from dsgformer_arch.data.prepare import lmdb_writer, pair_files
from dsgformer_arch.data.prepare.layouts import Pair, Split, read_pairs
from dsgformer_arch.data.prepare.lmdb_writer import PARTIAL, RECORD, CropGrid, create_lmdbs
from dsgformer_arch.utils.errors import UserError
from tests.data.test_image_files import png_of_size

Pixels = NDArray[Any]


def noise(height: int, width: int, channels: int = 3, seed: int = 0, depth: type = np.uint8) -> Pixels:
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.default_rng(seed).integers(0, np.iinfo(depth).max, shape, dtype=depth)


def save_pair(root: Path, name: str, lq: Pixels, gt: Pixels) -> None:
    for side, image in (('lq', lq), ('gt', gt)):
        (root / side).mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(root / side / name), image)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Five pairs of different small sizes, one of them JPEG."""
    for number in range(4):
        size = 16 + number, 24 - number
        save_pair(tmp_path, f'{number}.png', noise(*size, seed=number), noise(*size, seed=100 + number))
    save_pair(tmp_path, '4.jpg', noise(20, 30), noise(20, 30, seed=104))
    return tmp_path


@pytest.fixture
def said() -> list[str]:
    return []


def create(root: Path, out: Path, split: str = 'train', **options: Any) -> None:
    options.setdefault('say', lambda line: None)
    create_lmdbs([read_pairs(root, split)], out, 'pairs', **options)


def stored(path: Path) -> dict[str, bytes]:
    """All that an LMDB holds; asserts that `meta_info.txt` lists exactly that."""
    with lmdb.open(str(path), readonly=True, lock=False) as environment, environment.begin() as transaction:
        held = {bytes(key).decode(): bytes(value) for key, value in transaction.cursor()}
    lines = (path / 'meta_info.txt').read_text().splitlines()
    assert sorted(line.split('.')[0] for line in lines) == sorted(held)
    return held


def files(folder: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in folder.iterdir()}


def everything(folder: Path) -> set[Path]:
    return set(folder.rglob('*'))


def decode(data: bytes) -> Pixels:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    assert image is not None
    return image


# --- what is written ----------------------------------------------------------------------------------------


def test_whole_images_are_stored_byte_for_byte(root: Path) -> None:
    create(root, root / 'new/out', workers=3, verify=True)
    for side in ('lq', 'gt'):
        assert stored(root / f'new/out/train_{side}.lmdb') == files(root / side)
    assert sorted(path.name for path in (root / 'new/out').iterdir()) == ['train_gt.lmdb', 'train_lq.lmdb']


@pytest.mark.parametrize('crop', [None, CropGrid(12, 4)])
def test_basicsr_reads_the_pairs(root: Path, crop: CropGrid | None) -> None:
    create(root, root, crop=crop)
    data_set = PairedImageDataset(
        {
            'dataroot_lq': str(root / 'train_lq.lmdb'),
            'dataroot_gt': str(root / 'train_gt.lmdb'),
            'io_backend': {'type': 'lmdb'},
            'scale': 1,
            'phase': 'val',
        }
    )
    expected = sorted(files(root / 'lq')) if crop is None else sorted(stored(root / 'train_lq.lmdb'))
    assert [item['lq_path'] for item in data_set] == expected
    for item in data_set:
        for side in ('lq', 'gt'):
            key = item[f'{side}_path']
            if crop is None:
                source = decode(files(root / side)[key])
            else:
                name, number = key.split('_s')
                image = decode(files(root / side)[name])
                top, left = crop.corners(*image.shape[:2])[int(number) - 1]
                source = image[top : top + 12, left : left + 12]
            restored = item[side].permute(1, 2, 0).numpy()[..., ::-1] * np.float32(255)
            np.testing.assert_allclose(restored, source, atol=1e-4)


def test_meta_info_is_what_basicsr_writes(tmp_path: Path) -> None:
    for name, image in {
        'grey': noise(8, 9, 1),
        'grey16': noise(7, 9, 1, depth=np.uint16),
        'rgb': noise(6, 9),
        'rgb16': noise(5, 9, depth=np.uint16),
        'rgba': noise(4, 9, 4),
    }.items():
        save_pair(tmp_path, f'{name}.png', image, image)
    create(tmp_path, tmp_path)
    names = sorted(path.name for path in (tmp_path / 'gt').iterdir())
    keys = [Path(name).stem for name in names]
    make_lmdb_from_imgs(str(tmp_path / 'gt'), str(tmp_path / 'basicsr.lmdb'), names, keys, map_size=2**20)
    for side in ('lq', 'gt'):
        ours = tmp_path / f'train_{side}.lmdb' / 'meta_info.txt'
        assert ours.read_bytes() == (tmp_path / 'basicsr.lmdb/meta_info.txt').read_bytes()


@pytest.mark.parametrize('length', range(8, 30))
@pytest.mark.parametrize(('size', 'step'), [(8, 4), (8, 8), (8, 3), (8, 11), (5, 5)])
def test_crops_start_where_extract_subimages_starts_them(length: int, size: int, step: int) -> None:
    space = np.arange(0, length - size + 1, step)
    if length - (space[-1] + size) > 0:  # its thresh_size
        space = np.append(space, length - size)
    corners = CropGrid(size, step).corners(length, 8)
    assert [top for top, left in corners if left == 0] == space.tolist()
    covered = np.zeros(length, bool)
    for top, _ in corners:
        covered[top : top + size] = True
    assert covered.all() or step > size


def test_gopro_frames_give_eight_crops() -> None:
    """NAFNet's GoPro set has 16,824 crops of 512x512 with step 256: 8 for each of the 2103 frames."""
    assert CropGrid(512, 256).corners(720, 1280) == [(y, x) for y in (0, 208) for x in (0, 256, 512, 768)]


@pytest.mark.parametrize('channels', [1, 3, 4])
@pytest.mark.parametrize('depth', [np.uint8, np.uint16])
def test_crops_keep_every_bit(tmp_path: Path, channels: int, depth: type) -> None:
    lq, gt = (noise(9, 13, channels, seed, depth) for seed in (1, 2))
    save_pair(tmp_path, 'x.png', lq, gt)
    create(tmp_path, tmp_path, crop=CropGrid(8, 4), workers=2, verify=True)
    for side, image in (('lq', lq), ('gt', gt)):
        held = stored(tmp_path / f'train_{side}.lmdb')
        corners = [(y, x) for y in (0, 1) for x in (0, 4, 5)]
        assert sorted(held) == [f'x_s{number:03d}' for number in range(1, 7)]
        for (y, x), key in zip(corners, sorted(held), strict=True):
            crop = decode(held[key])
            assert crop.dtype == image.dtype
            np.testing.assert_array_equal(crop, image[y : y + 8, x : x + 8])


def test_the_map_grows_and_batches_stay_small(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb_writer, 'FIRST_MAP_BYTES', 4096 * 8)
    monkeypatch.setattr(lmdb_writer, 'BATCH_BYTES', 3000)
    batches: list[int] = []
    commit = lmdb_writer._LmdbFile._commit

    def watched(file: lmdb_writer._LmdbFile) -> None:
        batches.append(sum(len(image.data) for image in file._batch))
        commit(file)

    monkeypatch.setattr(lmdb_writer._LmdbFile, '_commit', watched)
    for number in range(20):
        save_pair(root, f'more{number}.png', noise(32, 32, seed=number), noise(32, 32, seed=number))
    create(root, root)
    largest = max(path.stat().st_size for side in ('lq', 'gt') for path in (root / side).iterdir())
    assert max(batches) < 3000 + largest
    for side in ('lq', 'gt'):
        assert stored(root / f'train_{side}.lmdb') == files(root / side)


def test_few_results_wait_in_memory() -> None:
    taken = 0
    furthest = 0

    def items() -> Iterator[int]:
        nonlocal furthest
        for number in range(200):
            furthest = max(furthest, number - taken)
            yield number

    for expected, result in enumerate(pair_files.in_order(lambda number: -number, items(), workers=3)):
        assert result == -expected
        taken = expected + 1
    assert taken == 200
    assert furthest <= 7


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('crop', [None, CropGrid(12, 6)])
def test_all_problems_are_listed_and_nothing_is_written(root: Path, crop: CropGrid | None) -> None:
    lq, gt = root / 'lq', root / 'gt'
    for name in ('truncated.png', 'flipped.png', 'ok.png'):
        save_pair(root, name, noise(20, 20), noise(20, 20))
    save_pair(root, 'cut.jpg', noise(20, 20), noise(20, 20))
    save_pair(root, 'differs.png', noise(20, 20), noise(20, 21))
    (lq / 'truncated.png').write_bytes((lq / 'truncated.png').read_bytes()[:-30])
    flipped = bytearray((gt / 'flipped.png').read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (gt / 'flipped.png').write_bytes(flipped)
    (gt / 'cut.jpg').write_bytes((gt / 'cut.jpg').read_bytes()[:-100])
    (lq / 'empty.png').write_bytes(b'')
    (gt / 'empty.png').symlink_to(root / 'nowhere')
    (lq / 'alone.png').write_bytes((lq / 'ok.png').read_bytes())
    save_pair(root, 'tiny.png', noise(20, 11), noise(20, 11))
    before = everything(root)
    with pytest.raises(UserError) as caught:
        create(root, root / 'deep/out', crop=crop)
    message, *problems = str(caught.value).split('\n  ')
    expected = {
        f'{lq}/truncated.png: is truncated',
        f'{gt}/flipped.png: is damaged',
        f'{gt}/cut.jpg: is truncated',
        f'{lq}/empty.png: is empty',
        f'{gt}/empty.png: cannot be read (No such file or directory)',
        f'{lq}/alone.png: has no partner in {gt}',
        f'{lq}/differs.png: is 20x20, but its partner {gt}/differs.png is 21x20',
    }
    if crop:
        expected.add(f'{lq}/tiny.png: is 11x20, smaller than crops of 12x12')
    assert len(problems) == len(expected)
    for start in expected:
        assert sum(problem.startswith(start) for problem in problems) == 1, start
    assert message.startswith(f'{len(expected)} problems with the images, so no LMDB was written; fix')
    assert everything(root) == before


def test_a_problem_of_the_last_split_keeps_the_first_from_being_written(root: Path) -> None:
    first = read_pairs(root, 'train')
    second = Split('test', read_pairs(root, 'test').pairs)
    shutil.copytree(root / 'lq', root / 'broken')
    (root / 'broken/3.png').write_bytes(b'junk')
    second = read_pairs(root, 'test', Path('broken'), Path('gt'))
    with pytest.raises(
        UserError, match=r'1 problem with the images.*\n.*broken/3.png: is neither PNG nor JPEG'
    ):
        create_lmdbs([first, second], root / 'out', 'pairs')
    assert not (root / 'out').exists()


def broken_stream(path: Path) -> None:
    """Give a PNG a compressed stream that ends early, with the right check sums around it."""
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))

    header = chunk(b'IHDR', struct.pack('>IIBBBBB', 24, 16, 8, 2, 0, 0, 0))
    data = chunk(b'IDAT', zlib.compress(bytes(40)))
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + header + data + chunk(b'IEND', b''))


@pytest.mark.parametrize('options', [{'verify': True}, {'crop': CropGrid(8, 8)}])
def test_what_only_decoding_shows_is_found(root: Path, options: dict[str, Any]) -> None:
    broken_stream(root / 'gt/0.png')
    with pytest.raises(UserError, match=rf'1 problem .*\n  {root}/gt/0.png: cannot be decoded'):
        create(root, root / 'out', **options)
    assert not (root / 'out').exists()


def test_verify_compares_the_bytes_with_the_files(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish = lmdb_writer._verify

    def change_then_verify(*arguments: Any) -> list[str]:
        assert cv2.imwrite(str(root / 'gt/2.png'), noise(18, 22, seed=7))
        return publish(*arguments)

    monkeypatch.setattr(lmdb_writer, '_verify', change_then_verify)
    with pytest.raises(UserError, match=r'gt/2.png: differs from what is stored of it in train_gt.lmdb'):
        create(root, root / 'out', verify=True)
    assert not (root / 'out').exists()


# --- existing LMDBs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'how', [{'raw': True}, {'crop': CropGrid(8, 8)}, {'crop': CropGrid(8, 8), 'raw': True}]
)
def test_verify_compares_pixels(how: dict[str, Any], root: Path) -> None:
    """One changed bit of a raw image or of a crop was not noticed (issue 15, item 19)."""
    create(root, root / 'out', verify=True, **how)
    folder = root / 'out' / 'train_lq.lmdb'
    key = min(stored(folder))
    size = (folder / 'data.mdb').stat().st_size
    with lmdb.open(str(folder), map_size=2**30) as environment, environment.begin(write=True) as transaction:
        pixels = decode(bytes(transaction.get(key.encode())))
        pixels[3, 4, 1] ^= 1
        value = raw_image(pixels) if how.get('raw') else cv2.imencode('.png', pixels)[1].tobytes()
        transaction.put(key.encode(), value)
    record = json.loads((folder / RECORD).read_text())
    record['data_bytes'] = (folder / 'data.mdb').stat().st_size
    assert record['data_bytes'] >= size
    (folder / RECORD).write_text(json.dumps(record))
    with pytest.raises(UserError, match='differs from what is stored'):
        create(root, root / 'out', verify=True, **how)


def test_jpegs_whose_data_end_early_are_refused(root: Path) -> None:
    """Decoders fill the missing rows with grey and say nothing."""
    if png_crop.library() is None:
        pytest.skip('libvips, which notices it, is not installed')
    path = root / 'lq' / '4.jpg'
    data = path.read_bytes()
    path.write_bytes(data[: 2 * len(data) // 3] + b'\xff\xd9')
    assert decode(path.read_bytes()).shape == (20, 30, 3)
    with pytest.raises(UserError, match=r'4\.jpg: is damaged: its image data end before its last row'):
        create(root, root / 'out')
    assert not (root / 'out').exists()


def test_special_files_do_not_hang(root: Path) -> None:
    (root / 'lq' / '0.png').unlink()
    os.mkfifo(root / 'lq' / '0.png')
    with pytest.raises(UserError, match=r'0\.png: is not an ordinary file'):
        create(root, root / 'out')


def test_decompression_bombs_are_refused_unread(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding 30000² pixels takes 5.8 GB."""
    for side in ('lq', 'gt'):
        (root / side / '0.png').write_bytes(png_of_size(30_000))
    monkeypatch.setattr(cv2, 'imdecode', lambda *_: pytest.fail('an image was decoded'))
    splits = [Split('train', [Pair('0', root / 'lq' / '0.png', root / 'gt' / '0.png')])]
    with pytest.raises(UserError, match='30000x30000 pixels'):
        create_lmdbs(splits, root / 'out', 'pairs', raw=True)


def test_a_finished_lmdb_is_kept(root: Path, said: list[str]) -> None:
    create(root, root / 'out')
    before = {path: path.stat().st_mtime_ns for path in everything(root / 'out')}
    create(root, root / 'out', verify=True, say=said.append)
    assert {path: path.stat().st_mtime_ns for path in everything(root / 'out')} == before
    assert said[0].startswith(f'kept {root}/out/train_lq.lmdb, complete already: 5 images')
    assert len(said) == 3


def test_an_lmdb_of_other_files_is_replaced_only_by_force(root: Path) -> None:
    create(root, root / 'out')
    before = stored(root / 'out/train_lq.lmdb')
    save_pair(root, '5.png', noise(9, 9), noise(9, 9))
    with pytest.raises(UserError, match=r'out already holds train_lq.lmdb, train_gt.lmdb, made .*--force'):
        create(root, root / 'out')
    with pytest.raises(UserError, match='--force'):
        create(root, root / 'out', crop=CropGrid(8, 8))
    assert stored(root / 'out/train_lq.lmdb') == before
    create(root, root / 'out', force=True)
    for side in ('lq', 'gt'):
        assert stored(root / f'out/train_{side}.lmdb') == files(root / side)
    assert len(list((root / 'out').iterdir())) == 2


@pytest.mark.parametrize('damage', ['record', 'meta_info.txt', 'data.mdb', 'shorter'])
def test_what_is_not_whole_does_not_pass_for_finished(root: Path, damage: str) -> None:
    create(root, root / 'out')
    broken = root / 'out/train_gt.lmdb'
    if damage == 'shorter':
        os.truncate(broken / 'data.mdb', 8192)
    else:
        (broken / (RECORD if damage == 'record' else damage)).unlink()
    with pytest.raises(
        UserError, match=r'holds train_gt.lmdb, made from other files or otherwise, or not whole'
    ):
        create(root, root / 'out')
    create(root, root / 'out', force=True)
    assert stored(broken) == files(root / 'gt')


def test_a_missing_side_is_made_again(root: Path, said: list[str]) -> None:
    create(root, root / 'out')
    shutil.rmtree(root / 'out/train_lq.lmdb')
    create(root, root / 'out', say=said.append)
    assert [line.split()[0] for line in said] == ['wrote', 'kept']
    assert stored(root / 'out/train_lq.lmdb') == files(root / 'lq')


def test_verify_finds_damage_in_a_finished_lmdb(root: Path) -> None:
    create(root, root / 'out')
    data = root / 'out/train_lq.lmdb/data.mdb'
    image = (root / 'lq/1.png').read_bytes()
    content = data.read_bytes()
    assert content.count(image) == 1
    data.write_bytes(content.replace(image, image[:60] + bytes(40) + image[100:]))
    create(root, root / 'out')
    with pytest.raises(UserError, match=r'LMDBs in .*out are damaged; run again with --force.*\n.*lq/1.png'):
        create(root, root / 'out', verify=True)


def test_two_runs_at_once_are_refused(root: Path) -> None:
    (root / 'out' / PARTIAL).mkdir(parents=True)
    handle = os.open(root / 'out' / PARTIAL, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(UserError, match=r'another run is writing to .*out; wait'):
        create(root, root / 'out')
    assert (root / 'out' / PARTIAL).is_dir()
    os.close(handle)
    create(root, root / 'out')
    assert not (root / 'out' / PARTIAL).exists()


# --- interruptions ------------------------------------------------------------------------------------------


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked process; return its wait status."""
    child = os.fork()
    if child == 0:
        status = 3
        try:
            signal.alarm(60)
            work()
            status = 0
        except UserError as error:
            os.write(2, f'{error}\n'.encode())
            status = 2
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


RENAMES = ((os, 'rename'), (shutil, 'rmtree'))
CHANGES = (
    *RENAMES,
    (os, 'fsync'),
    (os, 'mkdir'),
    (lmdb, 'open'),
    (lmdb_writer._LmdbFile, '_commit'),
    (lmdb_writer._LmdbFile, '__exit__'),
)


def kill_at(step: int, changes: tuple[tuple[Any, str], ...]) -> None:
    """Make this process kill itself (SIGKILL) before its `step`-th change of what is on the disk."""
    steps = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for module, name in changes:
        setattr(module, name, counted(getattr(module, name)))


def test_killed_at_any_step(root: Path, said: list[str]) -> None:
    kills = 0
    while True:
        kills += 1
        out = root / f'out{kills}'

        def killed(out: Path = out, step: int = kills) -> None:
            kill_at(step, CHANGES)
            create(root, out)

        status = in_child(killed)
        finished = sorted(path.name for path in out.glob('*')) if out.exists() else []
        assert set(finished) <= {PARTIAL, 'train_lq.lmdb', 'train_gt.lmdb'}
        assert not list((out / PARTIAL).rglob('*.lmdb'))  # BasicSR reads only what is called so
        for side in ('lq', 'gt'):
            if f'train_{side}.lmdb' in finished:
                assert stored(out / f'train_{side}.lmdb') == files(root / side)
        create(root, out, say=said.append)
        assert sorted(path.name for path in out.iterdir()) == ['train_gt.lmdb', 'train_lq.lmdb']
        for side in ('lq', 'gt'):
            assert stored(out / f'train_{side}.lmdb') == files(root / side)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert kills > 20
    assert any(line.startswith('removed what an interrupted run left') for line in said)
    assert any(line.startswith('took over train_lq.lmdb') for line in said)


def test_killed_while_replacing_by_force(root: Path) -> None:
    """Between the old LMDB's leaving and the new one's coming there may be none, but never a broken one."""
    kills = 0
    while True:
        kills += 1
        out = root / f'out{kills}'
        create(root, out, crop=CropGrid(8, 8))
        old = {side: stored(out / f'train_{side}.lmdb') for side in ('lq', 'gt')}

        def killed(out: Path = out, step: int = kills) -> None:
            kill_at(step, RENAMES)
            create(root, out, force=True)

        status = in_child(killed)
        for side in ('lq', 'gt'):
            path = out / f'train_{side}.lmdb'
            assert not path.exists() or stored(path) in (old[side], files(root / side))
        create(root, out, force=True)
        assert stored(out / 'train_lq.lmdb') == files(root / 'lq')
        assert len(list(out.iterdir())) == 2
        if status == 0:
            break
    assert kills > 8


def test_an_interrupt_keeps_finished_splits_for_the_next_run(
    root: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = [read_pairs(root, 'first'), read_pairs(root, 'second')]
    put = lmdb_writer._LmdbFile.put

    def interrupted(file: lmdb_writer._LmdbFile, image: Any) -> None:
        if 'second' in file._folder.name:
            raise KeyboardInterrupt
        put(file, image)

    monkeypatch.setattr(lmdb_writer._LmdbFile, 'put', interrupted)
    with pytest.raises(KeyboardInterrupt):
        create_lmdbs(splits, root / 'out', 'pairs')
    assert [path.name for path in (root / 'out').iterdir()] == [PARTIAL]
    inode = (root / 'out' / PARTIAL / 'first_lq/data.mdb').stat().st_ino
    monkeypatch.undo()
    create_lmdbs(splits, root / 'out', 'pairs', say=said.append)
    assert 'took over first_lq.lmdb, which an interrupted run had finished' in said
    assert (root / 'out/first_lq.lmdb/data.mdb').stat().st_ino == inode
    for name in ('first', 'second'):
        assert stored(root / f'out/{name}_gt.lmdb') == files(root / 'gt')


def test_what_was_finished_from_other_files_is_not_taken_over(
    root: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lmdb_writer, '_publish', interrupted)
    with pytest.raises(KeyboardInterrupt):
        create(root, root / 'out')
    monkeypatch.undo()
    save_pair(root, '2.png', noise(40, 40), noise(40, 40))
    create(root, root / 'out', say=said.append)
    assert not any(line.startswith('took over') for line in said)
    assert stored(root / 'out/train_lq.lmdb') == files(root / 'lq')


# --- the disk -----------------------------------------------------------------------------------------------


def test_too_little_space_is_reported_before_writing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(root)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage._replace(free=1000))
    with pytest.raises(
        UserError, match=r'the LMDBs need 0.0 MB, but the disk of .*out has 0.0 MB free; free'
    ):
        create(root, root / 'out')
    assert not (root / 'out').exists()


def test_a_write_that_fails_is_reported_in_one_sentence_and_leaves_nothing(
    root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The kernel refuses to let any file grow beyond 20 kB."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        create(root, root / 'out')

    for number in range(20):
        save_pair(root, f'more{number}.png', noise(32, 32), noise(32, 32))
    assert os.waitstatus_to_exitcode(in_child(limited)) == 2
    sentence = capfd.readouterr().err.splitlines()[-1]
    assert sentence.startswith(f'cannot write to {root}/out (')
    assert sentence.endswith('so no LMDB was written; give another folder')
    assert not (root / 'out').exists()


CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
CANNOT_MOUNT = 77


def mount_small_disk(folder: Path, size: str) -> None:
    """Put a small file system at `folder` for this process only; exit where that is forbidden."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0:
        os._exit(CANNOT_MOUNT)
    Path('/proc/self/setgroups').write_text('deny')
    Path('/proc/self/uid_map').write_text(f'0 {user} 1')
    Path('/proc/self/gid_map').write_text(f'0 {group} 1')
    if libc.mount(b'tmpfs', bytes(folder), b'tmpfs', 0, f'size={size}'.encode()) != 0:
        os._exit(CANNOT_MOUNT)


@pytest.mark.parametrize('mebibytes', range(1, 4))
def test_a_full_disk_is_reported_in_one_sentence_and_leaves_nothing(
    root: Path, capfd: pytest.CaptureFixture[str], mebibytes: int
) -> None:
    """The space needed for crops is known only when they are encoded."""
    disk = root / 'disk'
    disk.mkdir()

    def on_a_small_disk() -> None:
        mount_small_disk(disk, f'{mebibytes}m')
        try:
            create(root, disk / 'out', crop=CropGrid(160, 160))
        finally:
            assert not everything(disk)

    for number in range(30):
        save_pair(root, f'{number}.png', noise(160, 160, seed=number), noise(160, 160, seed=-number % 97))
    (root / 'lq/4.jpg').unlink()
    (root / 'gt/4.jpg').unlink()
    status = os.waitstatus_to_exitcode(in_child(on_a_small_disk))
    if status == CANNOT_MOUNT:
        pytest.skip('this user may not mount a small file system')
    assert status == 2
    sentence = capfd.readouterr().err.splitlines()[-1]
    assert sentence == (
        f'the disk of {disk}/out is full, so no LMDB was written; free some space or give another folder'
    )
