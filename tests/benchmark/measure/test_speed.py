from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
from torch import Tensor, nn

from dsgformer_arch import zoo
from dsgformer_arch.benchmark import commands
from dsgformer_arch.benchmark.measure import speed
from dsgformer_arch.benchmark.measure.complexity import Complexity, multiply_adds
from dsgformer_arch.benchmark.measure.speed import resident_peak_mib
from dsgformer_arch.benchmark.render import speed as render_speed
from dsgformer_arch.restore import restore
from dsgformer_arch.utils.errors import UserError
from tests.benchmark.conftest import Greedy, make, speed_row

CPU = torch.device('cpu')
QUICK: dict[str, Any] = {'size': [(32, 48)], 'rounds': 2, 'no_memory': True}


@pytest.fixture(autouse=True)
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, 'SECONDS_A_TURN', 0.0)


def record_of(out: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(out.with_suffix('.json').read_text())
    return record


def test_a_row_has_everything_that_was_asked_for(tmp_path: Path) -> None:
    out = tmp_path / 'r' / 'speed'
    assert commands.run('speed', ['tiny', 'tiny_nafnet'], out=out, **QUICK) == 0
    rows = record_of(out)['rows']
    assert [row['model'] for row in rows] == ['tiny', 'tiny_nafnet']
    for row in rows:
        assert row['size'] == '32x48'
        assert row['parameters'] == zoo.get(row['model']).parameters
        assert row['multiply_adds'] == multiply_adds(row['model'], 32, 48)
        assert row['latency_ms'] > 0
        assert row['spread'] >= 0
        assert row['megapixels_per_second'] == pytest.approx(32 * 48 / row['latency_ms'] / 1e3)
    assert '| tiny_nafnet | 32×48 | fp32 |' in out.with_suffix('.md').read_text()
    assert cv2.imread(str(out.with_suffix('.png'))) is not None


@pytest.mark.parametrize(
    ('variable', 'name'),
    [('DSGFORMER_PLAIN', 'reference implementations'), ('DSGFORMER_EAGER', 'no compiled kernels')],
)
def test_a_forced_implementation_is_in_title_and_command(
    variable: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / 'speed'
    monkeypatch.setenv(variable, '1')
    commands.run('speed', ['tiny'], out=out, **QUICK)
    text = out.with_suffix('.md').read_text()
    assert text.startswith(f'# Speed of restoring: cpu, fp32, {name}, 32×48\n')
    assert f'    {variable}=1 python ' in text
    monkeypatch.delenv(variable)
    with pytest.raises(UserError, match=r'other settings \(implementation\)'):
        commands.run('speed', ['tiny'], out=out, resume=True, **QUICK)


def test_systems_are_measured_alternately(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    prepare = speed.prepare

    def named(network: nn.Module, variant: speed.Variant, *rest: Any) -> Any:
        call = prepare(network, variant, *rest)
        call.__dict__['model'] = variant.model
        return call

    def clock(call: Any, device: torch.device) -> float:
        order.append(call.model)
        return 1.0

    monkeypatch.setattr(speed, 'prepare', named)
    monkeypatch.setattr(speed, 'clock', clock)
    commands.run('speed', ['tiny', 'tiny_nafnet'], out=tmp_path / 's', **{**QUICK, 'rounds': 3})
    assert order == ['tiny', 'tiny_nafnet'] * 3


def test_medians_and_spreads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.2, 0.1, 0.6, 0.3, 0.4])
    monkeypatch.setattr(speed, 'clock', lambda call, device: next(times))
    commands.run('speed', ['tiny'], out=tmp_path / 's', **{**QUICK, 'rounds': 5, 'batch': 2})
    (row,) = record_of(tmp_path / 's')['rows']
    assert row['latency_ms'] == pytest.approx(300)
    assert row['spread'] == pytest.approx(0.5 / 0.3)
    assert row['megapixels_per_second'] == pytest.approx(2 * 32 * 48 / 0.3 / 1e6)


def test_a_turn_repeats_fast_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def call() -> None:
        now[0] += 0.1

    monkeypatch.setattr(speed.time, 'perf_counter', lambda: now[0])
    monkeypatch.setattr(speed, 'SECONDS_A_TURN', 0.95)
    assert speed.clock(call, CPU) == pytest.approx(0.1)
    assert now[0] == pytest.approx(1.0)


def test_ratios_are_to_the_first_system_at_the_same_size() -> None:
    rows = [
        speed_row('a', 100.0), speed_row('b', 250.0), speed_row('a', 400.0, '512x512'),
        speed_row('b', 200.0, '512x512'), speed_row('c', None, error='x'), speed_row('b', 9.0, '64x64'),
    ]  # fmt: skip
    assert render_speed.ratios(rows, 'a') == [1.0, 2.5, 1.0, 0.5, None, None]


def test_with_several_modes_ratios_are_to_the_fastest_of_the_first() -> None:
    rows = [speed_row('a', 100.0), speed_row('a', 50.0, channels_last=True), speed_row('b', 75.0)]
    assert render_speed.ratios(rows, 'a') == [2.0, 1.0, 1.5]


@pytest.mark.parametrize('exponent', [1.0, 1.5, 2.0])
def test_growth_of_synthetic_rows_is_exact(exponent: float) -> None:
    rows = [
        speed_row(
            'a', 3.0 * (side * 2 * side) ** exponent, f'{side}x{2 * side}', peak_memory_mib=7.0 * side**2
        )
        for side in (16, 32, 64, 256)
    ]
    fit = speed.growth([*rows, speed_row('b', 1.0)], 'a')
    assert fit['latency_ms'] == pytest.approx(exponent)
    assert fit['peak_memory_mib'] == pytest.approx(1.0)
    assert speed.growth(rows[:1], 'a') == {}


def test_scaling_sweeps_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, 'SWEEP', (16, 24, 32))
    out = tmp_path / 's'
    assert commands.run('speed', ['tiny'], scaling=True, rounds=1, no_memory=True, out=out) == 0
    record = record_of(out)
    assert [row['size'] for row in record['rows']] == ['16x16', '24x24', '32x32']
    assert math.isfinite(record['extra']['growth']['tiny']['latency_ms'])
    assert 'Growth with the number of pixels' in out.with_suffix('.md').read_text()


