"""What TensorBoard and Weights & Biases show of a run."""

from __future__ import annotations

import importlib.util
import io
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dsgformer_arch.cli import basicsr
from dsgformer_arch.models import board
from tests.trees import random_image, tiny_options, write_project

pytest.importorskip('tensorboard')


@pytest.fixture(autouse=True)
def _restore_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(os.getcwd())
    monkeypatch.setattr(sys, 'argv', ['basicsr'])


def watched(iterations: int = 2, **logger: Any) -> dict[str, Any]:
    options = tiny_options(iterations=iterations)
    options['logger'] |= {'use_tb_logger': True} | logger
    options['val'] |= {'val_freq': 2}
    return options


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / 'tb_logger' / 'tiny'), {'scalars': 0, 'images': 0})
    found.Reload()
    return found


def test_scalars_and_samples_are_in_the_events(tmp_path: Path) -> None:
    file = write_project(tmp_path, watched(iterations=4, samples=1))
    assert basicsr.main(['train', '-opt', str(file)]) == 0
    found = events(tmp_path)
    tags = set(found.Tags()['scalars'])
    assert {'losses/l_pixel', 'lr', 'images_per_second', 'data_wait', 'memory_gb'} <= tags
    assert 'metrics/sample/psnr' in tags
    assert [event.step for event in found.Scalars('lr')] == [1, 2, 3, 4]
    assert found.Tags()['images'] == ['sample/0_test-0']  # the first of two
    shown = found.Images('sample/0_test-0')
    assert [event.step for event in shown] == [2, 4]
    pixels = np.asarray(Image.open(io.BytesIO(shown[-1].encoded_image_string)))
    assert pixels.shape == (33, 3 * 21, 3)
    blurred, _, sharp = np.split(pixels, 3, axis=1)
    # random_image() is stored as OpenCV has it, BGR.
    assert np.array_equal(sharp, random_image(50, 33, 21)[..., ::-1])
    assert not np.array_equal(blurred, sharp)


def test_no_samples_where_none_are_asked_for(tmp_path: Path) -> None:
    file = write_project(tmp_path, watched(samples=0))
    assert basicsr.main(['train', '-opt', str(file)]) == 0
    assert not events(tmp_path).Tags()['images']


def test_a_logged_run_computes_the_same_and_resumes(tmp_path: Path) -> None:
    """Stopped after iteration 2 and resumed: the weights of an unwatched run, and each step shown once."""
    plain = write_project(tmp_path / 'plain', tiny_options(iterations=4))
    assert basicsr.main(['train', '-opt', str(plain)]) == 0
    file = write_project(tmp_path / 'watched', watched(iterations=4))
    assert basicsr.main(['train', '-opt', str(file), '--force_yml', 'train:total_iter=2']) == 0
    assert basicsr.main(['train', '-opt', str(file), '--auto_resume']) == 0
    weights = [
        torch.load(
            tmp_path / name / 'experiments' / 'tiny' / 'models' / 'net_g_latest.pth', weights_only=True
        )
        for name in ('plain', 'watched')
    ]
    for name, tensor in weights[0]['params'].items():
        assert torch.equal(tensor, weights[1]['params'][name])
    assert [event.step for event in events(tmp_path / 'watched').Scalars('losses/l_pixel')] == [1, 2, 3, 4]


@pytest.mark.parametrize('size', [(2000, 100), (300, 4000), (20, 30)])
def test_a_strip_is_bounded(size: tuple[int, int]) -> None:
    image = np.zeros((*size, 3), np.uint8)
    made = board.strip([image, image[::2, ::2], image])
    assert made.shape[0] <= board.SIDE
    assert made.shape[1] <= 3 * board.SIDE
    assert made.shape[1] % 3 == 0
    if max(size) <= board.SIDE:
        assert made.shape[:2] == (size[0], 3 * size[1])


class FakeRun:
    def __init__(self, **given: Any) -> None:
        self.given, self.logged, self.finished = given, [], False
        self.id = given['id'] or f'run{len(FakeWandb.runs)}'

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        pass

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


class FakeWandb:
    runs: list[FakeRun] = []  # noqa: RUF012
    Image = staticmethod(lambda pixels: pixels)

    @classmethod
    def init(cls, **given: Any) -> FakeRun:
        cls.runs.append(FakeRun(**given))
        return cls.runs[-1]


def test_weights_and_biases_gets_the_same_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, 'wandb', FakeWandb)
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name)
    monkeypatch.setattr(FakeWandb, 'runs', [])
    file = write_project(tmp_path, watched(iterations=4, samples=1, wandb={'project': 'deblurring'}))
    assert basicsr.main(['train', '-opt', str(file), '--force_yml', 'train:total_iter=2']) == 0
    assert basicsr.main(['train', '-opt', str(file), '--auto_resume']) == 0
    first, second = FakeWandb.runs
    assert (first.given['project'], first.given['name'], first.given['id']) == ('deblurring', 'tiny', None)
    assert (second.given['id'], second.given['resume']) == (first.id, 'allow')
    assert first.finished
    assert second.finished
    assert [entry['iteration'] for entry in first.logged if 'lr' in entry] == [1, 2]
    images = [entry['sample/0_test-0'] for entry in first.logged if 'sample/0_test-0' in entry]
    assert [image.shape for image in images] == [(33, 63, 3)]


@pytest.mark.long
def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real package: a run without network leaves its record and the images on the disk."""
    pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    file = write_project(tmp_path, watched(samples=1, wandb={'project': 'deblurring'}))
    assert basicsr.main(['train', '-opt', str(file)]) == 0
    (run,) = (tmp_path / 'wandb').glob('offline-run-*')
    assert list(run.glob('*.wandb'))
    (image,) = run.glob('files/media/images/sample/0_test-0*.png')
    assert Image.open(image).size == (63, 33)
    assert (tmp_path / 'experiments' / 'tiny' / board.WANDB_ID).read_text().strip() in run.name


@pytest.mark.parametrize(
    ('logger', 'missing', 'problem'),
    [
        ({'wandb': {'project': 'p'}}, 'wandb', 'needs wandb: pip install wandb'),
        ({}, 'tensorboard', 'needs tensorboard: pip install tensorboard'),
        ({'use_tb_logger': False, 'wandb': {'project': 'p'}}, '', 'use_tb_logger is false'),
        ({'samples': -1}, '', 'samples'),
    ],
)
def test_contradictory_settings_are_reported_before_the_run(
    logger: dict[str, Any],
    missing: str,
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == missing else name)
    file = write_project(tmp_path, watched(**logger))
    with pytest.raises(SystemExit) as caught:
        basicsr.main(['train', '-opt', str(file)])
    assert caught.value.code == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / 'experiments').exists()


def test_a_refused_run_of_weights_and_biases_is_reported_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**given: Any) -> None:
        raise RuntimeError('api_key not configured (no-tty)')

    monkeypatch.setitem(sys.modules, 'wandb', type('Refusing', (), {'init': staticmethod(refuse)}))
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name)
    file = write_project(tmp_path, watched(wandb={'project': 'deblurring'}))
    with pytest.raises(SystemExit) as caught:
        basicsr.main(['train', '-opt', str(file)])
    assert caught.value.code == 2
    assert 'api_key not configured' in capsys.readouterr().err
