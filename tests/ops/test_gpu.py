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
from torch._subclasses.fake_tensor import FakeTensorMode

from dsgformer_arch import ops
from dsgformer_arch.archs.dsgformer_arch import DSGA, DSGformer
from dsgformer_arch.ops import block as dispatch
from dsgformer_arch.ops import eager
from tests.ops.test_block import SWITCHES, _block, _block_with_ties, _error, _image

pytest.importorskip('triton', reason='Triton is not installed')

SHARED_MEMORY = 227 << 10
"""Bytes that a program can have on compute capability 9.0, by the CUDA C++ Programming Guide."""

LEVELS = [(48, 1), (96, 2), (192, 4), (384, 8), (96, 1)]
"""C and heads of the blocks of the paper's network."""

SIZES = [(2, 16, 9), (1, 17, 19), (1, 5, 3)]
"""N, H and W: several images, an odd size of more than one segment and block, less than a block."""


@pytest.fixture
def interpreted() -> ModuleType:
    """The kernels, which conftest.py has Triton interpret where there is no GPU."""
    import triton

    if not triton.knobs.runtime.interpret:
        pytest.skip('Triton does not interpret its kernels here, as there is a GPU')
    from dsgformer_arch.ops import gpu

    return gpu


def _restored(module: ModuleType, block: DSGA, X: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode():
        x = X.permute(0, 2, 3, 1).contiguous()
        return module.restored(x.to(dtype), x, eager.Weights.of(block, dtype)).permute(0, 3, 1, 2)


def _compare(interpreted: ModuleType, block: DSGA, X: Tensor) -> None:
    """The kernels in float32 against the literal form in float64."""
    with torch.inference_mode():
        exact = block.literal(X)
    assert _error(_restored(interpreted, block.float(), X.float(), torch.float32), exact) < 1e-6


@pytest.mark.parametrize('strip', [1, 1 << 30])
@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize(('channels', 'heads'), [(48, 1), (32, 2), (144, 3)])
def test_equals_the_literal_form(
    interpreted: ModuleType,
    channels: int,
    heads: int,
    size: tuple[int, int, int],
    strip: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(eager.STRIP_BYTES, 'cpu', strip)
    _compare(interpreted, _block(channels, heads), _image(size[0], channels, *size[1:]))


@pytest.mark.parametrize('switches', SWITCHES)
def test_every_switch(interpreted: ModuleType, switches: tuple[str, str, str]) -> None:
    _compare(interpreted, _block(48, 1, switches), _image(1, 48, 13, 9))


def test_ties_are_kept(interpreted: ModuleType) -> None:
    _compare(interpreted, _block_with_ties(), _image(1, 32, 16, 16))


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


@pytest.mark.parametrize('frozen', [False, True])
def test_gradients_equal_the_literal_ones(interpreted: ModuleType, frozen: bool) -> None:
    block, X = _block(48, 1), _image(2, 48, 12, 9)
    inputs = [X.requires_grad_(not frozen), *block.parameters()]
    block.depthwise.requires_grad_(not frozen)
    literal = block.literal(X)
    seed = torch.randn_like(literal)
    theirs = torch.autograd.grad(literal, [value for value in inputs if value.requires_grad], seed)

    block.float()
    residual = X.detach().float().permute(0, 2, 3, 1).contiguous().requires_grad_(not frozen)
    weights = eager.Weights.of(block, torch.float32)
    y = eager.without_activations(interpreted.restored, residual, weights)
    given = [value for value in (residual, *block.parameters()) if value.requires_grad]
    ours = torch.autograd.grad(y, given, seed.permute(0, 2, 3, 1).float())
    for mine, exact in zip(ours, theirs, strict=True):
        mine = mine.permute(0, 3, 1, 2) if mine.shape != exact.shape else mine
        assert _error(mine, exact) < 1e-5


def test_training_keeps_nothing_but_x(interpreted: ModuleType) -> None:
    block, X = _block(32, 2).float(), _image(1, 32, 32, 32).float()
    residual = X.permute(0, 2, 3, 1).contiguous().requires_grad_()
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights = eager.Weights.of(block, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        eager.without_activations(interpreted.restored, residual, weights)
    assert residual.nbytes <= sum(sizes.values()) < 1.3 * residual.nbytes


def test_tensors_without_numbers_take_the_eager_form(
    interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interpreted, 'suits', lambda *_: True)
    with FakeTensorMode():
        x = torch.empty(1, 8, 8, 16, device='cuda', dtype=torch.bfloat16)
    assert dispatch._triton(x, SimpleNamespace(heads=1)) is None  # type: ignore[arg-type]


def test_the_network_restores_and_trains_with_them(
    interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = DSGformer(width=16, num_blocks=(1, 1, 1, 1))
    calls: list[tuple[int, ...]] = []

    def restored(x: Tensor, residual: Tensor, weights: eager.Weights) -> Tensor:
        calls.append(tuple(x.shape))
        return interpreted.restored(x, residual, weights)

    kernels = SimpleNamespace(restored=restored)
    monkeypatch.setattr(dispatch, '_triton', lambda x, weights: kernels)
    monkeypatch.setattr(dispatch, 'computes_in', lambda x, *widths: None)
    image = torch.rand(1, 3, 9, 16)
    with ops.use('plain'):
        literal = network(image)
        theirs = torch.autograd.grad(literal.square().mean(), list(network.parameters()))
    assert not calls
    with torch.inference_mode():
        torch.testing.assert_close(network(image), literal)
    assert len(calls) == 7
    ours = torch.autograd.grad(network(image).square().mean(), list(network.parameters()))
    assert len(calls) == 14
    for mine, exact in zip(ours, theirs, strict=True):
        assert _error(mine, exact.double()) < 1e-4


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
    assert set(kernels) == {'_gram', '_map', '_output', *(['_project'] if channels <= 128 else [])}
    for kernel in kernels.values():
        assert kernel['code'] > 0
        assert kernel['shared'] <= SHARED_MEMORY


@pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU here')
class TestOnAGpu:
    @pytest.mark.parametrize('grad', [False, True])
    @pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(('channels', 'heads'), [*LEVELS, (16, 1)])
    def test_is_no_worse_than_the_literal_form(
        self, channels: int, heads: int, dtype: torch.dtype, grad: bool
    ) -> None:
        from dsgformer_arch.ops import gpu

        block, X = _block(channels, heads).cuda(), _image(2, channels, 45, 70).cuda()
        exact = block.literal(X)
        block.float()
        weights = SimpleNamespace(heads=heads)
        assert gpu.suits(X.permute(0, 2, 3, 1).to(dtype), weights)  # type: ignore[arg-type]
        with torch.set_grad_enabled(grad), torch.autocast('cuda', dtype):
            ours, literal = block(X.to(dtype)), block.literal(X.to(dtype))
        assert ours.dtype == literal.dtype
        assert _error(ours, exact) < 1.2 * _error(literal, exact)

    def test_gradients(self) -> None:
        block, X = _block(48, 1).cuda(), _image(2, 48, 24, 32).cuda()
        theirs = torch.autograd.grad(block.literal(X).square().mean(), list(block.parameters()))
        block.float()
        with torch.autocast('cuda', torch.bfloat16):
            loss = block(X.float()).float().square().mean()
        for mine, exact in zip(torch.autograd.grad(loss, list(block.parameters())), theirs, strict=True):
            assert _error(mine, exact) < 0.05
