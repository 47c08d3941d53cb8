from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from dsgformer_arch.benchmark import commands
from dsgformer_arch.benchmark.measure import ablation, learning
from dsgformer_arch.benchmark.render import ablation as render_ablation
from dsgformer_arch.metrics.protocols import to_uint8
from dsgformer_arch.metrics.psnr_ssim import psnr_rgb, ssim_matlab_rgb
from dsgformer_arch.metrics.realblur import psnr_realblur, ssim_realblur
from dsgformer_arch.utils.errors import UserError
from tests.benchmark.conftest import make

QUICK: dict[str, Any] = {
    'model': 'tiny',
    'iterations': 1,
    'seeds': 1,
    'batch': 1,
    'patch': 16,
    'validations': 1,
}
VARIANTS = list(
    itertools.product(('dtsas', 'mdta'), ('simplegate', 'gelu', 'dfgb'), ('relu', 'relu2', 'softmax'))
)


def rows_of(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(out.with_suffix('.json').read_text())['rows']
    return rows


def test_all_eighteen_variants_are_trained_once_and_resume_trains_none(
    sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / 'r' / 'ablation'
    assert commands.run('ablation', str(sample), out=out, **QUICK) == 0
    rows = rows_of(out)
    assert [(row['attention'], row['gate'], row['score']) for row in rows] == VARIANTS
    assert all(row['psnr'] > 0 and row['iterations'] == 1 for row in rows)
    assert len({row['psnr'] for row in rows}) > 9, 'the switches change the network'
    assert cv2.imread(str(out.with_suffix('.png'))) is not None
    monkeypatch.setattr(learning, 'train', lambda *_: pytest.fail('trained again'))
    assert commands.run('ablation', str(sample), out=out, resume=True, **QUICK) == 0
    assert rows_of(out) == rows


def test_a_variant_that_fails_is_reported(
    sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def train(*_: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError('went wrong')
        return {'psnr': 25.0, 'ssim': 0.5}

    monkeypatch.setattr(learning, 'train', train)
    out = tmp_path / 'ablation'
    assert commands.run('ablation', str(sample), out=out, **QUICK) == 1
    assert len(calls) == 18
    assert [row.get('error') for row in rows_of(out)].count('went wrong') == 1


def test_other_systems_have_nothing_to_vary(sample: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match='nafnet32 has no switches'):
        commands.run('ablation', str(sample), **{**QUICK, 'model': 'nafnet32'}, out=tmp_path / 'a')


def test_the_table_says_whose_numbers_are_whose() -> None:
    lines = render_ablation.RENDERING.table(make('ablation')).splitlines()
    paper, ours = lines[2:5], lines[5:]
    assert paper[0] == '| **the paper** (RealBlur-J) | DTSAS | SimpleGate | 30.29 | 31.61 | 30.76 |'
    assert paper[1] == '| **the paper** (RealBlur-J) | DTSAS | GELU | 30.09 | 31.56 | 30.89 |'
    assert paper[2] == '| **the paper** (RealBlur-J) | DTSAS | DFGB |  |  |  |'
    assert len(ours) == 6
    assert all(line.startswith('| this run |') for line in ours)
    assert ours[2] == '| this run | DTSAS | DFGB |  | 27.00 ± 0.50 |  |'


def test_the_ablation_under_realblurs_protocol(
    sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PSNR and SSIM of the held-out images after RealBlur's alignment, as the paper's table 2 has them."""
    monkeypatch.setattr(ablation, 'ATTENTIONS', ('dtsas',))
    monkeypatch.setattr(ablation, 'GATES', ('dfgb',))
    monkeypatch.setattr(ablation, 'SCORES', ('relu2',))
    trained = []
    validate = learning.validate

    def keep(network: nn.Module, *rest: Any) -> dict[str, float]:
        trained.append(network)
        return validate(network, *rest)

    monkeypatch.setattr(learning, 'validate', keep)
    out = tmp_path / 'r' / 'ablation'
    assert commands.run('ablation', str(sample), out=out, protocol='realblur', **QUICK) == 0
    (row,) = rows_of(out)
    record = json.loads(out.with_suffix('.json').read_text())
    aligned: dict[str, list[tuple[float, float]]] = {'blurred': [], 'restored': [], 'unaligned': []}
    for sharp, blurred in zip(*learning.read(sample, 16).test, strict=True):
        x = torch.from_numpy(blurred.copy()).permute(2, 0, 1)[None] / 255
        restored = to_uint8(trained[0].eval()(x))
        for name, image in (('blurred', blurred), ('restored', restored)):
            bgr = [np.ascontiguousarray(i[..., ::-1]) for i in (image, sharp)]
            aligned[name].append((psnr_realblur(*bgr), ssim_realblur(*bgr)))
            if name == 'restored':
                aligned['unaligned'].append((psnr_rgb(*bgr), ssim_matlab_rgb(*bgr)))
    means = {name: np.mean(scores, axis=0) for name, scores in aligned.items()}
    assert [row['psnr'], row['ssim']] == pytest.approx(means['restored'], abs=1e-3)
    assert [record['extra']['blurred'][k] for k in ('psnr', 'ssim')] == pytest.approx(means['blurred'])
    assert abs(row['psnr'] - means['unaligned'][0]) > 0.01
    assert record['settings']['protocol'] == 'realblur'
    assert 'under the protocol `realblur`' in out.with_suffix('.md').read_text()
    with pytest.raises(UserError, match=r'made with other settings \(protocol\)'):
        commands.run('ablation', str(sample), out=out, resume=True, **QUICK)


def test_an_unknown_protocol(sample: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match='no protocol gorpo; choose one of gopro, hide, realblur'):
        commands.run('ablation', str(sample), out=tmp_path / 'a', protocol='gorpo', **QUICK)
    assert not (tmp_path / 'a.json').exists()
