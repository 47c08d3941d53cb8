"""The measured ceilings, and the times that follow from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsgformer_arch.benchmark import commands
from dsgformer_arch.benchmark.measure import roofline, speed
from dsgformer_arch.benchmark.measure.roofline import Rates, least_traffic
from dsgformer_arch.benchmark.render import speed as render_speed

CPU = torch.device('cpu')


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(roofline.SIDE, 'cpu', 64)
    monkeypatch.setitem(roofline.COPIED, 'cpu', 1 << 16)


def test_rates_are_work_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, '_least', lambda call, device: call() is not None and 2.0)
    rates = roofline.measure(CPU, ['bf16'])
    assert rates['bf16'] == Rates(operations=2 * 64**3 / 2.0, bytes=2 * (1 << 16) / 2.0)


def test_the_best_run_counts_and_the_first_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0, 1, 10, 19, 20, 27, 30, 38, 40, 49, 50, 59])  # the first is the shortest
    monkeypatch.setattr(roofline.time, 'perf_counter', lambda: next(clock))
    assert roofline._least(lambda: None, CPU) == 7


def test_the_floor_is_the_larger_time() -> None:
    rates = Rates(operations=100.0, bytes=10.0)
    assert rates.floor(multiply_adds=100, traffic=10) == 2.0
    assert rates.floor(multiply_adds=100, traffic=50) == 5.0


def test_traffic_of_the_blocks() -> None:
    # TINY: width 4, one block a level: 4, 8, 16 and 32 channels down, 16, 8 and 8 up.
    pixels = [(4, 1), (8, 4), (16, 16), (32, 64), (16, 16), (8, 4), (8, 1)]
    expected = sum(3 * channels * 32 * 48 // fraction for channels, fraction in pixels)
    assert least_traffic('tiny', 32, 48, 'fp32') == 4 * expected
    assert least_traffic('tiny', 32, 48, 'bf16') == 2 * expected
    assert least_traffic('tiny_nafnet', 32, 48, 'fp32') == 0


@pytest.mark.parametrize('train', [False, True])
def test_a_run_compares_with_it(
    tmp_path: Path, train: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(speed, 'SECONDS_A_TURN', 0.0)
    monkeypatch.setattr(
        roofline, 'measure', lambda device, precisions: dict.fromkeys(precisions, Rates(1e9, 1e9))
    )
    out = tmp_path / 's'
    arguments = {'size': [(32, 32)], 'rounds': 1, 'no_memory': True, 'batch': 2, 'train': train}
    assert commands.run('speed', ['tiny', 'tiny_nafnet'], roofline=True, out=out, **arguments) == 0  # type: ignore[arg-type]
    record = speed.records.Record.load(out.with_suffix('.json'))
    times = 2 * (3 if train else 1)
    for row in record.rows:
        traffic = least_traffic(row['model'], 32, 32, 'fp32')
        assert row['floor_ms'] == pytest.approx(times * max(2 * row['multiply_adds'], traffic) / 1e6)
        assert render_speed.over_the_roofline(row) == f'{row["latency_ms"] / row["floor_ms"]:.1f}'
    monkeypatch.setattr(roofline, 'measure', lambda *_: pytest.fail('measured again'))
    assert (
        commands.run('speed', ['tiny', 'tiny_nafnet'], roofline=True, out=out, resume=True, **arguments) == 0
    )  # type: ignore[arg-type]
    page = out.with_suffix('.md').read_text()
    assert '0.001 TFLOP/s' in page
    assert 'times the roofline' in page
    assert 'times the roofline' in capsys.readouterr().out
