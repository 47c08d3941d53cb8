"""The command: deterministic, parallel, and continued after `kill -9`."""

from __future__ import annotations

import json
import os
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

from dsgformer_arch.data.prepare.blur.synthesis import PARTIAL
from tests.tools import scripts
from tests.trees import ROOT, random_image

SCRIPT = scripts.TOOLS / 'synthesize_blur.py'
run = partial(scripts.run, 'synthesize_blur')


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / 'photographs'
    folder.mkdir()
    for number in range(3):
        assert cv2.imwrite(str(folder / f'{number}.png'), random_image(number, 160, 200))
    return folder


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    folder = tmp_path / 'video' / 'run'
    folder.mkdir(parents=True)
    scene = random_image(5, 64, 200)
    for number in range(20):
        assert cv2.imwrite(str(folder / f'{number:03d}.png'), scene[:, 4 * number : 4 * number + 96])
    return folder.parent


def pairs(folder: Path) -> dict[str, bytes]:
    """All images of a data set in folders."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*.png'))}


def test_lmdbs_are_what_basicsr_reads(photographs: Path, tmp_path: Path) -> None:
    out = tmp_path / 'out'
    assert run('shake', photographs, '--out', out, '--count', 4, '--workers', 2, '--seed', 1) == 0
    options: dict[str, Any] = {'io_backend': {'type': 'lmdb'}, 'scale': 1, 'phase': 'val'}
    options |= {f'dataroot_{side}': str(out / f'train_{side}.lmdb') for side in ('lq', 'gt')}
    data = PairedImageDataset(options)
    assert [item['lq_path'] for item in data] == [f'shake_{n:06d}' for n in range(4)]
    for item in data:
        assert item['lq'].shape == item['gt'].shape
    told = json.loads((out / 'train_blur.json').read_text('utf-8'))
    assert [told['made_from'][f'shake_{n:06d}']['image'] for n in range(4)] == ['0', '1', '2', '0']
    assert told['settings']['seed'] == 1
    names = sorted(path.name for path in out.iterdir())
    assert names == ['train_blur.json', 'train_gt.lmdb', 'train_lq.lmdb']


@pytest.mark.parametrize('kind', ['shake', 'objects', 'video'])
def test_a_seed_gives_the_same_pixels_with_any_number_of_processes(
    kind: str, photographs: Path, frames: Path, tmp_path: Path
) -> None:
    source = frames if kind == 'video' else photographs
    common = (kind, source, '--folders', '--name', 'x')
    for name, seed, workers in (('a', 1, 1), ('b', 1, 2), ('c', 2, 1)):
        assert run(*common, '--out', tmp_path / name, '--seed', seed, '--workers', workers) == 0
    a, b, c = (pairs(tmp_path / name / 'x') for name in 'abc')
    assert len(a) >= 4
    assert a == b
    assert a != c
    assert {Path(name).parts[0] for name in a} == {'blur', 'sharp'}


def test_strength_switches_and_settings_arrive(photographs: Path, tmp_path: Path) -> None:
    common = ('shake', photographs, '--folders', '--workers', 1, '--count', 2)
    assert run(*common, '--plain', '--none', 1, '--out', tmp_path / 'none') == 0
    images = pairs(tmp_path / 'none' / 'train')
    for name, data in images.items():
        assert data == images[name.replace('blur', 'sharp')]
    (tmp_path / 'set.yml').write_text('reduction: {least: 1}\nstrength: {none: 0, length: [2, 3]}\n', 'utf-8')
    more = ('--settings', tmp_path / 'set.yml', '--length', 8, 9, '--crop', 48, '--jpeg', 1)
    assert run(*common, *more, '--out', tmp_path / 'set') == 0
    told = json.loads((tmp_path / 'set' / 'train_blur.json').read_text('utf-8'))
    assert all(8 <= pair['length'] <= 9 for pair in told['made_from'].values())
    assert told['settings']['source']['strength']['none'] == 0
    assert told['settings']['source']['reduction']['least'] == 1
    for path in (tmp_path / 'set' / 'train').rglob('*.png'):
        assert cv2.imread(str(path)).shape == (48, 48, 3)


def test_video_gives_the_frame_in_the_middle(frames: Path, tmp_path: Path) -> None:
    assert run('video', frames, '--out', tmp_path / 'o', '--folders', '--frames', 5, 5, '--plain') == 0
    found = sorted((tmp_path / 'o' / 'train' / 'sharp').iterdir())
    assert [path.name for path in found] == [f'run-{first:06d}-05.png' for first in (0, 5, 10, 15)]
    for number, path in enumerate(found):
        middle = cv2.imread(str(frames / 'run' / f'{5 * number + 2:03d}.png'))
        np.testing.assert_array_equal(cv2.imread(str(path)), middle)


def test_twice_is_once_and_another_set_needs_force(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for form in ((), ('--folders',)):
        out = tmp_path / f'out{len(form)}'
        command = ('shake', photographs, '--out', out, '--count', 2, '--workers', 1, *form)
        assert run(*command) == 0
        capsys.readouterr()
        assert run(*command) == 0
        assert 'complete already' in capsys.readouterr().out
        assert run(*command, '--seed', 9) == 2
        assert '--force to replace it' in capsys.readouterr().err
        assert sorted(path.name for path in out.iterdir() if path.name.startswith('.')) == []
        assert run(*command, '--seed', 9, '--force') == 0
        assert json.loads((out / 'train_blur.json').read_text('utf-8'))['settings']['seed'] == 9


@pytest.mark.parametrize(
    ('arguments', 'sentence'),
    [
        (['shake', 'nowhere', '--out', 'o'], 'nowhere is not a folder'),
        (['video', 'nowhere', '--out', 'o'], 'nowhere does not exist'),
        (
            ['shake', 'PHOTOS', '--out', 'o', '--none', '3'],
            'strength: none is 3.0, but should be',
        ),
        (['shake', 'PHOTOS', '--out', 'o', '--jpeg', '-1'], 'realism: jpeg is -1.0'),
        (['shake', 'PHOTOS', '--out', 'o', '--frames', '3', '5'], "unknown key 'frames'"),
        (['video', 'FRAMES', '--out', 'o', '--none', '0.5'], "unknown key 'strength'"),
        (['video', 'FRAMES', '--out', 'o', '--crop', '32'], '--crop is for photographs'),
        (['shake', 'PHOTOS', '--out', 'o', '--crop', '500'], 'smaller than crops of 500'),
        (['shake', 'PHOTOS', '--out', 'o', '--name', '../x'], "--name '../x' cannot name a data set"),
        (['shake', 'PHOTOS', '--out', 'o', '--response', 'x'], "'x' is not a camera response"),
        (['shake', 'PHOTOS', '--out', 'o', '--settings', 'no.yml'], 'cannot read the settings no.yml'),
        (['shake', 'PHOTOS', '--out', 'o', '--count', '0'], "'0' is not a whole number of at least 1"),
        (['shake', 'PHOTOS', '--out', 'PHOTOS/0.png'], 'cannot write to'),
    ],
)
def test_mistakes_are_reported_in_one_line(
    photographs: Path,
    frames: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    places = [a.replace('PHOTOS', str(photographs)).replace('FRAMES', str(frames)) for a in arguments]
    assert run(*places, '--workers', 1) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert 'error: ' in last
    assert sentence in last
    assert not list(tmp_path.rglob('*.lmdb'))


@pytest.mark.long
@pytest.mark.parametrize('form', ['lmdb', 'folders'])
def test_kill_9_and_again(form: str, photographs: Path, tmp_path: Path) -> None:
    """A real process, killed while it works, leaves no data set; the same command completes the same one."""
    arguments = ['shake', str(photographs), '--count', '24', '--seed', '3', '--name', 'x']
    arguments += ['--folders'] if form == 'folders' else []
    out, whole = tmp_path / 'killed', tmp_path / 'whole'
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, str(SCRIPT), *arguments, '--out', str(out), '--workers', '2']
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    info = out / PARTIAL / 'info'
    while not info.is_dir() or len(list(info.iterdir())) < 3:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = {path.name: path.stat().st_mtime_ns for path in info.iterdir() if path.suffix == '.json'}
    assert 3 <= len(done) < 24, 'the process was not killed in the middle'
    assert [path.name for path in out.iterdir()] == [PARTIAL]
    images = {path.name: path.stat().st_mtime_ns for path in (out / PARTIAL / 'pairs' / 'blur').glob('*.png')}

    assert run(*arguments, '--out', out, '--workers', 1) == 0
    assert run(*arguments, '--out', whole, '--workers', 1) == 0
    assert not (out / PARTIAL).exists()
    if form == 'folders':
        assert pairs(out / 'x') == pairs(whole / 'x')
        kept = {path.name: path.stat().st_mtime_ns for path in (out / 'x' / 'blur').iterdir()}
        for name in done:
            image = name.replace('.json', '.png')
            assert kept[image] == images[image], 'a finished pair was made again'
        assert set(kept) == {f'shake_{n:06d}.png' for n in range(24)}
    else:
        for side in ('lq', 'gt'):
            a, b = ((folder / f'x_{side}.lmdb' / 'data.mdb').read_bytes() for folder in (out, whole))
            assert a == b
    told = [json.loads((folder / 'x_blur.json').read_text('utf-8')) for folder in (out, whole)]
    assert told[0] == told[1]
