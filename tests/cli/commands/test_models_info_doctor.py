"""`dsgformer models`, `info` and `doctor` say what is here."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dsgformer_arch import zoo
from dsgformer_arch.benchmark.measure.complexity import count
from dsgformer_arch.cli import dsgformer
from dsgformer_arch.inference import doctor, models, official_weights
from dsgformer_arch.zoo import registry


def printed(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert dsgformer.main([*map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_models_names_every_system_and_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv('DSGFORMER_HOME', str(tmp_path))
    rows = {row['name']: row for row in json.loads(printed(capsys, 'models', '--json'))}
    assert set(rows) == set(zoo.names())
    assert rows['restormer']['parameters'] == 26_126_644
    assert {'dataset': 'GoPro', 'psnr': 32.92, 'ssim': 0.961} in rows['restormer']['reported']
    entry = official_weights.find('restormer')
    states = {one['name']: one['state'] for one in rows['restormer']['weights']}
    assert states[entry.key] in ('can be downloaded', 'by hand')
    official_weights.place(entry).parent.mkdir(parents=True)
    official_weights.place(entry).write_bytes(b'x')
    rows = {row['name']: row for row in json.loads(printed(capsys, 'models', '--json'))}
    assert {one['name']: one['state'] for one in rows['restormer']['weights']}[entry.key] == 'downloaded'
    text = printed(capsys, 'models').splitlines()
    assert [line.split()[0] for line in text[1:]] == zoo.names()
    line = next(line for line in text if line.startswith('restormer'))
    assert '26.13 M' in line
    assert '32.92 dB, 0.961' in line
    assert 'downloaded' in line


def test_macs_are_what_is_counted() -> None:
    rows = {row['name']: row for row in models.table()}
    for name in ('dsgformer_t', 'nafnet32'):
        assert rows[name]['giga_macs'] == round(count(name).published / 1e9, 1)


@pytest.mark.long
def test_all_macs_are_what_is_counted() -> None:
    counted = {name: round(count(name).published / 1e9, 1) for name in zoo.names()}
    assert counted == {name: zoo.get(name).giga_macs for name in zoo.names()}


def test_a_new_system_is_in_the_table_by_its_entry_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    new = dataclasses.replace(zoo.get('dsgformer_t'), name='mine', giga_macs=1.5)
    monkeypatch.setitem(registry._BY_NAME, 'mine', new)
    assert models.table()[-1]['giga_macs'] == 1.5
    last = models.as_text(models.table()).splitlines()[-1]
    assert last.split()[:5] == ['mine', 'deblurring', '0.70', 'M', '1.5']


def test_info_of_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = zoo.create('dsgformer_t')
    torch.save({'params_ema': network.state_dict()}, tmp_path / 'net.pth')
    found = json.loads(printed(capsys, 'info', tmp_path / 'net.pth', '--json'))
    assert (found['kind'], found['system']) == ('weights', 'dsgformer_t')
    assert found['parameters'] >= sum(parameter.numel() for parameter in network.parameters())
    assert found['types'] == ['float32']


def test_info_of_an_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / 'a.png')
    text = printed(capsys, 'info', tmp_path / 'a.png')
    lines = dict(line.split(maxsplit=1) for line in text.splitlines())
    assert (lines['kind'], lines['width'], lines['height'], lines['bits']) == ('image', '30', '20', '8')


@pytest.mark.parametrize('content', [None, b'', b'PK\x03\x04 no checkpoint'])
def test_info_of_something_else(
    tmp_path: Path, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / 'a.bin'
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as caught:
        dsgformer.main(['info', str(path)])
    assert caught.value.code == 2
    assert str(path) in capsys.readouterr().err


def test_doctor_reports_and_finds_faults(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dsgformer.main(['doctor']) == 0
    text = capsys.readouterr().out
    for subject in (
        'torch',
        'basicsr',
        'compiler',
        'CPU kernel, float32',
        'GPU',
        'bfloat16',
        'import basicsr',
    ):
        assert subject in text
    assert torch.__version__ in text

    def broken() -> None:
        raise RuntimeError('upstream has changed')

    monkeypatch.setattr(doctor.compat, 'FIXES', (broken,))
    assert dsgformer.main(['doctor']) == 1
    assert 'fault:   fix broken' in capsys.readouterr().out


def test_a_missing_compiler_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('PATH', '')
    monkeypatch.delenv('CXX', raising=False)
    state, found = doctor._compiler()
    assert state == doctor.WARNING
    assert 'install g++' in found