def test_best_tries_all_modes(tmp_path: Path) -> None:
    out = tmp_path / 's'
    assert commands.run('speed', ['tiny'], best=True, precision='bf16', out=out, **QUICK) == 0
    modes = [(row['precision'], row['channels_last']) for row in record_of(out)['rows']]
    assert modes == [('fp32', False), ('fp32', True), ('bf16', False), ('bf16', True)]


def test_a_training_step_updates_the_weights(tmp_path: Path) -> None:
    network = zoo.create('tiny')
    before = {key: value.clone() for key, value in network.state_dict().items()}
    step = speed.prepare(network, speed.Variant('tiny', 32, 32), CPU, batch=2, train=True)
    step()
    after = network.state_dict()
    assert network.training
    assert sum(not torch.equal(before[key], after[key]) for key in before) > len(before) // 2
    assert commands.run('speed', ['tiny'], train=True, precision='bf16', out=tmp_path / 's', **QUICK) == 0
    assert 'latency_ms' in record_of(tmp_path / 's')['rows'][0]


def test_restoring_leaves_no_gradients_and_the_mode_as_it_was() -> None:
    network = zoo.create('tiny').train()
    speed.prepare(network, speed.Variant('tiny', 32, 32, channels_last=True), CPU, 1, False)()
    assert network.training
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_system_that_fails_is_reported_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = zoo.create
    monkeypatch.setattr(zoo, 'create', lambda name, **s: Greedy() if name == 'tiny' else create(name, **s))
    monkeypatch.setattr(speed, 'count', lambda *_: Complexity(10, 0, 0))
    out = tmp_path / 's'
    assert commands.run('speed', ['tiny', 'tiny_nafnet'], out=out, **QUICK) == 1
    tiny, other = record_of(out)['rows']
    assert tiny['error'] == 'does not fit in memory'
    assert 'latency_ms' not in tiny
    assert other['latency_ms'] > 0
    assert '| does not fit in memory |' in out.with_suffix('.md').read_text()


