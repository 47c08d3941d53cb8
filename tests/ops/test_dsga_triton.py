"""The kernels for a GPU, without one: in Triton's interpreter, and compiled for a Hopper GPU but not run."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from dsgformer_arch.archs.dsgformer_arch import DSGA
from dsgformer_arch.ops import dsga
from tests.ops.test_dsga import SWITCHES, _block, _error, _image

pytest.importorskip('triton', reason='Triton is not installed')

SHARED_MEMORY = 227 << 10
"""Bytes that a program can have on compute capability 9.0, by the CUDA C++ Programming Guide."""

LEVELS = [(48, 1), (96, 2), (192, 4), (384, 8), (96, 1)]
"""C and heads of the blocks of the paper's network."""

SIZES = [(1, 24, 16), (2, 20, 9), (1, 33, 35), (1, 5, 3)]
"""N, H and W: whole blocks, several images, an odd size of more than one segment, less than a block."""


@pytest.fixture
def interpreted() -> ModuleType:
    """The kernels, which conftest.py has Triton interpret."""
    from dsgformer_arch.ops import dsga_triton

    return dsga_triton


def _restored(module: ModuleType, block: DSGA, X: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode():
        x = X.permute(0, 2, 3, 1).contiguous()
        return module.restored(x.to(dtype), x, dsga.Weights.of(block, dtype)).permute(0, 3, 1, 2)


@pytest.mark.parametrize('strip', [1, 1 << 30])
@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize(('channels', 'heads'), [(48, 1), (32, 2), (16, 1), (144, 3)])
def test_equals_the_literal_form(
    interpreted: ModuleType,
    channels: int,
    heads: int,
    size: tuple[int, int, int],
    strip: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(dsga.STRIP_BYTES, 'cpu', strip)
    block, X = _block(channels, heads), _image(size[0], channels, *size[1:])
    with torch.inference_mode():
        exact = block.literal(X)
    assert _error(_restored(interpreted, block.float(), X.float(), torch.float32), exact) < 1e-6


@pytest.mark.parametrize('switches', SWITCHES)
def test_every_switch(interpreted: ModuleType, switches: tuple[str, str, str]) -> None:
    block, X = _block(48, 1, switches), _image(1, 48, 13, 9)
    with torch.inference_mode():
        exact = block.literal(X)
    assert _error(_restored(interpreted, block.float(), X.float(), torch.float32), exact) < 1e-6


def test_ties_are_kept(interpreted: ModuleType) -> None:
    block = _block(32, 1, ('dtsas', 'relu2', 'gelu'))
    with torch.no_grad():
        for weight in (block.project_in.weight, block.depthwise.weight):
            K = weight[32:64]
            K.copy_(K[:8].repeat(4, *(1 for _ in K.shape[1:])))  # each score of a row four times
    X = _image(1, 32, 16, 16)
    with torch.inference_mode():
        exact = block.literal(X)
    assert _error(_restored(interpreted, block.float(), X.float(), torch.float32), exact) < 1e-6


@pytest.mark.parametrize(('channels', 'heads'), [(48, 1), (144, 3)])
def test_float16_is_no_worse_than_the_literal_form(
    interpreted: ModuleType, channels: int, heads: int
) -> None:
    """The rounding is where bfloat16's is, of whose products the interpreter (Triton 3.7) knows nothing."""
    block, X = _block(channels, heads), _image(1, channels, 24, 19)
    with torch.inference_mode():
        exact = block.literal(X)
        half = copy.deepcopy(block).half().literal(X.half())
    assert _error(_restored(interpreted, block.float(), X.half(), torch.float16), exact) < _error(half, exact)


def test_the_residual_keeps_its_type(interpreted: ModuleType) -> None:
    block, X = _block(48, 1), _image(1, 48, 8, 8)
    with torch.inference_mode():
        exact = block.literal(X)
    y = _restored(interpreted, block.float(), X.float(), torch.float16)
    assert y.dtype == torch.float32
    assert _error(y, exact) < 1e-3


def test_the_trial_tells_right_from_wrong(interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    works = interpreted._works.__wrapped__
    arguments = (torch.device('cpu'), torch.float16, 32, 2)
    assert works(*arguments)
    monkeypatch.setattr(interpreted, 'output', lambda strip, taps, attention, weights, residual, y: y.zero_())
    assert not works(*arguments)
    monkeypatch.delattr(interpreted, 'output')
    assert not works(*arguments)


def test_takes_only_what_it_can(interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreted, '_works', lambda *_: True)

    def suits(channels: int, heads: int, dtype: torch.dtype, device: str = 'cuda') -> bool:
        x = SimpleNamespace(shape=(1, 8, 8, channels), dtype=dtype, device=torch.device(device))
        return interpreted.suits(x, SimpleNamespace(heads=heads))

    assert all(suits(*level, torch.bfloat16) for level in LEVELS)
    assert not suits(48, 1, torch.bfloat16, 'cpu')
    assert not suits(48, 1, torch.float32)
    assert not suits(24, 1, torch.bfloat16)  # no multiple of what is taken at once
    assert not suits(256, 1, torch.bfloat16)  # too wide a head


@pytest.mark.parametrize(
    ('channels', 'heads', 'switches'),
    [*((*level, SWITCHES[0]) for level in LEVELS), (48, 1, ('mdta', 'softmax', 'simplegate'))],
)
def test_compiles_for_a_hopper_gpu(
    channels: int, heads: int, switches: tuple[str, str, str], tmp_path: Path
) -> None:
    """With the arguments of the real calls: what the interpreter does not check."""
    done = subprocess.run(
        [sys.executable, '-m', 'tests.ops.compile_for_hopper', str(channels), str(heads), *switches],
        env=os.environ | {'TRITON_INTERPRET': '0', 'TRITON_CACHE_DIR': str(tmp_path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)
    assert set(kernels) == {'_gram', '_map', '_output'}
    for kernel in kernels.values():
        assert kernel['code'] > 0
        assert kernel['shared'] <= SHARED_MEMORY
