"""The kernels for a GPU, without one: in Triton's interpreter, and compiled for a Hopper GPU but not run."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dsgformer_arch import ops
from dsgformer_arch.archs.dsgformer_arch import DSGA, DSGformer
from dsgformer_arch.ops import block as dispatch
from dsgformer_arch.ops import eager, library
from dsgformer_arch.ops.selftest import Verdict
from tests.ops.test_block import _block, _block_with_ties, _error, _image

pytest.importorskip('triton', reason='Triton is not installed')

SHARED_MEMORY = 227 << 10
"""Bytes that a program can have on compute capability 9.0, by the CUDA C++ Programming Guide."""

SPILLED = 64
"""Bytes that a thread may spill: 16 of its 128 registers or more."""

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
        return module.restored(x.to(dtype), x, eager.Weights.of(block, dtype))[0].permute(0, 3, 1, 2)


def _compare(interpreted: ModuleType, block: DSGA, X: Tensor) -> None:
    """The kernels in float32 against the reference implementation in float64."""
    with torch.inference_mode():
        exact = block.reference(X)
    assert _error(_restored(interpreted, block.float(), X.float(), torch.float32), exact) < 1e-6


@pytest.mark.parametrize('name', ['project_in', 'project_out'])
def test_weights_that_are_not_contiguous(interpreted: ModuleType, name: str) -> None:
    block, X = _block(32, 2), _image(1, 32, 8, 8)
    weight = getattr(block, name).weight
    weight.data = weight.data.transpose(0, 1).contiguous().transpose(0, 1)
    assert not weight.is_contiguous()
    _compare(interpreted, block, X)


@pytest.mark.parametrize('strip', [1, 1 << 30])
@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize(('channels', 'heads'), [(48, 1), (32, 2), (144, 3)])
def test_equals_the_reference(
    interpreted: ModuleType,
    channels: int,
    heads: int,
    size: tuple[int, int, int],
    strip: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(eager.STRIP_BYTES, 'cpu', strip)
    _compare(interpreted, _block(channels, heads), _image(size[0], channels, *size[1:]))


def test_ties_are_kept(interpreted: ModuleType) -> None:
    # The interpreter's products are NumPy's, whose kernels for some processors sum equal columns differently.
    rows = np.random.RandomState(0).randn(32, 256).astype(np.float32)
    product = rows @ np.tile(rows[:8], (4, 1)).T
    if not (product == np.tile(product[:, :8], 4)).all():
        pytest.skip("NumPy's product gives equal columns different sums on this processor: no ties to keep")
    _compare(interpreted, _block_with_ties(), _image(1, 32, 16, 16))


@pytest.mark.parametrize(('channels', 'heads'), [(48, 1), (144, 3)])
def test_float16_is_as_accurate_as_the_reference(interpreted: ModuleType, channels: int, heads: int) -> None:
    """The rounding is where bfloat16's is, of whose products the interpreter (Triton 3.7) knows nothing."""
    block, X = _block(channels, heads), _image(1, channels, 24, 19)
    with torch.inference_mode():
        exact = block.reference(X)
        half = copy.deepcopy(block).half().reference(X.half())
    assert _error(_restored(interpreted, block.float(), X.half(), torch.float16), exact) < _error(half, exact)


def test_the_residual_keeps_its_type(interpreted: ModuleType) -> None:
    block, X = _block(48, 1), _image(1, 48, 8, 8)
    with torch.inference_mode():
        exact = block.reference(X)
    y = _restored(interpreted, block.float(), X.float(), torch.float16)
    assert y.dtype == torch.float32
    assert _error(y, exact) < 1e-3


