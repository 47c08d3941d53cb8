from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from basicsr.data.paired_image_dataset import PairedImageDataset

from dsgformer_arch.data.prepare.lmdb_writer import PARTIAL
from tests.tools import scripts

CHECKOUT = Path(__file__).resolve().parents[2]
SCRIPT = scripts.TOOLS / 'create_lmdb.py'
run = partial(scripts.run, 'create_lmdb')
GOPRO_PAIR = CHECKOUT / '..' / 'shared' / 'data' / 'gopro_pair'


def save(path: Path, height: int = 40, width: int = 48, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert cv2.imwrite(str(path), image)


@pytest.fixture
def gopro(tmp_path: Path) -> Path:
    root = tmp_path / 'GOPRO_Large'
    for number, folder in enumerate(('train/GOPR0372_07_00', 'train/GOPR0374_11_01', 'test/GOPR0384_11_00')):
        for kind in ('blur', 'blur_gamma', 'sharp'):
            save(root / folder / kind / '000001.png', seed=10 * number + len(kind))
    return root


def data_set(folder: Path, split: str) -> PairedImageDataset:
    options: dict[str, Any] = {'io_backend': {'type': 'lmdb'}, 'scale': 1, 'phase': 'val'}
    options |= {f'dataroot_{side}': str(folder / f'{split}_{side}.lmdb') for side in ('lq', 'gt')}
    return PairedImageDataset(options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


ALL_OF_GOPRO = ['test_gt.lmdb', 'test_lq.lmdb', 'train_gt.lmdb', 'train_lq.lmdb']


def test_a_preset_becomes_the_lmdbs_that_the_options_read(gopro: Path, tmp_path: Path) -> None:
    assert run('gopro', gopro, tmp_path / 'datasets/gopro', '--verify', '--workers', 2) == 0
    assert names(tmp_path / 'datasets/gopro') == ALL_OF_GOPRO
    assert [item['lq_path'] for item in data_set(tmp_path / 'datasets/gopro', 'train')] == [
        'GOPR0372_07_00-000001',
        'GOPR0374_11_01-000001',
    ]


def test_the_gamma_blur_is_another_preset(gopro: Path, tmp_path: Path) -> None:
    for preset in ('gopro', 'gopro_gamma'):
        assert run(preset, gopro, tmp_path / preset, '--split', 'test') == 0
        assert names(tmp_path / preset) == ['test_gt.lmdb', 'test_lq.lmdb']
    linear, gamma = (data_set(tmp_path / preset, 'test')[0] for preset in ('gopro', 'gopro_gamma'))
    assert not linear['lq'].equal(gamma['lq'])
    assert linear['gt'].equal(gamma['gt'])


def test_crops(gopro: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run('gopro', gopro, tmp_path / 'out', '--split', 'train', '--crop', 32, '--step', 16) == 0
    crops = data_set(tmp_path / 'out', 'train')
    assert len(crops) == 2 * 2 * 2  # tops 0 and 8, lefts 0 and 16, of two images
    assert {tuple(item['gt'].shape) for item in crops} == {(3, 32, 32)}
    assert run('gopro', gopro, tmp_path / 'large', '--crop', 41) == 2
    error = capsys.readouterr().err
    assert '3 problems with the images' in error
    assert error.count('is 48x40, smaller than crops of 41x41') == 3
    assert not (tmp_path / 'large').exists()


def test_pairs(tmp_path: Path) -> None:
    save(tmp_path / 'a/x.png')
    save(tmp_path / 'b/x.png')
    assert run('pairs', tmp_path, tmp_path / 'out', '--lq', 'a', '--gt', 'b', '--split', 'mine') == 0
    assert names(tmp_path / 'out') == ['mine_gt.lmdb', 'mine_lq.lmdb']


def test_twice_is_once_and_other_files_need_force(
    gopro: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run('gopro', gopro, tmp_path / 'out') == 0
    assert run('gopro', gopro, tmp_path / 'out') == 0
    assert capsys.readouterr().out.count('complete already') == 4
    assert run('gopro_gamma', gopro, tmp_path / 'out') == 2
    assert '--force to replace' in capsys.readouterr().err
    assert run('gopro_gamma', gopro, tmp_path / 'out', '--force') == 0


@pytest.mark.parametrize(
    ('arguments', 'sentence'),
    [
        (['gopo', 'ROOT', 'OUT'], "invalid choice: 'gopo'"),
        (['gopro', 'ROOT/nowhere', 'OUT'], 'nowhere is not a folder'),
        (['rsblur', 'ROOT', 'OUT'], 'of rsblur; expected below it: RSBlur/<day>/<scene>'),
        (['realblur_j', 'ROOT', 'OUT'], 'of realblur_j; expected below it: RealBlur-J'),
        (
            ['gopro', 'ROOT', 'OUT', '--split', '../test'],
            "gopro has no split '../test'; choose from train, test",
        ),
        (['gopro', 'ROOT', 'OUT', '--step', '4'], '--step says how far crops are apart; give --crop too'),
        (['gopro', 'ROOT', 'OUT', '--crop', '-8'], "'-8' is not a whole number of at least 1"),
        (['gopro', 'ROOT', 'OUT', '--workers', '0'], "'0' is not a whole number of at least 1"),
        (['gopro', 'ROOT', 'OUT', '--lq', 'blur'], '--lq and --gt belong to the preset pairs'),
        (['pairs', 'ROOT', 'OUT', '--split', 'a', 'b'], 'pairs makes one split'),
        (['pairs', 'ROOT', 'OUT', '--split', '../../a'], "'../../a' cannot name a split"),
        (['gopro', 'ROOT', 'ROOT/train/GOPR0372_07_00/sharp/000001.png'], 'cannot write to'),
    ],
)
def test_mistakes_are_reported_in_one_line(
    gopro: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    before = set(tmp_path.rglob('*'))
    places = [a.replace('ROOT', str(gopro)).replace('OUT', str(tmp_path / 'out')) for a in arguments]
    assert run(*places) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert 'error: ' in last
    assert sentence in last
    assert set(tmp_path.rglob('*')) == before


def started(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), *(str(argument) for argument in arguments)]
    environment = {**os.environ, 'PYTHONPATH': str(CHECKOUT), 'OMP_NUM_THREADS': '1'}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def test_kill_9_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A real process, killed while it writes, leaves no LMDB; the same command then completes the work."""
    for number in range(4):
        for side in ('input', 'target'):
            save(tmp_path / 'root' / side / f'{number}.png', 512, 512, seed=number)
    out = tmp_path / 'out'
    command = ('pairs', tmp_path / 'root', out, '--crop', 64, '--step', 16, '--workers', 1)
    process = started(*command)
    growing = out / PARTIAL / 'train_gt' / 'data.mdb'
    while not growing.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    assert names(out) == [PARTIAL]
    assert not list(out.rglob('*.lmdb'))
    assert not list(out.rglob('meta_info.txt'))

    assert run(*command) == 0
    assert capsys.readouterr().out.startswith('removed what an interrupted run left unfinished')
    assert names(out) == ['train_gt.lmdb', 'train_lq.lmdb']
    assert len(data_set(out, 'train')) == 4 * 29 * 29


def test_a_real_gopro_pair_has_its_known_psnr(tmp_path: Path) -> None:
    if not GOPRO_PAIR.is_dir():
        pytest.skip(f'the real GoPro pair is not at {GOPRO_PAIR}')
    for kind in ('blur', 'sharp'):
        target = tmp_path / 'GOPRO_Large/test/GOPR0000_00_00' / kind
        shutil.copytree(GOPRO_PAIR / kind, target)
    assert run('gopro', tmp_path / 'GOPRO_Large', tmp_path / 'out', '--verify') == 0
    (item,) = data_set(tmp_path / 'out', 'test')
    assert item['lq_path'] == 'GOPR0000_00_00-istanbul'
    lq, gt = (np.round(item[side].numpy().astype(np.float64) * 255) for side in ('lq', 'gt'))
    psnr = 10 * np.log10(255**2 / np.mean((lq - gt) ** 2))
    assert psnr == pytest.approx(24.05, abs=0.005)
