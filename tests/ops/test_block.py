"""The fast implementations of the block against the reference: whole, in strips, compiled, in training."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsgformer_arch import ops
from dsgformer_arch.archs.dsgformer_arch import DSGA, DTSAS, DSGformer
from dsgformer_arch.archs.tlc import window_method
from dsgformer_arch.ops import eager
from dsgformer_arch.ops.cpu import binding
from tests.ops import kernel

SWITCHES = list(
    itertools.product(('dtsas', 'mdta'), ('relu2', 'relu', 'softmax'), ('dfgb', 'gelu', 'simplegate'))
)
SIZES = [(1, 24, 16), (2, 20, 9), (1, 33, 8), (3, 5, 3)]
"""N, H and W: several strips, several images, an odd last strip, smaller than a block."""


def _block(channels: int = 16, heads: int = 2, switches: tuple[str, str, str] = SWITCHES[0]) -> DSGA:
    """A block with no parameter at its starting value, in float64."""
    generator = torch.Generator().manual_seed(channels + heads)
    block = DSGA(channels, heads, *switches).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(generator=generator).mul_(parameter[0].numel() ** -0.5)
        block.norm.weight.add_(1)
        block.attention.temperature.abs_().add_(0.5)
        if switches[2] == 'dfgb':
            block.gate.get_parameter('mask').add_(1)
    return block


def _block_with_ties() -> DSGA:
    """A block of 32 channels and one head in which each score of a row occurs four times."""
    block = _block(32, 1)
    with torch.no_grad():
        for weight in (block.project_in.weight, block.depthwise.weight):
            K = weight[32:64]
            K.copy_(K[:8].repeat(4, *(1 for _ in K.shape[1:])))
    # A library's product may give equal columns sums that differ in the last bit; the ties of the reference
    # must be ties.
    attend = block.attention.attend
    block.attention.attend = lambda A: attend((A * 2**40).round() / 2**40)  # type: ignore[method-assign]
    return block


def _image(n: int, channels: int, h: int, w: int) -> Tensor:
    return torch.randn(n, channels, h, w, dtype=torch.float64, generator=torch.Generator().manual_seed(h * w))


def _error(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact).norm() / exact.norm()).item()


@pytest.fixture
def strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of 8 rows, however small the image."""
    monkeypatch.setitem(eager.STRIP_BYTES, 'cpu', 1)


