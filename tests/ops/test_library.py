"""The operators `dsgformer::block` and `dsgformer::upsample`: what PyTorch asks of them, and failures."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dsgformer_arch import ops
from dsgformer_arch.archs.dsgformer_arch import DSGA, DSGformer
from dsgformer_arch.ops import eager, library, selftest
from dsgformer_arch.ops.cpu import binding
from tests.ops import kernel
from tests.ops.test_block import _block, _error, _image

NAMES = ('norm.weight', 'norm.bias', 'project_in.weight', 'depthwise.weight', 'project_out.weight')


def _arguments(block: DSGA, X: Tensor, dtype: torch.dtype) -> list[Any]:
    names = (*NAMES, 'attention.temperature', 'attention.weights', 'gate.mask')
    parameters = [block.get_parameter(name) for name in names]
    x = X.permute(0, 2, 3, 1).contiguous()
    return [x, *parameters, block.attention.heads, block.attention.top_k, dtype]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('grad', [False, True])
def test_block_is_a_proper_operator(dtype: torch.dtype, grad: bool) -> None:
    """The schema, the fake implementation, the gradient's registration and tracing by AOT autograd."""
    block, X = (
        _block(32, 2).to(dtype).requires_grad_(grad),
        _image(2, 32, 9, 12).to(dtype).requires_grad_(grad),
    )
    torch.library.opcheck(torch.ops.dsgformer.block.default, tuple(_arguments(block, X, dtype)))


@pytest.mark.parametrize('skip', [False, True])
@pytest.mark.parametrize('grad', [False, True])
def test_upsample_is_a_proper_operator(skip: bool, grad: bool) -> None:
    x = torch.rand(2, 3, 5, 32, requires_grad=grad)
    weight = torch.rand(64, 32, 1, 1, requires_grad=grad)
    added = torch.rand(2, 6, 10, 16, requires_grad=grad) if skip else None
    torch.library.opcheck(torch.ops.dsgformer.upsample.default, (x, weight, added))


def test_gradients_and_second_derivatives_of_the_block() -> None:
    block, X = _block(4, 1), _image(1, 4, 3, 9)
    arguments = _arguments(block, X, torch.float64)
    tensors = [value.detach().requires_grad_() for value in arguments[:9]]

    def run(*tensors: Tensor) -> Tensor:
        return library.block(*tensors, *arguments[9:])[0]

    torch.autograd.gradcheck(run, tensors)
    torch.autograd.gradgradcheck(run, tensors)


def test_gradients_of_upsampling() -> None:
    x, weight = torch.rand(1, 2, 3, 4).double(), torch.rand(8, 4, 1, 1).double()
    skip = torch.rand(1, 4, 6, 2).double()
    tensors = [value.requires_grad_() for value in (x, weight, skip)]
    torch.autograd.gradcheck(library.upsample, tensors)
    torch.autograd.gradgradcheck(library.upsample, tensors)


def test_only_what_needs_a_gradient_gets_one() -> None:
    block, X = _block(32, 2).float().requires_grad_(False), _image(1, 32, 9, 12).float()
    block.gate.requires_grad_(True)
    y, _ = library.block(*_arguments(block, X, torch.float32))
    y.sum().backward()
    assert {name for name, value in block.named_parameters() if value.grad is not None} == {'gate.mask'}


