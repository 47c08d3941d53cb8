"""The sample set: what it holds, that a seed settles it, and that it is there whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import os
import runpy
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from basicsr.data import build_dataset
from basicsr.metrics import calculate_psnr
from basicsr.utils import tensor2img

from dsgformer_arch.data.prepare import sample_set
from dsgformer_arch.data.prepare.sample_set import create_sample_set, photograph, take
from dsgformer_arch.utils.errors import UserError
from tests.trees import ROOT, write_pairs

LMDBS = ['test_gt.lmdb', 'test_lq.lmdb', 'train_gt.lmdb', 'train_lq.lmdb']
WHOLE = sorted([*LMDBS, 'sample_set.json'])


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One photograph of each kind is enough here."""
    monkeypatch.setattr(sample_set, 'TRAINING_PHOTOGRAPHS', ('chelsea',))
    monkeypatch.setattr(sample_set, 'HELD_OUT_PHOTOGRAPHS', ('coffee',))
    monkeypatch.setattr(sample_set, 'TRAINING_TAKES', 2)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def dataset(folder: Path, split: str) -> Any:
    """BasicSR's own reader, with which training and testing read the set."""
    options: dict[str, Any] = {
        'name': 'sample',
        'type': 'PairedImageDataset',
        'dataroot_lq': str(folder / f'{split}_lq.lmdb'),
        'dataroot_gt': str(folder / f'{split}_gt.lmdb'),
        'io_backend': {'type': 'lmdb'},
        'phase': 'test',
        'scale': 1,
    }
    return build_dataset(options)


def digest(folder: Path) -> str:
    """Of all pixels that the set holds."""
    pixels = hashlib.sha256()
    for split in ('train', 'test'):
        for pair in dataset(folder, split):
            for side in ('lq', 'gt'):
                pixels.update(f'{pair["lq_path"]} {side}'.encode() + tensor2img([pair[side]]).tobytes())
    return pixels.hexdigest()


def test_basicsr_reads_crops_to_train_with_and_whole_photographs_to_test(tmp_path: Path) -> None:
    create_sample_set(tmp_path / 'new' / 'sample')
    assert names(tmp_path / 'new' / 'sample') == WHOLE
    train = list(dataset(tmp_path / 'new' / 'sample', 'train'))
    assert {pair['lq_path'].rpartition('_s')[0] for pair in train} == {'chelsea_00', 'chelsea_01'}
    assert {tuple(pair[side].shape) for pair in train for side in ('lq', 'gt')} == {(3, 128, 128)}
    (held_out,) = dataset(tmp_path / 'new' / 'sample', 'test')
    assert held_out['lq_path'] == 'coffee'
    blurred, sharp = (tensor2img([held_out[side]], rgb2bgr=False) for side in ('lq', 'gt'))
    np.testing.assert_array_equal(np.stack([blurred, sharp]), np.stack(take('coffee', 0, 0)))


def test_crops_lie_on_each_other_in_the_photograph(tmp_path: Path) -> None:
    create_sample_set(tmp_path)
    pairs = {pair['lq_path']: pair for pair in dataset(tmp_path, 'train')}
    _, sharp = take('chelsea', 1, 0)
    blurred, _ = take('chelsea', 1, 0)
    step = sample_set.CROPS.step
    second = pairs['chelsea_01_s002']
    np.testing.assert_array_equal(tensor2img([second['gt']], False), sharp[:128, step : step + 128])
    np.testing.assert_array_equal(tensor2img([second['lq']], False), blurred[:128, step : step + 128])


def test_a_seed_settles_every_pixel(tmp_path: Path) -> None:
    create_sample_set(tmp_path / 'a', seed=3)
    create_sample_set(tmp_path / 'b', seed=3)
    assert digest(tmp_path / 'a') == digest(tmp_path / 'b')
    assert not np.array_equal(take('chelsea', 0, 3)[0], take('chelsea', 0, 4)[0])
    assert not np.array_equal(take('chelsea', 0, 3)[0], take('chelsea', 1, 3)[0])


def test_held_out_photographs_are_others_and_really_blurred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the published set
    scenes = [
        {name.split('_')[0] for name in group}
        for group in (sample_set.TRAINING_PHOTOGRAPHS, sample_set.HELD_OUT_PHOTOGRAPHS)
    ]
    assert not scenes[0] & scenes[1]
    for name in sample_set.TRAINING_PHOTOGRAPHS + sample_set.HELD_OUT_PHOTOGRAPHS:
        assert min(photograph(name).shape[:2]) >= 300
    psnr = [calculate_psnr(*take(name, 0, 0), crop_border=0) for name in sample_set.HELD_OUT_PHOTOGRAPHS]
    assert 22 < np.mean(psnr) < 28


