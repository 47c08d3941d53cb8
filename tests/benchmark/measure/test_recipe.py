"""The study of recipes: what differs between runs, paired differences, and what is written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import cv2
import pytest

from dsgformer_arch.benchmark import commands
from dsgformer_arch.benchmark import record as records
from dsgformer_arch.benchmark.measure import learning
from dsgformer_arch.benchmark.render import recipe as render_recipe
from dsgformer_arch.utils.errors import UserError

QUICK: dict[str, Any] = {'model': 'tiny', 'iterations': 4, 'seeds': 2, 'batch': 1, 'patch': 16}


def record_of(scores: dict[str, list[float]]) -> records.Record:
    """A record with these PSNRs, by variant and seed."""
    rows = [
        {'variant': name, 'seed': seed, 'psnr': value, 'iterations': 4, 'seconds': 1.0}
        for name, values in scores.items()
        for seed, value in enumerate(values)
    ]
    environment: dict[str, Any] = {}
    settings = {'model': 'tiny', 'iterations': 4, 'data': 'x'}
    extra = {'blurred': {'psnr': 20.0, 'ssim': 0.5}}
    return records.Record('recipe', 'x', settings, 'y', environment, rows, extra)


def test_a_variant_changes_what_its_name_says(
    sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def train(build: Any, data: Any, used: learning.Recipe, seed: int, *rest: Any) -> dict[str, Any]:
        network = build()
        seen.append((seed, network.settings['ratios'], network.patch, used))
        return {'psnr': 25.0, 'ssim': 0.5, 'iterations': used.iterations, 'seconds': 1.0, 'curve': []}

    monkeypatch.setattr(learning, 'train', train)
    names = ['drsformer_k', 'full_resolution', 'l1', 'half_rate']
    assert commands.run('recipe', str(sample), variants=names, out=tmp_path / 'r', lr=0.01, **QUICK) == 0
    assert [seed for seed, *_ in seen] == [0] * 5 + [1] * 5
    base, k, full, l1, rate = seen[:5]
    assert base[3].frequency == 0.1
    assert base[3].lr == rate[3].lr * 2 == 0.01
    assert k[1] == ('1/2', '2/3', '3/4', '4/5')
    assert (full[2], full[3].iterations) == (1, 1)
    assert l1[3].frequency == 0


def test_runs_are_written_resumed_and_extended(
    sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / 'recipe'
    assert commands.run('recipe', str(sample), variants=['l1'], out=out, **{**QUICK, 'seeds': 1}) == 0
    rows = json.loads(out.with_suffix('.json').read_text())['rows']
    assert [row['variant'] for row in rows] == ['base', 'l1']
    assert all(math.isfinite(row['psnr']) for row in rows)
    assert cv2.imread(str(out.with_suffix('.png'))) is not None
    assert 'L1 loss alone' in out.with_suffix('.md').read_text(encoding='utf-8')
    trained = []
    original = learning.train
    monkeypatch.setattr(learning, 'train', lambda *a: trained.append(a[3]) or original(*a))
    more = commands.run(
        'recipe', str(sample), variants=['betas_999'], out=out, resume=True, **{**QUICK, 'seeds': 1}
    )
    assert more == 0
    assert trained == [0], 'only the new variant is trained'


def test_differences_are_paired_by_seed() -> None:
    record = record_of({'base': [24.0, 25.0, 26.0], 'l1': [24.1, 25.3, 26.2]})
    assert render_recipe.differences(record, 'l1') == pytest.approx([0.1, 0.3, 0.2])
    # Student's quantile for two degrees of freedom is 4.303; the standard deviation is 0.1.
    assert render_recipe.half_interval([0.1, 0.3, 0.2]) == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-3)
    assert render_recipe.half_interval([0.1]) is None
    cells = {cell['variant']: cell for cell in render_recipe.cells(record)}
    assert cells['L1 loss alone']['difference'] == '+0.200 ± 0.248'
    assert cells['base'].get('difference') is None
    assert cells['base']['spread'] == '24.000 to 26.000'


def test_what_cannot_be_varied_is_refused(sample: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match='tiny_nafnet has no such settings'):
        commands.run('recipe', str(sample), out=tmp_path / 'r', **{**QUICK, 'model': 'tiny_nafnet'})
    with pytest.raises(UserError, match="there is no 'l3'"):
        commands.run('recipe', str(sample), variants=['l3'], out=tmp_path / 'r', **QUICK)
