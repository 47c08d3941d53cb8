from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dsgformer_arch import zoo
from dsgformer_arch.zoo.checkpoint import read_checkpoint
from tests.small_systems import SMALL, small
from tests.tools import scripts

SCRIPT = scripts.TOOLS / 'convert_checkpoint.py'
run = partial(scripts.run, 'convert_checkpoint')


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ('ran',))


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize('name', ['dsgformer', 'nafnet32', 'stripformer'])
def test_the_converted_file_loads_as_the_same_network(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = small(name)
    source = save(tmp_path / 'net.pth', {'state_dict': network.state_dict(), 'epoch': 1})
    target = tmp_path / 'net.safetensors'
    assert run(source, target) == 0
    assert f'{target}: {zoo.get(name).architecture} (' in capsys.readouterr().out
    loaded = zoo.load(target)
    for key, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor)
    again = tmp_path / 'again.safetensors'
    assert run(target, again) == 0
    assert read_checkpoint(again).metadata == read_checkpoint(target).metadata
    assert run(target, target) == 0
    assert torch.equal(read_checkpoint(target).state[key], tensor)


def test_a_named_system_is_in_the_metadata(tmp_path: Path) -> None:
    source = save(tmp_path / 'net.pth', zoo.create('dsgformer_t').state_dict())
    assert run(source, tmp_path / 'net.safetensors', '--system', 'dsgformer_t') == 0
    assert read_checkpoint(tmp_path / 'net.safetensors').metadata['system'] == 'dsgformer_t'


def bad_inputs(folder: Path) -> dict[str, tuple[Path, list[str], str]]:
    """By case: the file, further arguments, and what the sentence has to say."""
    good = small('nafnet32').state_dict()
    whole = save(folder / 'whole.pth', good)
    truncated = folder / 'truncated.pth'
    truncated.write_bytes(whole.read_bytes()[:-2000])
    grey = zoo.create('nafnet32', **SMALL['nafnet32'], img_channel=1).state_dict()
    return {
        'unknown name': (whole, ['--system', 'nafnet23'], "no system 'nafnet23'; did you mean nafnet32"),
        'unknown system': (
            save(folder / 'unknown.pth', {'layer.weight': torch.zeros(3)}),
            [],
            'of no system known here; the nearest is',
        ),
        'other system': (whole, ['--system', 'fftformer'], 'does not fit fftformer'),
        'truncated': (truncated, [], 'damaged'),
        'code': (save(folder / 'code.pth', {'params': good, 'hook': RunsCode()}), [], 'would run code'),
        'folder': (folder, [], 'is a folder'),
        'absent': (folder / 'absent.pth', [], 'there is no checkpoint'),
        'grey': (save(folder / 'grey.pth', grey), [], 'takes images of 1 channels'),
        'half': (save(folder / 'half.pth', dict(list(good.items())[:-3])), [], 'is missing'),
    }


@pytest.mark.parametrize(
    'case',
    [
        'unknown name',
        'unknown system',
        'other system',
        'truncated',
        'code',
        'folder',
        'absent',
        'grey',
        'half',
    ],
)
def test_bad_input_is_reported_in_one_sentence_and_status_2(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source, further, told = bad_inputs(tmp_path)[case]
    before = sorted(file.name for file in tmp_path.iterdir())
    assert run(source, tmp_path / 'net.safetensors', *further) == 2
    message = capsys.readouterr().err
    assert told in message
    assert message.startswith('error: ')
    assert message.count('\n') == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == before


def test_targets_that_cannot_be_written_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(tmp_path / 'net.pth', small('nafnet32').state_dict())
    assert run(source, tmp_path / 'absent' / 'net.safetensors') == 2
    assert 'cannot write' in capsys.readouterr().err
    assert run(source, tmp_path / 'net2.pth') == 2
    assert 'ends with .safetensors' in capsys.readouterr().err


@pytest.mark.long
def test_the_command_runs_from_any_folder(tmp_path: Path) -> None:
    source = save(tmp_path / 'net.pth', small('dsgformer').state_dict())
    command = [sys.executable, str(SCRIPT), str(source), 'net.safetensors']
    environment = {**os.environ, 'PYTHONPATH': str(SCRIPT.parents[1])}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'net.safetensors').is_file()


def test_the_key_of_the_weights_can_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    networks = {'params_ema': small('nafnet32'), 'params': small('nafnet32', width=16)}
    source = save(tmp_path / 'net.pth', {key: network.state_dict() for key, network in networks.items()})
    assert run(source, tmp_path / 'net.safetensors', '--param-key', 'params') == 0
    assert zoo.load(tmp_path / 'net.safetensors').settings['width'] == 16
    assert run(source, tmp_path / 'net.safetensors', '--param-key', 'parms') == 2
    assert "no entry 'parms'; it has params, params_ema" in capsys.readouterr().err
