"""`cost`: counts against published ones, limits, and what is left out without latency."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsgformer_arch import zoo
from dsgformer_arch.benchmark import challenge, commands
from dsgformer_arch.benchmark.measure import complexity, cost, speed
from dsgformer_arch.benchmark.record import Record
from dsgformer_arch.benchmark.render import cost as render_cost
from dsgformer_arch.benchmark.render import report
from dsgformer_arch.zoo import registry

BASELINE = {
    (16, 28): (4.35, 146.33),
    (16, 14): (2.68, 94.98),
    (32, 28): (17.11, 566.33),
}
"""NAFNet by width and blocks of the last encoder: parameters in M and MACs in G at 1920×1200, as AIM 2025
reports them (arXiv 2510.12788)."""


def rows_of(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(out.with_suffix('.json').read_text())['rows']
    return rows


@pytest.mark.parametrize(('width', 'blocks'), BASELINE)
def test_counts_are_within_three_percent_of_the_challenges(width: int, blocks: int) -> None:
    parameters, macs = BASELINE[width, blocks]
    settings: dict[str, Any] = {'width': width, 'enc_blk_nums': [1, 1, 1, blocks]}
    network = zoo.create_on_meta('nafnet32', **settings)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == parameters
    counted = complexity.multiply_adds('nafnet32', challenge.HEIGHT, challenge.WIDTH, **settings) / 1e9
    assert 0.97 * macs < counted < macs


def test_count_of_the_presets_for_the_track(tmp_path: Path) -> None:
    """The sum of the kinds, the limits, and the table."""
    out = tmp_path / 'cost'
    names = ['dsgformer_s', 'dsgformer_h', 'nafnet32']
    assert commands.run('cost', names, no_latency=True, out=out) == 0
    rows = rows_of(out)
    assert [row['model'] for row in rows] == names
    for row in rows:
        assert row['parameters'] == zoo.get(row['model']).parameters
        assert row['multiply_adds'] == row['convolutions'] + row['products'] + row['fourier']
        assert not {'latency_ms', 'peak_memory_mib', 'error'} & row.keys()
    assert [row['within'] for row in rows] == [True, True, False]
    page = out.with_suffix('.md').read_text()
    assert '| dsgformer_s | 2.38 M | 181.5 G | 159.2 G | 15.9 G | 6.4 G | pass |' in page
    assert '| nafnet32 | 17.11 M | 560.9 G | 560.9 G |  |  | fail: parameters and MACs |' in page
    assert '| NTIRE 2026 | 1 | jingjing et al. |  |  | 33.39 | 0.8585 |  |' in page
    assert '| NTIRE 2026 | 2 | FSM-Net | 4.94 M | 159.35 G | 33.144 | 0.8516 |' in page
    assert '| AIM 2025 | 1 | NAFRepLocal | 4.76 M | 198.25 G | 31.13 | 0.843 |' in page
    assert 'both products of every attention' in page
    assert not out.with_suffix('.png').exists()


def test_latency_and_memory_of_a_tiny_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A process of its own does not know the systems of the tests; `test_speed` runs one.
    monkeypatch.setattr(speed, 'peak_memory', lambda *_: {'peak_memory_mib': 123.4})
    out = tmp_path / 'cost'
    assert commands.run('cost', ['tiny', 'tiny_nafnet'], size=(48, 64), rounds=2, out=out) == 0
    for row in rows_of(out):
        assert row['size'] == '48x64'
        assert row['latency_ms'] > 0
        assert row['peak_memory_mib'] == 123.4
        assert row['within'] is None, 'the limits are for 1920×1200'
    page = out.with_suffix('.md').read_text()
    assert '# Cost of one image of 64×48' in page
    assert '| limits |' not in page
    assert ' s | 123 MiB |' in page
    section = report.own_section(
        report.Result(out.with_suffix('.json'), Record.load(out.with_suffix('.json')))
    )
    assert section is not None
    assert section.title == 'Cost of one image of 64×48'
    assert 'FSM-Net' in section.html('')


@pytest.mark.parametrize('lies', [(1920, 1200), (1200, 1920)])
def test_limits_apply_to_the_challenges_size_lying_or_upright(lies: tuple[int, int], tmp_path: Path) -> None:
    record = cost.run(['tiny'], size=lies, no_latency=True, out=tmp_path / 'c')
    assert record.rows[0]['within'] is True


def test_what_exceeds_a_limit_is_named() -> None:
    few, many = challenge.MOST_PARAMETERS, challenge.MOST_PARAMETERS + 1
    little, much = challenge.MOST_MACS, challenge.MOST_MACS + 1
    for parameters, macs, said in (
        (few, little, 'pass'),
        (many, little, 'fail: parameters'),
        (few, much, 'fail: MACs'),
        (many, much, 'fail: parameters and MACs'),
    ):
        row: dict[str, Any] = {'parameters': parameters, 'multiply_adds': macs}
        row['within'] = cost.within(row)
        assert row['within'] == (said == 'pass')
        assert render_cost.limits(row) == said


def test_a_system_that_fails_stops_no_other_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = replace(registry._BY_NAME['tiny_nafnet'], name='broken')
    monkeypatch.setitem(registry._BY_NAME, 'broken', broken)
    facts = speed.facts

    def failing(variant: speed.Variant) -> dict[str, Any]:
        if variant.model == 'broken':
            raise RuntimeError('cannot be counted')
        return facts(variant)

    monkeypatch.setattr(speed, 'facts', failing)
    out = tmp_path / 'cost'
    settings: dict[str, Any] = {'size': (32, 32), 'no_latency': True, 'out': out}
    assert commands.run('cost', ['broken', 'tiny'], **settings) == 1
    assert [row.get('error') for row in rows_of(out)] == ['cannot be counted', None]
    assert '| broken |' in out.with_suffix('.md').read_text()
    monkeypatch.setattr(speed, 'facts', facts)
    assert commands.run('cost', ['broken', 'tiny'], **settings, resume=True) == 0
    assert [row['model'] for row in rows_of(out)] == ['broken', 'tiny']


def test_counting_any_error_is_a_row_also_where_latency_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, 'peak_memory', lambda *_: {'peak_memory_mib': 1.0})
    facts = speed.facts

    def failing(variant: speed.Variant) -> dict[str, Any]:
        if variant.model == 'tiny':
            raise TypeError('a network of another kind')
        return facts(variant)

    monkeypatch.setattr(speed, 'facts', failing)
    record = cost.run(['tiny', 'tiny_nafnet'], size=(32, 32), rounds=1, out=tmp_path / 'cost')
    assert [row.get('error') for row in record.rows] == ['a network of another kind', None]
    assert record.rows[1]['latency_ms'] > 0


def test_a_system_that_would_take_too_long_is_counted_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = []

    def timed(network: Any, variant: speed.Variant, device: Any, rounds: int) -> list[float]:
        sides.append(variant.height)
        return [0.5] * rounds

    monkeypatch.setattr(cost, 'timed', timed)
    monkeypatch.setattr(speed, 'peak_memory', lambda *_: {'peak_memory_mib': 1.0})
    out = tmp_path / 'cost'
    # 16 times the pixels of the small image, so about 8 s.
    assert commands.run('cost', ['tiny'], size=(256, 256), limit=7, out=out) == 0
    (row,) = rows_of(out)
    assert sides == [64]
    assert row['not_run'] == 'not run: a call takes about 0:00:08 (--limit 7)'
    assert row['multiply_adds']
    assert not {'latency_ms', 'peak_memory_mib', 'error'} & row.keys()
    assert row['not_run'] in out.with_suffix('.md').read_text()
    assert commands.run('cost', ['tiny'], size=(256, 256), limit=9, out=tmp_path / 'longer') == 0
    assert rows_of(tmp_path / 'longer')[0]['latency_ms'] == 500
    assert sides == [64, 64, 256]


def test_every_row_is_saved_before_the_next_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / 'cost'
    facts = speed.facts

    def stopping(variant: speed.Variant) -> dict[str, Any]:
        if variant.model == 'tiny_nafnet':
            raise KeyboardInterrupt
        return facts(variant)

    monkeypatch.setattr(speed, 'facts', stopping)
    settings: dict[str, Any] = {'size': (32, 32), 'no_latency': True, 'out': out}
    with pytest.raises(KeyboardInterrupt):
        cost.run(['tiny', 'tiny_nafnet'], **settings)
    assert [row['model'] for row in rows_of(out)] == ['tiny']
    monkeypatch.setattr(speed, 'facts', facts)
    resumed = cost.run(['tiny', 'tiny_nafnet'], **settings, resume=True)
    assert [row['model'] for row in resumed.rows] == ['tiny', 'tiny_nafnet']


def test_ipt_counts_the_same_in_one_batch_of_patches() -> None:
    small: dict[str, Any] = {'n_feats': 8, 'num_layers': 1, 'num_heads': 4, 'num_queries': 1}
    network: Any = zoo.create_on_meta('ipt', **small)
    network.join_batches()
    assert network.crop_batch_size > 64_000
    joined = complexity.multiply_adds('ipt', 96, 100, **small)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(network), 'join_batches', lambda self: None)
        assert complexity.multiply_adds('ipt', 96, 100, **small, crop_batch_size=3) == joined


def test_reported_results_keep_the_limits_and_their_order() -> None:
    for entry in challenge.LEADERBOARD:
        assert entry.parameters is None or entry.parameters * 1e6 <= challenge.MOST_PARAMETERS
        assert entry.macs is None or entry.macs * 1e9 <= challenge.MOST_MACS
        assert entry.source
    for name in ('NTIRE 2026', 'AIM 2025'):
        scores = [entry.psnr for entry in challenge.LEADERBOARD if entry.challenge == name]
        assert scores == sorted(scores, reverse=True)
