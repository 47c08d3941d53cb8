from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dsgformer_arch import zoo
from dsgformer_arch.benchmark import commands
from dsgformer_arch.benchmark.render import report
from tests.benchmark.conftest import make
from tests.tools import scripts
from tests.trees import write_pairs

QUALITY = ['quality', '--models', 'nafnet32', '--data', 'x', '--protocol', 'gopro']
status = partial(scripts.run, 'benchmark')


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the subcommands are called with, in place of their work."""
    found: dict[str, Any] = {}

    def record(*command: str, **settings: Any) -> int:
        found.update(settings)
        return 0

    for module in (commands, report):
        monkeypatch.setattr(module, 'run', record)
    return found


def test_the_options_of_speed_arrive(called: dict[str, Any]) -> None:
    code = status(
        'speed', '--models', 'dsgformer_t, restormer', '--size', 64, '--size', '72x128', '--precision',
        'bf16', '--channels-last', '--batch', 2, '--train', '--roofline', '--out', 'a/b.json',
    )  # fmt: skip
    assert code == 0
    assert called['models'] == ['dsgformer_t', 'restormer']
    assert called['size'] == [(64, 64), (72, 128)]
    assert (called['precision'], called['batch'], called['train']) == ('bf16', 2, True)
    assert (called['channels_last'], called['compile'], called['best']) == (True, False, False)
    assert (called['roofline'], called['cuda_graphs']) == (True, False)
    assert called['out'] == Path('a/b')


def test_the_options_of_cost_arrive(called: dict[str, Any]) -> None:
    status('cost')
    assert called['models'] == zoo.names()
    assert (called['size'], called['no_latency'], called['rounds']) == ((1200, 1920), False, 3)
    called.clear()
    status('cost', '--models', 'dsgformer_s', '--size', '640x480', '--no-latency')
    assert (called['models'], called['size'], called['no_latency']) == (['dsgformer_s'], (480, 640), True)


def test_all_models(called: dict[str, Any]) -> None:
    status('speed', '--models', 'all')
    assert called['models'] == zoo.names()


def test_the_options_of_quality_arrive(called: dict[str, Any]) -> None:
    status(
        'quality', '--models', 'dsgformer,nafnet32', '--weights', 'dsgformer=a=b.pth', 'nafnet32=c.pth',
        '--data', 'x', '--protocol', 'gopro', '--metrics', 'lpips,niqe', '--tile', 256, '--resume',
    )  # fmt: skip
    assert called['weights'] == [('dsgformer', Path('a=b.pth')), ('nafnet32', Path('c.pth'))]
    assert called['data'] == ['x']
    assert (called['metrics'], called['tile'], called['tlc'], called['resume']) == (
        ['lpips', 'niqe'], 256, None, True,
    )  # fmt: skip


def test_the_options_of_training_and_ablation_arrive(called: dict[str, Any]) -> None:
    status('training', '--models', 'dsgformer_t', '--data', 'x', '--seconds', 9, '--seeds', 3)
    assert (called['seconds'], called['iterations'], called['seeds']) == (9, None, 3)
    assert called['protocol'] == 'gopro'
    called.clear()
    status('ablation', '--data', 'x', '--patch', 32, '--protocol', 'realblur')
    assert (called['iterations'], called['model'], called['patch']) == (300, 'dsgformer_t', 32)
    assert called['protocol'] == 'realblur'


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        (['speed', '--models', 'restormr'], 'restormer'),
        (['speed', '--models', 'nafnet32', '--size', '15'], "'15' is not a size"),
        (['speed', '--models', 'nafnet32', '--size', '3x4x5'], "'3x4x5' is not a size"),
        (['cost', '--size', '9x1920'], "'9x1920' is not a size; write 256 or 1280x720 (width first)"),
        (['speed', '--models', 'nafnet32', '--rounds', '0'], "'0' is not a whole number of at least 1"),
        (['speed', '--models', 'nafnet32', '--rounds', 'x'], "'x' is not a whole number of at least 1"),
        ([*QUALITY, '--weights', 'a'], 'NAME=PATH'),
        (QUALITY, 'nafnet32 has no weights'),
        (['training', '--models', 'nafnet32', '--data', 'x'], '--iterations'),
        (['training', '--models', 'nafnet32', '--data', 'x', '--iterations', '2'], 'no finished LMDB'),
        (['ablation', '--data', 'x', '--device', 'cuda:99'], '--device cuda:99'),
        (['ablation', '--data', 'x', '--protocol', 'gorpo'], 'there is no protocol gorpo'),
        (['report', 'nothing.json'], 'cannot read nothing.json'),
        (['faster'], 'invalid choice'),
        (['speed', '--models', ''], 'name at least one system'),
        (['speed', '--models', 'nafnet32', '--out', ''], 'names no file'),
        (['speed', '--models', 'nafnet32', '--threads', '99999'], 'too many for this machine'),
        (['training', '--models', 'nafnet32', '--data', '/', '--iterations', '2'], 'no finished LMDB'),
        (['ablation', '--data', 'x', '--lr', 'nan'], 'nan is not a positive number'),
        (['loader', '--data', 'x'], 'no finished LMDB'),
    ],
)  # fmt: skip
def test_a_mistake_is_reported_in_one_sentence_and_status_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert status(*arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert 'Traceback' not in error
    assert [*tmp_path.iterdir()] == []


def test_without_matplotlib_it_says_so_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = scripts.load('benchmark')
    monkeypatch.setattr(module, 'find_spec', lambda name: None)
    with pytest.raises(SystemExit) as stop:
        module.main(['report'])
    assert stop.value.code == 2
    assert 'pip install matplotlib' in capsys.readouterr().err


def test_quality_and_report_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv('DSGFORMER_EAGER', '1')
    write_pairs(tmp_path, 'test', 1)
    torch.save(zoo.create('dsgformer_t').state_dict(), tmp_path / 'net.pth')
    out = tmp_path / 'results' / 'quality'
    code = status(
        'quality', '--models', 'dsgformer_t', '--weights', f'dsgformer_t={tmp_path / "net.pth"}', '--data',
        tmp_path / 'test', '--protocol', 'rain', '--out', out,
    )  # fmt: skip
    assert code == 0
    rows = json.loads(out.with_suffix('.json').read_text())['rows']
    assert [row['model'] for row in rows] == ['blurred', 'dsgformer_t']
    make('speed').save(tmp_path / 'results' / 'speed.json')
    assert status('report', tmp_path / 'results', '--out', tmp_path / 'page.html') == 0
    assert 'protocol rain' in (tmp_path / 'page.html').read_text()
    assert 'Speed of restoring' in (tmp_path / 'page.md').read_text()