@pytest.mark.parametrize('switches', SWITCHES)
@pytest.mark.parametrize('size', SIZES)
def test_whole_equals_the_reference(switches: tuple[str, str, str], size: tuple[int, int, int]) -> None:
    block, X = _block(switches=switches), _image(size[0], 16, *size[1:])
    with torch.inference_mode():
        torch.testing.assert_close(block(X), block.reference(X), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures('strips')
@pytest.mark.parametrize('switches', SWITCHES)
@pytest.mark.parametrize('size', SIZES)
def test_strips_equal_the_reference(switches: tuple[str, str, str], size: tuple[int, int, int]) -> None:
    block, X = _block(switches=switches), _image(size[0], 16, *size[1:])
    with torch.inference_mode():
        assert eager.strip_rows(X.permute(0, 2, 3, 1)) == 8
        torch.testing.assert_close(block(X), block.reference(X), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('window', [(7, 6), (16, 5), (8, 40)])
@pytest.mark.parametrize('switches', SWITCHES)
@pytest.mark.parametrize('size', SIZES)
def test_windows_equal_the_reference(
    switches: tuple[str, str, str], size: tuple[int, int, int], window: tuple[int, int]
) -> None:
    block, X = _block(switches=switches), _image(size[0], 16, *size[1:])
    with torch.inference_mode():
        whole = block(X)
        local = window_method(block.attention, 'forward')
        local.window = window
        reference = block.reference(X)
        for budget in (1, 1 << 20):  # strips of 8 rows, which windows cross, or one strip
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(eager.STRIP_BYTES, 'cpu', budget)
                patch.setattr(DTSAS, 'attend', None)  # that of the reference, which must not run
                torch.testing.assert_close(block.in_windows(X), reference, rtol=1e-12, atol=1e-12)
    if window[0] < size[1] and window[1] < size[2]:
        assert _error(whole, reference) > 1e-4


def test_windows_in_bfloat16_are_no_worse_than_the_reference() -> None:
    block, X = _block(64, 4), _image(1, 64, 40, 48)
    window_method(block.attention, 'forward').window = (24, 24)
    with torch.inference_mode():
        exact = block.reference(X)
        block, X = block.float(), X.float()
        with torch.autocast('cpu', torch.bfloat16):
            ours, theirs = _error(block.in_windows(X), exact), _error(block.reference(X), exact)
    assert 1e-5 < ours < 1.1 * theirs


@pytest.mark.parametrize('kept', ['everything', 'some', 'X'])
@pytest.mark.parametrize('switches', SWITCHES)
def test_gradients_equal_the_reference_implementations(
    switches: tuple[str, str, str], kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, X = _block(switches=switches), _image(2, 16, 12, 9).requires_grad_()
    block.recompute = kept == 'X'
    if kept == 'some':
        monkeypatch.setitem(eager.KEPT_BYTES, 'cpu', 0)
    inputs = [X, *block.parameters()]
    reference, fast = block.reference(X), block(X)
    torch.testing.assert_close(fast, reference, rtol=1e-12, atol=1e-12)
    seed = torch.randn_like(reference)
    for ours, theirs in zip(
        torch.autograd.grad(fast, inputs, seed), torch.autograd.grad(reference, inputs, seed), strict=True
    ):
        assert (ours - theirs).norm() <= 1e-12 * theirs.norm()


def test_gradcheck() -> None:
    block, X = _block(4, 1), _image(1, 4, 3, 9).requires_grad_()
    parameters = dict(block.named_parameters())

    def run(X: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(parameters, values, strict=True)), (X,))

    torch.autograd.gradcheck(run, (X, *parameters.values()))


def test_training_keeps_less_than_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def kept(block: DSGA, X: Tensor, reference: bool) -> int:
        """Bytes that the graph holds on to beyond the parameters and X."""
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = (block.reference if reference else block)(X)
        return sum(sizes.values()) + output.nbytes

    block, X = _block(), _image(1, 16, 64, 64).requires_grad_()
    reference = kept(block, X, reference=True)
    assert kept(block, X, reference=False) < reference
    monkeypatch.setitem(eager.KEPT_BYTES, 'cpu', 0)
    assert kept(block, X, reference=False) < reference / 3
    block.recompute = True
    assert kept(block, X, reference=False) < reference / 8


@pytest.mark.parametrize('channels', [4, 16])
def test_float32(channels: int) -> None:
    block, X = _block(channels), _image(2, channels, 24, 17)
    with torch.inference_mode():
        exact = block.reference(X)
        assert _error(block.float()(X.float()), exact) < 1e-6


@pytest.mark.parametrize('path', ['fast', 'eager'])
@pytest.mark.parametrize('heads', [1, 2])
def test_bfloat16_is_as_accurate_as_the_reference(path: ops.Path, heads: int) -> None:
    block, X = _block(32, heads).bfloat16(), _image(1, 32, 40, 24).bfloat16()
    with torch.inference_mode(), ops.use(path):
        ours, reference = block(X), block.reference(X)
        exact = block.double().reference(X.double())
    assert ours.dtype == torch.bfloat16
    assert _error(ours, exact) < 1.2 * _error(reference, exact)


@pytest.mark.parametrize('grad', [False, True])
def test_autocast_is_as_accurate_as_the_reference(grad: bool) -> None:
    block, X = _block(32).float(), _image(1, 32, 16, 24).float()
    exact = copy.deepcopy(block).double().reference(X.double())
    with torch.set_grad_enabled(grad), torch.autocast('cpu', torch.bfloat16):
        ours, reference = block(X), block.reference(X)
    assert ours.dtype == reference.dtype
    assert _error(ours, exact) < 1.2 * _error(reference, exact)


def test_gradients_under_autocast() -> None:
    block, X = _block(32).float(), _image(2, 32, 16, 24).float()
    exact = copy.deepcopy(block).double()
    exact.reference(X.double()).square().mean().backward()
    with torch.autocast('cpu', torch.bfloat16):
        block(X).float().square().mean().backward()
    for (name, ours), theirs in zip(block.named_parameters(), exact.parameters(), strict=True):
        assert ours.grad is not None
        assert ours.grad.dtype == torch.float32
        assert theirs.grad is not None
        assert _error(ours.grad, theirs.grad) < 0.05, name


def test_channels_last_stays_channels_last() -> None:
    X = _image(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    for mode in (torch.inference_mode, torch.enable_grad):
        with mode():
            assert _block()(X).is_contiguous(memory_format=torch.channels_last)


def test_edited_weights_count_at_once() -> None:
    """Nothing derived from the weights outlives a call, however they are changed."""
    block, X = _block(16, 1).float(), _image(1, 16, 16, 16).float()
    other = {name: value + 0.1 for name, value in block.state_dict().items()}

    def optimizer_step() -> None:
        optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
        with torch.enable_grad():
            block(X).square().sum().backward()
        optimizer.step()

    edits = [
        optimizer_step,
        lambda: block.load_state_dict(other),
        lambda: [p.data.mul_(0.9) for p in block.parameters()],  # what BasicSR's moving average does
    ]
    with torch.no_grad():
        block(X)
        for edit in edits:
            edit()
            torch.testing.assert_close(block(X), block.reference(X), rtol=1e-4, atol=1e-5)


def test_copies_and_pickles() -> None:
    network = DSGformer(width=16, num_blocks=(1, 1, 1, 1))
    X = torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        expected = network(X)
        for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
            assert twin.state_dict().keys() == network.state_dict().keys()
            assert torch.equal(twin(X), expected)


@pytest.mark.parametrize('recompute', [False, True])
def test_network_equals_its_reference(recompute: bool) -> None:
    network = DSGformer(width=8, num_blocks=(1, 1, 1, 1), recompute=recompute).double()
    X = torch.rand(2, 3, 41, 30, dtype=torch.float64)
    results = {}
    path: ops.Path
    for path in ('plain', 'fast'):
        network.zero_grad()
        with ops.use(path):
            Y = network(X)
            Y.square().sum().backward()
        results[path] = [Y.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)]
    assert len(results['fast']) == len(list(network.parameters())) + 1
    for ours, theirs in zip(results['fast'], results['plain'], strict=True):
        assert (ours - theirs).norm() <= 1e-11 * theirs.norm()


@pytest.mark.parametrize(
    ('environment', 'expected'),
    [
        ({}, 'fast'),
        ({'DSGFORMER_PLAIN': '1'}, 'plain'),
        ({'DSGFORMER_PLAIN': '0'}, 'fast'),
        ({'DSGFORMER_EAGER': '1'}, 'eager'),
    ],
)
def test_environment_chooses_the_path(
    environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ('DSGFORMER_PLAIN', 'DSGFORMER_EAGER'):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert ops.path() == expected
    with ops.use('plain'):
        assert ops.path() == 'plain'
    assert ops.path() == expected


def test_plain_runs_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('DSGFORMER_PLAIN', '1')
    block, X = _block(), _image(1, 16, 8, 8)
    seen: list[str] = []
    for name, module in block.named_modules():
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    block(X)
    assert {'norm', 'project_in', 'depthwise', 'attention', 'gate', 'project_out'} <= set(seen)


class TestKernel:
    """The compiled kernel."""

    @pytest.fixture(autouse=True)
    def _kernel(self) -> None:
        kernel.require()

    def test_bfloat16_works_where_the_processor_has_it(self) -> None:
        assert binding.works(torch.bfloat16).passed or not torch.ops.mkldnn._is_mkldnn_bf16_supported()

    @pytest.mark.parametrize('threads', [1, 3])
    @pytest.mark.parametrize('size', [*SIZES, (1, 70, 140), (1, 8, 300)])
    @pytest.mark.parametrize(('channels', 'heads'), [(16, 1), (96, 2), (80, 1)])
    def test_equals_the_reference(
        self, channels: int, heads: int, size: tuple[int, int, int], threads: int
    ) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            self._compare(_block(channels, heads), _image(size[0], channels, *size[1:]))
        finally:
            torch.set_num_threads(before)

    def test_ties_are_kept(self) -> None:
        self._compare(_block_with_ties(), _image(1, 32, 16, 16))

    @staticmethod
    def _compare(block: DSGA, X: Tensor) -> None:
        with torch.inference_mode():
            exact = block.reference(X)
            weights = eager.Weights.of(block, torch.float64)
            theirs = eager.whole_with_scores(*2 * (X.permute(0, 2, 3, 1),), weights)[1]
            y, scores = binding.block(X.float().permute(0, 2, 3, 1).contiguous(), weights)
        assert _error(y.permute(0, 3, 1, 2), exact) < 1e-5
        assert _error(scores, theirs) < 1e-5

    @pytest.mark.parametrize('dtype', binding.TYPES)
    def test_gives_the_same_twice(self, dtype: torch.dtype) -> None:
        block, X = _block(32, 1).to(dtype), _image(1, 32, 100, 50).to(dtype)
        with torch.inference_mode():
            assert torch.equal(block(X), block(X))

    def test_not_a_number_is_passed_on(self) -> None:
        for dtype in binding.TYPES:
            block, X = _block(32, 1).to(dtype), _image(1, 32, 16, 16).to(dtype)
            X[0, 0, 3, 3] = float('nan')
            with torch.inference_mode():
                assert block(X).isnan().any()

    @pytest.mark.parametrize('x', [-60.0, -12.0, -5.5, -3.0, -1e-3, 0.0, 1e-3, 0.7, 3.0, 12.0, 60.0])
    def test_gelu_far_out(self, x: float) -> None:
        """GELU alone: with M, the map and V all 1 and W_p' the identity, the block gives X + GELU(u)·C."""
        C, heads = 16, 1
        block = _block(C, heads).float()
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.zero_()
            block.norm.bias.fill_(1)  # LN gives 1 everywhere
            identity = torch.eye(C)
            block.project_in.weight.view(4, C, C).copy_(
                torch.stack([identity, identity, identity, x * identity])
            )
            block.depthwise.weight[:, :, 1, 1] = 1
            block.attention.temperature.fill_(1)
            block.attention.weights.fill_(1 / 4)  # every score is 1, a tie: the map is 1 everywhere
            block.gate.get_parameter('mask').fill_(1)
            block.project_out.weight.view(C, C).copy_(identity)
            X = torch.zeros(1, C, 8, 8)
            expected = torch.nn.functional.gelu(torch.tensor(x, dtype=torch.float64)).item() * C
            torch.testing.assert_close(block(X), torch.full_like(X, expected), rtol=2e-6, atol=1e-5)

    def test_operations_can_still_be_counted(self) -> None:
        from torch.utils.flop_counter import FlopCounterMode

        block, X = DSGA(16, 1), torch.rand(1, 16, 8, 8)
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            block(X)
        assert counter.get_total_flops() > 5 * 16**2 * 64 * 2


@pytest.mark.parametrize('grad', [False, True])
def test_compiles_without_a_break(grad: bool) -> None:
    block, X = _block(), _image(2, 16, 12, 9).requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        compiled = torch.compile(block, backend='aot_eager', fullgraph=True)(X)
    torch.testing.assert_close(compiled, block.reference(X), rtol=1e-12, atol=1e-12)
    if grad:
        ours, theirs = (torch.autograd.grad(Y.square().sum(), X)[0] for Y in (compiled, block.reference(X)))
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_runs_without_a_compiler(tmp_path: Path) -> None:
    code = """
import torch
from dsgformer_arch.archs.dsgformer_arch import DSGA
from dsgformer_arch.ops.cpu import binding
block, X = DSGA(16, 1), torch.rand(1, 16, 16, 16)
with torch.inference_mode():
    torch.testing.assert_close(block(X), block.reference(X), rtol=1e-4, atol=1e-5)
assert not binding.works(torch.float32).passed
"""
    environment = os.environ | {'CXX': 'no-such-compiler', 'XDG_CACHE_HOME': str(tmp_path)}
    done = subprocess.run(
        [sys.executable, '-c', code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
