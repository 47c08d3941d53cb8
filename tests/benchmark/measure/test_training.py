from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import cv2
import pytest
from torch import nn

from dsgformer_arch import zoo
from dsgformer_arch.benchmark import commands
from dsgformer_arch.benchmark.measure import learning, training
from dsgformer_arch.benchmark.measure.complexity import multiply_adds
from dsgformer_arch.benchmark.render import training as render_training
from dsgformer_arch.utils.errors import UserError
from tests.benchmark.conftest import Greedy, make

QUICK: dict[str, Any] = {'iterations': 2, 'batch': 1, 'patch': 16, 'validations': 2}


@pytest.fixture(autouse=True)
def small_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, 'MATCH_SIZE', 16)


def rows_of(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(out.with_suffix('.json').read_text())['rows']
    return rows


def test_every_system_and_seed_has_its_row_and_its_curve(sample: Path, tmp_path: Path) -> None:
    out = tmp_path / 'r' / 'training'
    assert commands.run('training', ['tiny', 'tiny_nafnet'], str(sample), seeds=2, out=out, **QUICK) == 0
    rows = rows_of(out)
    assert [(row['model'], row['seed']) for row in rows] == [
        ('tiny', 0), ('tiny_nafnet', 0), ('tiny', 1), ('tiny_nafnet', 1),
    ]  # fmt: skip
    for row in rows:
        assert [point['iteration'] for point in row['curve']] == [1, 2]
        assert row['parameters'] == zoo.get(row['model']).parameters
        assert row['multiply_adds'] == multiply_adds(row['model'], 16, 16)
    assert '| tiny_nafnet | as published |' in out.with_suffix('.md').read_text()
    assert cv2.imread(str(out.with_suffix('.png'))) is not None


def test_resume_trains_what_is_missing_only(
    sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / 'training'
    commands.run('training', ['tiny'], str(sample), seeds=1, out=out, **QUICK)
    first = rows_of(out)
    with pytest.raises(UserError, match=r'other settings \(seeds\)'):
        commands.run('training', ['tiny'], str(sample), seeds=2, out=out, resume=True, **QUICK)
    monkeypatch.setattr(learning, 'train', lambda *_: pytest.fail('trained again'))
    assert commands.run('training', ['tiny'], str(sample), seeds=1, out=out, resume=True, **QUICK) == 0
    assert rows_of(out) == first


def test_every_system_uses_the_best_of_several_learning_rates(
    sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = {'tiny': 1e-2, 'tiny_nafnet': 1e-4}
    settings: dict[str, Any] = dict(seeds=2, lr=[1e-2, 1e-4], out=tmp_path / 'training', **QUICK)

    def train(build: Any, data: Any, recipe: learning.Recipe, *_: Any) -> dict[str, Any]:
        name = 'tiny_nafnet' if type(build()).__name__ == 'NAFNet' else 'tiny'
        psnr = 30.0 if recipe.lr == best[name] else 20.0
        return {'psnr': psnr, 'ssim': 0.5, 'iterations': 2, 'seconds': 1.0, 'curve': []}

    monkeypatch.setattr(learning, 'train', train)
    assert commands.run('training', ['tiny', 'tiny_nafnet'], str(sample), **settings) == 0
    found = [(row['model'], row['seed'], row['lr']) for row in rows_of(settings['out'])]
    assert found == [
        ('tiny', 0, 1e-2), ('tiny', 0, 1e-4), ('tiny_nafnet', 0, 1e-2), ('tiny_nafnet', 0, 1e-4),
        ('tiny', 1, 1e-2), ('tiny_nafnet', 1, 1e-4),
    ]  # fmt: skip
    page = settings['out'].with_suffix('.md').read_text(encoding='utf-8')
    assert re.search(r'\| tiny \|.*\| 0\.01 \| 30\.00 \(30\.00 to 30\.00\) \|', page)
    assert re.search(r'\| tiny_nafnet \|.*\| 0\.0001 \| 30\.00', page)
    monkeypatch.setattr(learning, 'train', lambda *_: pytest.fail('trained again'))
    assert commands.run('training', ['tiny', 'tiny_nafnet'], str(sample), resume=True, **settings) == 0

    # A longer comparison takes these rates, and no others.
    monkeypatch.setattr(learning, 'train', train)
    longer = {**settings, 'out': tmp_path / 'longer', 'rates': settings['out'].with_suffix('.json')}
    assert commands.run('training', ['tiny', 'tiny_nafnet'], str(sample), **longer) == 0
    found = [(row['model'], row['seed'], row['lr']) for row in rows_of(longer['out'])]
    assert found == [
        ('tiny', 0, 1e-2), ('tiny_nafnet', 0, 1e-4), ('tiny', 1, 1e-2), ('tiny_nafnet', 1, 1e-4),
    ]  # fmt: skip
    assert 'its best in training.json' in longer['out'].with_suffix('.md').read_text(encoding='utf-8')
    with pytest.raises(UserError, match='has no training of nafnet32'):
        commands.run('training', ['nafnet32'], str(sample), **longer)


def test_a_system_that_fails_is_reported_and_tried_again_on_resume(
    sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / 'training'
    create = zoo.create

    def greedy(name: str, **settings: Any) -> nn.Module:
        return Greedy() if name == 'tiny' else create(name, **settings)

    monkeypatch.setattr(zoo, 'create', greedy)
    monkeypatch.setattr(training, 'cost', lambda name, overrides: {'parameters': 1, 'multiply_adds': 1})
    assert commands.run('training', ['tiny', 'tiny_nafnet'], str(sample), seeds=1, out=out, **QUICK) == 1
    tiny, other = rows_of(out)
    assert tiny['error'] == 'does not fit in memory'
    assert other['psnr'] > 0
    assert '| does not fit in memory |' in out.with_suffix('.md').read_text()
    monkeypatch.setattr(zoo, 'create', create)
    again = commands.run(
        'training', ['tiny', 'tiny_nafnet'], str(sample), seeds=1, out=out, resume=True, **QUICK
    )
    assert again == 0
    assert {row['model']: 'psnr' in row for row in rows_of(out)} == {'tiny': True, 'tiny_nafnet': True}


def test_matched_widths_are_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    assert training.matched('tiny', 'tiny') == {}
    found = training.matched('tiny_nafnet', 'tiny')
    target = multiply_adds('tiny', 16, 16)
    distance = {
        width: abs(multiply_adds('tiny_nafnet', 16, 16, width=width) / target - 1) for width in range(2, 20)
    }
    assert found == {'width': min(distance, key=lambda width: distance[width])}


def test_several_widths_are_scaled_together() -> None:
    def scaled(name: str, width: int) -> dict[str, Any]:
        system = zoo.get(name)
        return zoo.network_class(system.architecture).scaled_widths(system.settings, width)

    assert scaled('mprnet', 6) == {'n_feat': 6, 'scale_unetfeats': 3, 'scale_orsnetfeats': 2}
    assert scaled('mprnet', 1)['scale_orsnetfeats'] == 1
    assert scaled('restormer', 12) == {'dim': 12}
    assert scaled('mb_taylorformer_v2_l', 6) == {'dim': (6, 12, 18, 24)}
    assert scaled('nafnet64', 32) == {'width': 32}
    assert scaled('ipt', 8) == {}


def test_what_cannot_be_matched_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match='ipt has no widths'):
        training.matched('ipt', 'tiny')

    def never(name: str, *_: Any, **overrides: Any) -> int:
        if overrides:
            raise RuntimeError('heads do not divide it')
        return 10**9

    monkeypatch.setattr(training, 'multiply_adds', never)
    with pytest.raises(UserError, match=r'no width of tiny_nafnet comes near the 1\.0 G'):
        training.matched('tiny_nafnet', 'tiny')


def test_the_table_has_means_spreads_and_gains() -> None:
    blurred, line = render_training.RENDERING.table(make('training')).splitlines()[2:]
    assert blurred.startswith('| (blurred) |')
    assert '| 26.50 (26.00 to 27.00) | +1.50 | 0.8000 | 8 | 2 |' in line
