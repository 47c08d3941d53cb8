"""What a run writes about itself, and what `basicsr status` makes of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import cv2
import pytest
from filelock import FileLock

from dsgformer_arch.cli import basicsr
from dsgformer_arch.models import history
from tests.trees import tiny_options, write_project


def iteration(number: int, **changes: Any) -> dict[str, Any]:
    entry = {'iteration': number, 'total': 10, 'losses': {'l_pixel': 0.5 / number}, 'lr': 1e-3, 'skipped': 0}
    entry |= {'images_per_second': 20.0, 'data_wait': 0.012, 'memory_gb': 1.5, 'seconds_left': 75.0}
    return entry | changes


def validation(number: int, value: float | None = 30.0) -> dict[str, Any]:
    best = {'psnr': {'val': 30.5, 'iter': 2, 'better': 'higher'}}
    return {'iteration': number, 'dataset': 'sample', 'metrics': {'psnr': value}, 'best': best}


def test_a_resumed_run_drops_what_it_does_again(tmp_path: Path) -> None:
    first = history.History(str(tmp_path))
    for number in (1, 2, 3):
        first.add(iteration(number))
        first.add(validation(number))
    with open(tmp_path / history.FILE, 'a') as file:
        file.write('{"iteration": 4, "los')  # killed while it wrote
    history.History(str(tmp_path), start=2)
    found = [(entry['iteration'], 'metrics' in entry) for entry in history.read(str(tmp_path))]
    assert found == [(1, False), (1, True), (2, False)]


def test_curves_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip('matplotlib')
    run = history.History(str(tmp_path))
    run.add(validation(1, None))
    assert history.draw_curves(str(tmp_path))
    for number in range(1, 4):
        run.add(iteration(number, losses={'l_pixel': None if number == 2 else 0.1}))
        run.add(validation(number))
    assert history.draw_curves(str(tmp_path))
    image = cv2.imread(str(tmp_path / 'curves.png'))
    assert image is not None
    assert min(image.shape[:2]) > 300


def test_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / 'run'
    (folder / 'training_states').mkdir(parents=True)
    assert basicsr.main(['status', str(folder)]) == 0
    assert 'nothing logged yet' in capsys.readouterr().out
    run = history.History(str(folder))
    run.add(iteration(4, skipped=3))
    run.add(validation(4, None))
    (folder / 'training_states' / '4.state').touch()
    with FileLock(history.lock_path(str(folder))):
        assert basicsr.main(['status', str(folder)]) == 0
    text = capsys.readouterr().out
    for part in (
        'running at iteration 4 of 10', 'l_pixel 0.125', '3 steps skipped', '20.0 images/s', '0:01:15 left',
        'psnr not finite at 4, best 30.5000 at 2', '1 checkpoints, the newest 4.state',
    ):  # fmt: skip
        assert part in text
    assert basicsr.main(['status', str(folder)]) == 0
    assert 'stopped at iteration 4' in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        basicsr.main(['status', str(tmp_path)])
    assert caught.value.code == 2


def test_status_of_a_real_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(os.getcwd())
    file = write_project(tmp_path, tiny_options())
    assert basicsr.main(['train', '-opt', str(file)]) == 0
    assert basicsr.main(['status', str(tmp_path / 'experiments' / 'tiny')]) == 0
    text = capsys.readouterr().out
    assert 'tiny: finished at iteration 4 of 4' in text
    assert 'sample: psnr' in text
    assert '2 checkpoints, the newest 4.state' in text
