"""The Python blocks of docs/other-tools.md and docs/export.md run, in their order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from dsgformer_arch.cli import dsgformer
from tests.export.test_export import needs_runtime

DOCS = Path(__file__).resolve().parents[2] / 'docs'


def blocks(page: str) -> list[str]:
    return re.findall(r'^```python\n(.*?)^```$', (DOCS / page).read_text(encoding='utf-8'), re.M | re.S)


def run(page: str, number: int, names: dict[str, Any]) -> None:
    exec(compile(blocks(page)[number], f'{page}, block {number + 1}', 'exec'), names)


def test_other_tools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    page = 'other-tools.md'
    names: dict[str, Any] = {}
    assert len(blocks(page)) == 5
    run(page, 0, names)
    assert type(names['network']).__name__ == 'DSGformer'
    assert 'license: apache-2.0' in Path('my-dsgformer/README.md').read_text(encoding='utf-8')
    run(page, 1, names)
    assert 'is of a DSGformer, not of a NAFNet' in capsys.readouterr().out
    run(page, 2, names)
    assert names['restored'].shape == (1, 3, 100, 150)
    by_tensors = names['model']
    run(page, 3, names)
    image = torch.rand(1, 3, 32, 48)
    torch.testing.assert_close(names['model'](image), by_tensors(image))
    assert names['model'].model.settings['ratios'] == ('1/8', '1/4', '1/3', '1/2')
    run(page, 4, names)
    assert names['restored'].shape == names['images'].shape


@needs_runtime
@pytest.mark.long
def test_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    photo = np.random.default_rng(0).integers(0, 256, (45, 70, 3), np.uint8)
    cv2.imwrite('photo.png', photo)
    assert dsgformer.main(['export', 'dsgformer_h', '-o', 'dsgformer_h.onnx']) == 0
    page = 'export.md'
    assert len(blocks(page)) == 3
    run(page, 0, {})
    assert cv2.imread('restored.png').shape == photo.shape
    names: dict[str, Any] = {}
    run(page, 1, names)  # for pnnx
    assert torch.jit.load('nafnet32.pt')(torch.rand(1, 3, 64, 64)).shape == (1, 3, 64, 64)
    run(page, 2, names)
    assert names['done'].difference <= 1e-4