def test_the_backward_pass_keeps_what_the_forward_pass_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Near ties, rounding decides what T_k keeps: both passes must go by the same scores."""
    block, X = _block(32, 1).float(), _image(1, 32, 8, 8).float()
    arguments = _arguments(block, X, torch.float32)
    kernel_scores = library.block(*arguments)[1]
    other = kernel_scores.flip(-1)  # as if the kernel's rounding had turned every order around

    def elsewhere(x: Tensor, weights: eager.Weights, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return eager.whole(x, x, weights, ranked_by=other), other

    monkeypatch.setattr(binding, 'takes', lambda *_: False)
    monkeypatch.setattr(library, '_eager_block', elsewhere)
    tensors = [value.detach().requires_grad_() for value in arguments[:9]]
    ours = torch.autograd.grad(library.block(*tensors, *arguments[9:])[0].square().sum(), tensors)
    weights = library._weights(tensors[1:], *arguments[9:11])
    theirs = torch.autograd.grad(
        eager.whole(tensors[0], tensors[0], weights, ranked_by=other).square().sum(), tensors
    )
    for mine, exact in zip(ours, theirs, strict=True):
        assert _error(mine, exact.double()) < 1e-6


def test_fake_tensors_and_flops() -> None:
    block, X = DSGA(32, 2), torch.rand(1, 32, 16, 24)
    counts = {}
    path: ops.Path
    for path in ('fast', 'plain'):
        with FlopCounterMode(display=False) as counter, torch.inference_mode(), ops.use(path):
            block(X)
        counts[path] = counter.get_total_flops()
    assert counts['fast'] == counts['plain'] > 0
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.inference_mode():
        assert block(mode.from_tensor(X)).shape == X.shape


@pytest.mark.parametrize('strict', [False, True])
def test_an_exported_program_holds_no_operator_of_this_package(strict: bool) -> None:
    network, image = DSGformer(16, (1, 1, 1, 1), (1, 1, 1, 1)).eval(), torch.rand(1, 3, 16, 24)
    with torch.no_grad():
        program = torch.export.export(network, (image,), strict=strict)
        torch.testing.assert_close(program.module()(image), network(image), rtol=1e-4, atol=1e-5)
    assert not any(
        'dsgformer' in str(node.target) for node in program.graph.nodes if node.op == 'call_function'
    )


def test_a_compiled_block_runs_the_kernel() -> None:
    kernel.require()
    block, X = DSGA(32, 2), torch.rand(1, 32, 16, 24)
    targets: list[str] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        targets.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(block, backend=backend, fullgraph=True)(X)
        assert 'dsgformer.block.default' in targets
        torch.testing.assert_close(compiled, block.reference(X), rtol=1e-4, atol=1e-5)


class TestRefusals:
    """The kernels check what they are given, whoever calls them."""

    @pytest.fixture
    def given(self) -> tuple[Tensor, eager.Weights]:
        kernel.require()
        block = _block(32, 2).float().requires_grad_(False)
        return torch.rand(1, 8, 9, 32), eager.Weights.of(block, torch.float32)

    @pytest.mark.parametrize(
        'spoil',
        [
            lambda x: x.double(),
            lambda x: x.half(),
            lambda x: x[0],
            lambda x: x.transpose(1, 2),
            lambda x: x[..., :16],
            lambda x: x[:, :0],
            lambda x: x.to('meta'),
            lambda x: torch._neg_view(x),
            lambda x: x.to_sparse(),
            lambda x: FakeTensorMode().from_tensor(x),
        ],
    )
    def test_images(self, given: tuple[Tensor, eager.Weights], spoil: Any) -> None:
        x, weights = given
        binding.block(x, weights)
        with pytest.raises(ValueError):
            binding.block(spoil(x), weights)
        with pytest.raises(ValueError):
            binding.upsample(spoil(x), torch.rand(64, 32, 1, 1), None)

    @pytest.mark.parametrize(
        'name',
        [
            *('norm_weight', 'norm_bias', 'project_in', 'depthwise'),
            *('project_out', 'temperature', 'step', 'mask'),
        ],
    )
    def test_parameters(self, given: tuple[Tensor, eager.Weights], name: str) -> None:
        x, weights = given
        value = getattr(weights, name)
        for spoilt in (value[:-1], value.to('meta'), value.int(), torch._neg_view(value)):
            with pytest.raises(ValueError):
                binding.block(x, replace(weights, **{name: spoilt}))

    def test_upsampling(self) -> None:
        kernel.require()
        x, weight = torch.rand(1, 4, 4, 32), torch.rand(64, 32, 1, 1)
        binding.upsample(x, weight, torch.rand(1, 8, 8, 16))
        for skip in (
            torch.rand(1, 8, 7, 16),
            torch.rand(1, 8, 8, 16).double(),
            torch.rand(1, 8, 8, 32)[..., ::2],
        ):
            with pytest.raises(ValueError):
                binding.upsample(x, weight, skip)
        with pytest.raises(ValueError):
            binding.upsample(x, torch.rand(64, 16, 1, 1), None)


class TestFailures:
    @pytest.fixture(autouse=True)
    def _forget(self, monkeypatch: pytest.MonkeyPatch) -> None:
        kernel.require()
        monkeypatch.setattr(binding, '_VERDICTS', {})
        monkeypatch.setattr(selftest, '_warned', set())

    def test_a_wrong_kernel_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            binding, 'block', lambda x, weights: (torch.full_like(x, float('nan')), torch.empty(0))
        )
        with pytest.warns(UserWarning, match='off by'):
            assert not binding.works(torch.float32).passed
        block, X = DSGA(16, 1), torch.rand(1, 16, 8, 8)
        with torch.inference_mode():
            torch.testing.assert_close(block(X), block.reference(X), rtol=1e-4, atol=1e-5)

    def test_a_kernel_that_keeps_too_much_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without T_k everything else would be right."""
        compute = binding.block

        def dense(x: Tensor, weights: eager.Weights) -> tuple[Tensor, Tensor]:
            c = x.shape[-1] // weights.heads
            return compute(x, replace(weights, top_k=(c,) * len(weights.top_k)))

        monkeypatch.setattr(binding, 'block', dense)
        with pytest.warns(UserWarning, match='off by'):
            assert not binding.works(torch.float32).passed

    @pytest.mark.parametrize(
        'reason',
        [
            MemoryError(),
            torch.OutOfMemoryError('CUDA out of memory'),
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            RuntimeError('operation not permitted when stream is capturing'),
        ],
        ids=str,
    )
    def test_a_passing_failure_is_not_remembered(
        self, monkeypatch: pytest.MonkeyPatch, reason: Exception
    ) -> None:
        def failing(x: Tensor, weights: eager.Weights) -> tuple[Tensor, Tensor]:
            raise reason

        with monkeypatch.context() as patch:
            patch.setattr(binding, 'block', failing)
            with pytest.warns(UserWarning, match='without its compiled kernel'):
                assert not binding.works(torch.float32).passed
        assert binding.works(torch.float32).passed

    def test_a_product_that_is_missing_later(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def failing(*_: Any) -> Any:
            raise binding.UnavailableError('no such product')

        block, X = DSGA(16, 1), torch.rand(1, 16, 8, 8)
        network, image = DSGformer(16, (1, 1, 1, 1)), torch.rand(1, 3, 16, 16)
        assert binding.works(torch.float32).passed
        monkeypatch.setattr(binding, 'block', failing)
        monkeypatch.setattr(binding, 'upsample', failing)
        with torch.inference_mode():
            with pytest.warns(UserWarning, match='no such product'):
                y = block(X)
            torch.testing.assert_close(y, block.reference(X), rtol=1e-4, atol=1e-5)
            with ops.use('plain'):
                expected = network(image)
            torch.testing.assert_close(network(image), expected, rtol=1e-4, atol=1e-5)

    def test_threads_that_ask_at_once_test_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        runs: list[int] = []
        verdict = binding._verdict

        def counted(dtype: torch.dtype) -> selftest.Verdict:
            runs.append(1)
            return verdict(dtype)

        monkeypatch.setattr(binding, '_verdict', counted)
        threads = [threading.Thread(target=binding.works, args=(torch.float32,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(runs) == 1


@pytest.mark.parametrize(('channels', 'heads'), [(32, 2), (48, 1), (96, 2), (192, 4), (384, 8), (128, 1)])
def test_scores_of_the_self_test_are_well_separated(channels: int, heads: int) -> None:
    """Rounding must not decide what T_k keeps, and T_k must drop scores that count."""
    weights = selftest._weights(channels, heads, torch.float32, torch.device('cpu'))
    x = selftest._random(1, 11, 13, channels) * 4
    y, scores = eager.whole_with_scores(x, x, weights)
    ranked = scores.sort(dim=-1, descending=True).values
    for k in weights.top_k:
        gap = (ranked[..., k - 1] - ranked[..., k]).min().item()
        assert gap > 4 * torch.finfo(torch.bfloat16).eps / (channels // heads) ** 0.5
        assert ranked[..., k].min() > 0
    assert (eager.whole(x, x, replace(weights, step=None, top_k=())) - y).abs().max() > 0.1 * y.abs().max()


def test_out_of_memory_raises() -> None:
    """Maps of 4 million channels take 70 TB: an allocation that is not checked would end the process."""
    kernel.require()
    dummy = torch.zeros(16)
    pointers = {name: dummy.data_ptr() for name, kind in binding._Dsga._fields_ if kind is not ctypes.c_int64}
    for channels, heads, message in (
        (1 << 22, 1, "can't allocate memory"),
        (24, 1, 'refused'),
        (32, 3, 'refused'),
    ):
        call = binding._Dsga(8, 8, channels, heads, 1, **pointers)
        with pytest.raises(RuntimeError, match=message):
            binding._enter('dsga', torch.float32, call)
    call = binding._Dsga(8, 8, 32, 2, 1, **(pointers | {'mask': None}))
    with pytest.raises(RuntimeError, match='refused'):
        binding._enter('dsga', torch.float32, call)