def test_a_system_that_fails_in_its_second_turn_has_no_latency(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocked = []

    def clock(call: Any, device: torch.device) -> float:
        clocked.append(1)
        if len(clocked) == 3:
            raise RuntimeError('went wrong')
        return 1.0

    monkeypatch.setattr(speed, 'clock', clock)
    assert commands.run('speed', ['tiny', 'tiny_nafnet'], out=tmp_path / 's', **{**QUICK, 'rounds': 3}) == 1
    tiny, other = record_of(tmp_path / 's')['rows']
    assert (tiny['error'], 'latency_ms' in tiny) == ('went wrong', False)
    assert other['latency_ms'] == pytest.approx(1000)
    assert len(clocked) == 5, 'it is not called again'


def test_resume_measures_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / 's'
    commands.run('speed', ['tiny'], out=out, **QUICK)
    rows = record_of(out)['rows']
    monkeypatch.setattr(speed, 'measure', lambda *_: pytest.fail('measured again'))
    assert commands.run('speed', ['tiny'], out=out, resume=True, **QUICK) == 0
    assert record_of(out)['rows'] == rows
    with pytest.raises(UserError, match=r'other settings \(precision\)'):
        commands.run('speed', ['tiny'], out=out, resume=True, precision='bf16', **QUICK)


def test_peak_memory_is_of_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    found = speed.peak_memory(speed.Variant('dsgformer_t', 16, 16), CPU, batch=1, train=False)
    assert found['peak_memory_mib'] > 50
    done = speed.subprocess.CompletedProcess([], -9, '', '')
    monkeypatch.setattr(speed.subprocess, 'run', lambda *_, **__: done)
    killed = speed.peak_memory(speed.Variant('dsgformer_t', 16, 16), CPU, batch=1, train=False)
    assert killed == {'peak_memory_mib': None, 'memory_note': 'ended by the system'}


def test_a_process_that_runs_out_of_memory_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, 'create', lambda name: Greedy())
    task = {
        **speed.Variant('tiny', 16, 16).__dict__,
        'device': 'cpu',
        'batch': 1,
        'train': False,
        'threads': 1,
        'keep_memory': False,
    }
    assert speed.peak_memory_here(task) == {
        'peak_memory_mib': None, 'memory_note': 'does not fit in memory',
    }  # fmt: skip


def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='--device cuda:99'):
        commands.run('speed', ['tiny'], device='cuda:99', out=tmp_path / 's')


def test_the_table_names_what_distinguishes_rows() -> None:
    rows = [speed_row('a', 1.0), speed_row('a', 2.0, '512x512', channels_last=True)]
    assert render_speed.labels(rows) == ['a 256x256 fp32', 'a 512x512 fp32, channels-last']
    assert render_speed.labels([speed_row('a', 1.0), speed_row('b', 1.0)]) == ['a', 'b']
    line = render_speed.RENDERING.table(make('speed')).splitlines()[-1]
    assert '| restormer | 256×256 | fp32 | 2.00 M | 3.0 G | 500.0 ms | 10 % | 2.50 |' in line


def test_resident_peak_is_this_processs_own() -> None:
    """A child of a large process does not report its parent's peak."""
    ballast = bytearray(600 << 20)
    program = 'from dsgformer_arch.benchmark.measure.speed import resident_peak_mib as peak; a = peak(); '
    program += 'b = bytearray(64 << 20); print(a, peak())'
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split()[-2:])
    own = resident_peak_mib()
    assert len(ballast) == 600 << 20
    assert before < own - 100
    assert 48 < after - before < 128


def test_keeping_memory_is_asked_for_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(speed, 'keep_freed_memory', lambda: asked.append(True) or len(asked) == 1)
    for keep, sentence in ((False, 'left to the C library'), (True, 'kept for the next tensors')):
        out = tmp_path / str(keep)
        assert commands.run('speed', ['tiny'], keep_memory=keep, out=out, **QUICK) == 0
        assert f'Freed memory is {sentence}.' in out.with_suffix('.md').read_text()
        assert record_of(out)['settings']['keep_memory'] is keep
    assert len(asked) == 1
    with pytest.raises(UserError, match='--keep-memory needs glibc'):
        commands.run('speed', ['tiny'], keep_memory=True, out=tmp_path / 'again', **QUICK)


def test_cuda_graphs_are_for_restoring_on_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='--cuda-graphs'):
        commands.run('speed', ['tiny'], cuda_graphs=True, out=tmp_path / 's')
    assert not list(tmp_path.iterdir())


def test_cuda_graphs_have_rows_and_networks_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    networks: list[nn.Module] = []

    class Graphs:
        def __init__(self, network: nn.Module, precision: str) -> None:
            networks.append(network)
            self.network = network

        def __call__(self, image: Tensor) -> Tensor:
            return restore(self.network, image)

    monkeypatch.setattr(speed, 'CudaGraphs', Graphs)
    variants = speed.expand(['tiny'], 16, 16, 'fp32', False, False, best=True, cuda_graphs=True)
    rows = speed.measure(variants, CPU, batch=1, train=False, rounds=1, memory=False)
    assert [(row['channels_last'], row['cuda_graph']) for row in rows] == [
        (False, False), (False, True), (True, False), (True, True),
    ]  # fmt: skip
    assert len({id(network) for network in networks}) == 2
    assert render_speed.mode(rows[3]) == 'fp32, channels-last, CUDA graph'
    assert all(row['latency_ms'] > 0 for row in rows)