@pytest.fixture
def on_gpu(interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`dsgformer::block` on a CPU tensor does what it does on a GPU, in the interpreter."""

    def eager_block(x: Tensor, weights: eager.Weights, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return interpreted.restored(x.to(dtype), x, weights.to(dtype))

    monkeypatch.setattr(library.binding, 'takes', lambda *_: False)
    monkeypatch.setattr(library, '_eager_block', eager_block)
    return interpreted


def _operator(block: DSGA, x: Tensor) -> Tensor:
    names = ('norm.weight', 'norm.bias', 'project_in.weight', 'depthwise.weight', 'project_out.weight')
    parameters = [
        block.get_parameter(name)
        for name in (*names, 'attention.temperature', 'attention.weights', 'gate.mask')
    ]
    return library.block(x, *parameters, block.attention.heads, block.attention.top_k, torch.float32)[0]


@pytest.mark.usefixtures('on_gpu')
@pytest.mark.parametrize('frozen', [False, True])
def test_gradients_equal_those_of_the_reference(frozen: bool) -> None:
    block, X = _block(48, 1), _image(2, 48, 12, 9)
    inputs = [X.requires_grad_(not frozen), *block.parameters()]
    block.depthwise.requires_grad_(not frozen)
    reference = block.reference(X)
    seed = torch.randn_like(reference)
    theirs = torch.autograd.grad(reference, [value for value in inputs if value.requires_grad], seed)

    block.float()
    x = X.detach().float().permute(0, 2, 3, 1).contiguous().requires_grad_(not frozen)
    given = [value for value in (x, *block.parameters()) if value.requires_grad]
    ours = torch.autograd.grad(_operator(block, x), given, seed.permute(0, 2, 3, 1).float())
    for mine, exact in zip(ours, theirs, strict=True):
        mine = mine.permute(0, 3, 1, 2) if mine.shape != exact.shape else mine
        # Some gradients are a float32 sum over the image; NumPy's order of it varies with its threads.
        assert _error(mine, exact) < 2e-5


@pytest.mark.usefixtures('on_gpu')
def test_training_keeps_nothing_but_x() -> None:
    block, X = _block(32, 2).float(), _image(1, 32, 32, 32).float()
    x = X.permute(0, 2, 3, 1).contiguous().requires_grad_()
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _operator(block, x)
    assert x.nbytes <= sum(sizes.values()) < 1.4 * x.nbytes


@pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason='PyTorch is built without CUDA and has no fake tensors of it'
)
def test_fake_tensors_take_no_kernel(interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreted, 'takes', lambda *_: True)
    monkeypatch.delattr(interpreted, 'restored')
    with FakeTensorMode():
        block = DSGA(16, 1).to('cuda', torch.bfloat16)
        x = torch.empty(1, 16, 8, 8, device='cuda', dtype=torch.bfloat16)
        assert block(x).shape == x.shape


def test_the_network_restores_and_trains_with_them(
    on_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = DSGformer(width=16, num_blocks=(1, 1, 1, 1))
    calls: list[tuple[int, ...]] = []
    restored = on_gpu.restored

    def counted(x: Tensor, residual: Tensor, weights: eager.Weights) -> tuple[Tensor, Tensor]:
        calls.append(tuple(x.shape))
        return restored(x, residual, weights)

    monkeypatch.setattr(on_gpu, 'restored', counted)
    monkeypatch.setattr(dispatch, '_operator_takes', lambda *_: True)
    image = torch.rand(1, 3, 9, 16)
    with ops.use('plain'):
        reference = network(image)
        theirs = torch.autograd.grad(reference.square().mean(), list(network.parameters()))
    assert not calls
    with torch.inference_mode():
        torch.testing.assert_close(network(image), reference)
    assert len(calls) == 7
    ours = torch.autograd.grad(network(image).square().mean(), list(network.parameters()))
    assert len(calls) == 14
    for mine, exact in zip(ours, theirs, strict=True):
        assert _error(mine, exact.double()) < 1e-4


def test_the_self_test_distinguishes_right_from_wrong(
    interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interpreted, '_VERDICTS', {})

    def works() -> bool:
        interpreted._VERDICTS.clear()
        return interpreted.works(torch.device('cpu'), torch.float16, 32, 2).passed

    assert works()
    monkeypatch.setattr(interpreted, 'output', lambda strip, taps, attention, weights, residual, y: y.zero_())
    assert not works()
    monkeypatch.delattr(interpreted, 'output')
    assert not works()


def test_takes_only_what_it_can(interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreted, 'works', lambda *_: Verdict(True))
    cuda = torch.device('cuda')
    assert all(interpreted.takes(cuda, torch.bfloat16, *level) for level in LEVELS)
    assert not interpreted.takes(torch.device('cpu'), torch.bfloat16, 48, 1)
    assert not interpreted.takes(cuda, torch.float32, 48, 1)
    assert not interpreted.takes(cuda, torch.bfloat16, 24, 1)  # no multiple of what is taken at once
    assert not interpreted.takes(cuda, torch.bfloat16, 256, 1)  # too wide a head


@pytest.mark.parametrize(('channels', 'heads'), LEVELS)
def test_compiles_for_a_hopper_gpu(channels: int, heads: int, tmp_path: Path) -> None:
    """With the arguments of the real calls: what the interpreter does not check."""
    done = subprocess.run(
        [sys.executable, '-m', 'tests.ops.compile_for_hopper', str(channels), str(heads)],
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
        assert kernel['spilled'] <= SPILLED


@pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU here')
class TestOnAGpu:
    @pytest.mark.parametrize('grad', [False, True])
    @pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(('channels', 'heads'), [*LEVELS, (16, 1)])
    def test_is_as_accurate_as_the_reference(
        self, channels: int, heads: int, dtype: torch.dtype, grad: bool
    ) -> None:
        from dsgformer_arch.ops import gpu

        block, X = _block(channels, heads).cuda(), _image(2, channels, 45, 70).cuda()
        exact = block.reference(X)
        block.float()
        assert gpu.takes(X.device, dtype, channels, heads)
        with torch.set_grad_enabled(grad), torch.autocast('cuda', dtype):
            ours, reference = block(X.to(dtype)), block.reference(X.to(dtype))
        assert ours.dtype == reference.dtype
        assert _error(ours, exact) < 1.2 * _error(reference, exact)

    def test_gradients(self) -> None:
        block, X = _block(48, 1).cuda(), _image(2, 48, 24, 32).cuda()
        theirs = torch.autograd.grad(block.reference(X).square().mean(), list(block.parameters()))
        block.float()
        with torch.autocast('cuda', torch.bfloat16):
            loss = block(X.float()).float().square().mean()
        for mine, exact in zip(torch.autograd.grad(loss, list(block.parameters())), theirs, strict=True):
            assert _error(mine, exact) < 0.05