def test_a_complete_set_is_kept_and_another_seed_replaces_it(tmp_path: Path) -> None:
    said: list[str] = []
    create_sample_set(tmp_path)
    first = {name: (tmp_path / name / 'data.mdb').stat().st_mtime_ns for name in LMDBS}
    create_sample_set(tmp_path, say=said.append)
    assert said == [f'kept {tmp_path}, complete already']
    assert {name: (tmp_path / name / 'data.mdb').stat().st_mtime_ns for name in LMDBS} == first
    before = digest(tmp_path)
    create_sample_set(tmp_path, seed=1)
    assert names(tmp_path) == WHOLE
    assert digest(tmp_path) != before


def test_a_damaged_set_is_made_again(tmp_path: Path) -> None:
    create_sample_set(tmp_path)
    before = digest(tmp_path)
    with open(tmp_path / 'train_gt.lmdb' / 'data.mdb', 'r+b') as file:
        file.truncate(1000)
    create_sample_set(tmp_path)
    assert digest(tmp_path) == before


@pytest.mark.parametrize(('moment', 'call'), [('_png', 2), ('create_lmdbs', 1), ('_data_bytes', 1)])
def test_a_killed_run_leaves_nothing_that_passes_for_the_set(tmp_path: Path, moment: str, call: int) -> None:
    """Killed at its second image, before the LMDBs, and between them and the record."""
    killed = tmp_path / 'killed'
    killed.mkdir()
    child = os.fork()
    if child == 0:
        create_until_killed(killed, moment, call)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert sample_set.PARTIAL in names(killed)
    assert not sample_set.is_complete(killed, 0)
    create_sample_set(killed)
    assert names(killed) == WHOLE
    create_sample_set(tmp_path / 'undisturbed')
    assert digest(killed) == digest(tmp_path / 'undisturbed')


def create_until_killed(out: Path, moment: str, call: int) -> None:
    """Make the set in `out`, until the given call of a function of the module kills the process."""
    calls = itertools.count(1)
    function = getattr(sample_set, moment)

    def deadly(*arguments: Any, **settings: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **settings)

    setattr(sample_set, moment, deadly)
    try:
        create_sample_set(out)
    finally:
        os._exit(1)


def test_an_interrupt_leaves_the_folder_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sample_set, 'create_lmdbs', interrupt)
    with pytest.raises(KeyboardInterrupt):
        create_sample_set(tmp_path)
    assert names(tmp_path) == []


def test_other_lmdbs_are_not_replaced(tmp_path: Path) -> None:
    write_pairs(tmp_path, 'train', 1)
    before = (tmp_path / 'train_gt.lmdb' / 'data.mdb').read_bytes()
    with pytest.raises(UserError, match=r'train_lq\.lmdb exists and is not part'):
        create_sample_set(tmp_path)
    assert names(tmp_path) == ['train_gt.lmdb', 'train_lq.lmdb']
    assert (tmp_path / 'train_gt.lmdb' / 'data.mdb').read_bytes() == before


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path) -> None:
    handle = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(UserError, match='another run is writing'):
            create_sample_set(tmp_path)
    finally:
        os.close(handle)


def test_a_full_disk_is_reported_in_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(Path, 'write_bytes', full)
    with pytest.raises(UserError, match=r'No space left on device\); free some space'):
        create_sample_set(tmp_path)
    assert names(tmp_path) == []


def test_a_file_in_place_of_the_folder_is_reported_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match=r'cannot write the sample set to .*file'):
        create_sample_set(tmp_path / 'file')


def test_missing_photographs_are_reported_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r'nobody\.png'):
        photograph('nobody')
    monkeypatch.setattr(sample_set, 'find_spec', lambda _: None)
    with pytest.raises(UserError, match='pip install scikit-image'):
        create_sample_set(tmp_path)
    assert names(tmp_path) == []


def test_the_tool_refuses_a_bad_seed_with_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr('sys.argv', ['create_sample_set.py', str(tmp_path / 'set'), '--seed', '-1'])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / 'tools' / 'create_sample_set.py'), run_name='__main__')
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        'error: the seed -1 is out of range; give a whole number from 0 to 4294967295\n'
    )
    assert not (tmp_path / 'set').exists()
