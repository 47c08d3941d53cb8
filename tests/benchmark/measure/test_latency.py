"""Latency of exported files: every backend is measured in turn, and what fails says why."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsgformer_arch.benchmark import record as records
from dsgformer_arch.benchmark.measure import latency
from dsgformer_arch.benchmark.render import latency as render
from dsgformer_arch.export import FORMATS, formats
from dsgformer_arch.utils.errors import UserError

needs_runtimes = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, (*FORMATS['onnx'].requires, *FORMATS['openvino'].requires))),
    reason='the packages of the extra `export` are not installed',
)


@pytest.fixture(autouse=True)
def one_call_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency.speed, 'SECONDS_A_TURN', 0)


@needs_runtimes
@pytest.mark.long
def test_every_backend_of_a_system_is_measured(tmp_path: Path) -> None:
    chosen = ['pytorch', 'pytorch-nhwc', 'pytorch-bf16', 'onnxruntime', 'openvino', 'openvino-bf16']
    record = latency.run(
        ['tiny_nafnet'], [(16, 24), (17, 17)], backends=chosen, rounds=2, out=tmp_path / 'latency'
    )
    assert [(row['backend'], row['size']) for row in record.rows] == [
        (name, size) for size in ('16x24', '17x17') for name in chosen
    ]
    assert not [row['error'] for row in record.rows if 'error' in row]
    assert all(0 < row['least_ms'] <= row['latency_ms'] for row in record.rows)
    assert records.Record.load(tmp_path / 'latency.json').rows == record.rows
    text = render.RENDERING.page(record)
    assert '| tiny_nafnet | 17×17 |' in text


def test_backends_compute_what_the_network_computes(tmp_path: Path) -> None:
    network: Any = latency.zoo.create('tiny_nafnet').eval()
    image = np.random.default_rng(0).random((1, 3, 16, 24), np.float32)
    calls, failed = latency.prepared(network, 'tiny_nafnet', ['pytorch', 'pytorch-nhwc'], 1, tmp_path)
    assert not failed
    a, b = (np.asarray(calls[name](image)) for name in ('pytorch', 'pytorch-nhwc'))
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    expected = network(latency.torch.from_numpy(image)).detach().numpy()
    np.testing.assert_allclose(a, expected, rtol=0, atol=1e-5)


def test_what_cannot_be_exported_has_an_error_and_the_others_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, 'check_target', _refuses)
    record = latency.run(
        ['tiny_nafnet'], [(16, 16)], backends=['pytorch', 'onnxruntime'], rounds=1, out=tmp_path / 'latency'
    )
    ours, theirs = record.rows
    assert ours['latency_ms'] > 0
    assert 'needs the package onnx' in theirs['error']
    assert 'latency_ms' not in theirs
    again = latency.run(
        ['tiny_nafnet'], [(16, 16)], backends=['pytorch', 'onnxruntime'], rounds=1,
        out=tmp_path / 'latency', resume=True,
    )  # fmt: skip
    assert again.rows == record.rows


def _refuses(*arguments: Any) -> Any:
    raise UserError('ONNX needs the package onnx')


def test_wrong_usage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no 'onnx'; choose from pytorch"):
        latency.run(['tiny_nafnet'], backends=['onnx'], out=tmp_path / 'a')
    with pytest.raises(UserError, match='backends of the CPU'):
        latency.run(['tiny_nafnet'], device='cuda', out=tmp_path / 'a')


def test_the_page_says_where_another_runtime_is_faster() -> None:
    def row(backend: str, time: float | None, **more: Any) -> dict[str, Any]:
        found = {'model': 'a', 'size': '8x9', 'backend': backend, **more}
        found['precision'] = latency.BACKENDS[backend].precision
        return found if time is None else {**found, 'latency_ms': time, 'spread': 0.1}

    rows = [
        row('pytorch', 20.0), row('pytorch-nhwc', 10.0), row('onnxruntime', 8.0), row('openvino', 12.0),
        row('pytorch-bf16', 5.0), row('openvino-bf16', None, error='no'),
    ]  # fmt: skip
    settings = {'backends': [row['backend'] for row in rows], 'threads': 2}
    record = records.Record('latency', 'x', settings, 'p', records.environment(), rows)
    assert render.ahead(record) == ['a, 8×9, fp32: onnxruntime takes 0.80 of the time of PyTorch.']
    table = render.RENDERING.table(record).splitlines()
    times = [f'{time} (±5 %)' for time in ('20.0 ms', '10.0 ms', '8.0 ms', '12.0 ms', '**5.0 ms**')]
    assert table[-1] == f'| a | 8×9 | {" | ".join(times)} | no |'
    assert 'onnxruntime takes 0.80' in render.RENDERING.page(record)
