"""`dsgformer weights`, and `--model` with weights that are not here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dsgformer_arch import zoo
from dsgformer_arch.cli import dsgformer
from dsgformer_arch.inference import official_weights, weights
from dsgformer_arch.inference.official_weights import OfficialWeights
from dsgformer_arch.utils.errors import UserError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('DSGFORMER_HOME', str(tmp_path / 'home'))


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> OfficialWeights:
    """Official weights of a small system that have to be brought by hand."""
    entry = OfficialWeights('dsgformer_s', 'motion', 'GoPro', 'https://a.page', None, 'MIT')
    monkeypatch.setattr(official_weights, 'TABLE', (*official_weights.TABLE, entry))
    return entry


def bring(entry: OfficialWeights) -> Path:
    path = official_weights.place(entry)
    path.parent.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(zoo.create(entry.system).state_dict(), path)
    return path


def test_the_list_has_every_entry_and_says_what_is_here(
    mine: OfficialWeights, capsys: pytest.CaptureFixture[str]
) -> None:
    size = bring(mine).stat().st_size
    assert dsgformer.main(['weights', 'list']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(official_weights.TABLE)
    assert f'{size / 1e6:.0f} MB' in next(line for line in lines if line.startswith('dsgformer_s/motion'))
    assert 'by hand' in next(line for line in lines if line.startswith('stripformer/motion'))
    dsgformer.main(['weights', 'list', '--json'])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row['key'] for row in rows] == [entry.key for entry in official_weights.TABLE]


def test_get_prints_the_path_and_remove_deletes_the_file(
    mine: OfficialWeights, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bring(mine)
    assert dsgformer.main(['weights', 'get', mine.key]) == 0
    assert capsys.readouterr().out.strip() == str(path)
    assert dsgformer.main(['weights', 'remove', mine.key]) == 0
    assert not path.exists()


def test_what_is_missing_ends_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (['weights', 'get', 'restromer'], 'did you mean restormer'),
        (['weights', 'get', 'stripformer/motion'], 'https://drive.google.com/drive/folders/'),
    ):
        with pytest.raises(SystemExit) as stop:
            dsgformer.main(arguments)
        assert stop.value.code == 2
        assert said in capsys.readouterr().err


def test_a_network_of_official_weights(mine: OfficialWeights) -> None:
    with pytest.raises(UserError, match=r'dsgformer_s/motion are not on this machine; download it from'):
        weights.network('dsgformer_s')
    with pytest.raises(UserError, match='run: dsgformer weights get restormer/motion'):
        weights.network('restormer')
    bring(mine)
    for name in ('dsgformer_s', 'dsgformer_s/motion'):
        network, called = weights.network(name)
        assert called == 'dsgformer_s/motion'
        assert sum(p.numel() for p in network.parameters()) == zoo.get('dsgformer_s').parameters
