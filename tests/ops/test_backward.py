"""The compiled training of the block against the reference implementation: values and every gradient."""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dsgformer_arch import ops
from dsgformer_arch.archs.dsgformer_arch import DSGA, DSGformer
from dsgformer_arch.ops import eager, resampling, selftest
from dsgformer_arch.ops.cpu import binding, build, training

SWITCHES = list(
    itertools.product(('dtsas', 'mdta'), ('relu2', 'relu', 'softmax'), ('dfgb', 'gelu', 'simplegate'))
)
SIZES = [(1, 24, 16), (2, 20, 9), (1, 33, 8), (3, 5, 3)]
"""N, H and W: whole blocks, several images, an odd last block, smaller than a block."""

WIDTHS = [(8, 1), (16, 2), (24, 1), (48, 2), (32, 1), (96, 1)]
"""C and heads: heads of 8, 24 and of whole vectors of 16 channels; products of one, two and more vectors."""


@pytest.fixture(scope='module', autouse=True)
def _kernel() -> None:
    if not training.takes(torch.float32, 16, 1):
        pytest.skip('there is no compiler here')


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


def _image(n: int, channels: int, h: int, w: int) -> Tensor:
    return torch.randn(n, channels, h, w, dtype=torch.float64, generator=torch.Generator().manual_seed(h * w))


def _compiled(block: DSGA, X: Tensor, recompute: bool = False) -> Tensor:
    """The block by the kernel, whatever the type of X."""
    weights = eager.Weights.of(block, torch.promote_types(X.dtype, torch.float32))
    return training.differentiable(X.permute(0, 2, 3, 1).contiguous(), weights, recompute).permute(0, 3, 1, 2)


def _gradients(Y: Tensor, X: Tensor, block: nn.Module) -> dict[str, Tensor]:
    """Y and the gradients of X and of all parameters, for one direction of Y."""
    direction = torch.randn(Y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(
        Y.dtype
    )
    named = {'X': X, **dict(block.named_parameters())}
    values = torch.autograd.grad(Y, list(named.values()), direction)
    return {'Y': Y.detach(), **dict(zip(named, values, strict=True))}


def _error(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact).norm() / exact.norm()).item()


def _compare(block: DSGA, X: Tensor, tolerance: float, recompute: bool = False) -> None:
    """The kernel in the type of X against the reference implementation in float64."""
    exact_X = X.double().detach().requires_grad_()
    exact_block = copy.deepcopy(block).double()
    exact = _gradients(exact_block.reference(exact_X), exact_X, exact_block)
    X = X.detach().requires_grad_()
    ours = _gradients(_compiled(block, X, recompute), X, block)
    for name, value in exact.items():
        assert ours[name].isfinite().all(), name
        assert _error(ours[name], value) <= tolerance, name


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('switches', SWITCHES)
def test_float64_equals_the_reference(switches: tuple[str, str, str], size: tuple[int, int, int]) -> None:
    _compare(_block(switches=switches), _image(size[0], 16, *size[1:]), 1e-12)


@pytest.mark.parametrize(('channels', 'heads'), WIDTHS)
@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_every_width(channels: int, heads: int, dtype: torch.dtype, tolerance: float) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    _compare(_block(channels, heads).to(wide), _image(2, channels, 13, 17).to(dtype), tolerance)


@pytest.mark.parametrize('size', [*SIZES, (1, 70, 140)])
@pytest.mark.parametrize('threads', [1, 3])
def test_sharing_out_among_threads(size: tuple[int, int, int], threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _compare(_block(16, 1), _image(size[0], 16, *size[1:]), 1e-12)
        _compare(_block(16, 1), _image(2 * threads, 16, 9, 9), 1e-12)
    finally:
        torch.set_num_threads(before)


def test_recomputing_what_is_not_kept() -> None:
    _compare(_block(16, 1), _image(3, 16, 20, 9), 1e-12, recompute=True)


@pytest.mark.parametrize('score', ['relu2', 'softmax'])
def test_ties_are_kept(score: str) -> None:
    """Each score of a row occurs four times, and thresholds lie between equal scores.

    Then the order of the keys that tie does not matter: exchanging two of them exchanges their gradients.
    (The eager forms are no reference here, as their library's product rounds equal columns differently.)
    """
    block = _block(32, 1, ('dtsas', score, 'gelu'))
    assert any(k % 4 for k in block.attention.top_k)
    weights = (block.project_in.weight, block.depthwise.weight)
    with torch.no_grad():
        for weight in weights:
            K = weight[32:64]
            K.copy_(K[:8].repeat(4, *(1 for _ in K.shape[1:])))
    X = _image(1, 32, 16, 16).requires_grad_()
    order = torch.arange(128)
    order[[64 + 3, 64 + 27]] = order[[64 + 27, 64 + 3]]
    before = _gradients(_compiled(block, X), X, block)
    with torch.no_grad():
        for weight in weights:
            weight.copy_(weight[order])
    after = _gradients(_compiled(block, X), X, block)
    order[[32 + 3, 32 + 27]] = order[[32 + 27, 32 + 3]]
    for name, value in before.items():
        expected = value[order] if name in ('project_in.weight', 'depthwise.weight') else value
        assert _error(after[name], expected) < 1e-12, name


def test_a_row_without_norm() -> None:
    """A channel of Q and one of K that are zero everywhere divide by the least norm, not by zero."""
    block = _block(16, 1)
    with torch.no_grad():
        block.project_in.weight[3] = 0
        block.project_in.weight[16 + 5] = 0
    X = _image(1, 16, 8, 8)
    exact_X = X.clone().requires_grad_()
    exact = _gradients(
        eager.whole(
            *(exact_X.permute(0, 2, 3, 1).contiguous(),) * 2, eager.Weights.of(block, torch.float64)
        ).permute(0, 3, 1, 2),
        exact_X,
        block,
    )
    X.requires_grad_()
    ours = _gradients(_compiled(block, X), X, block)
    for name, value in exact.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-9 * value.abs().max().item())


def test_gradcheck() -> None:
    block, X = _block(8, 1), _image(1, 8, 3, 9).requires_grad_()
    parameters = dict(block.named_parameters())

    def run(X: Tensor, *values: Tensor) -> Tensor:
        twin = copy.deepcopy(block)
        for name, value in zip(parameters, values, strict=True):
            module, _, leaf = name.rpartition('.')
            owner = twin.get_submodule(module)
            delattr(owner, leaf)
            setattr(owner, leaf, value)
        return _compiled(twin, X)

    assert torch.autograd.gradcheck(run, (X, *parameters.values()))


@pytest.mark.parametrize(('channels', 'heads'), [(32, 1), (32, 2), (24, 1)])
def test_bfloat16_is_as_accurate_as_the_eager_form(channels: int, heads: int) -> None:
    block, X = _block(channels, heads), _image(2, channels, 24, 20)
    exact_X = X.bfloat16().double().requires_grad_()
    exact = _gradients(block.reference(exact_X), exact_X, block)
    block = block.float()
    errors: dict[str, dict[str, float]] = {}
    path: ops.Path
    for path in ('fast', 'eager'):
        x = X.bfloat16().requires_grad_()
        with ops.use(path), torch.autocast('cpu', torch.bfloat16):
            Y = block(x)
        assert Y.dtype == torch.bfloat16
        assert (path == 'fast') == ('_Block' in _functions(Y))
        found = _gradients(Y, x, block)
        errors[path] = {name: _error(found[name], value) for name, value in exact.items()}
    for name, error in errors['fast'].items():
        assert error < 1.2 * errors['eager'][name] + 1e-3, name


def _functions(Y: Tensor) -> str:
    """The names of the nodes of Y's graph."""
    names, todo = [], [Y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None:
            names.append(node.name())
            todo += [following for following, _ in node.next_functions]
    return ' '.join(names)


def test_parameters_keep_their_type() -> None:
    block, X = _block(16, 1).float(), _image(2, 16, 16, 16).bfloat16()
    with torch.autocast('cpu', torch.bfloat16):
        block(X).float().square().mean().backward()
    assert {p.grad.dtype for p in block.parameters() if p.grad is not None} == {torch.float32}
    assert all(p.grad is not None for p in block.parameters())


@pytest.mark.parametrize('frozen', ['project_in', 'norm', 'gate', 'attention', 'X', 'everything else'])
def test_frozen_parameters_get_no_gradient(frozen: str) -> None:
    block, X = _block(16, 1).float(), _image(1, 16, 8, 8).float()
    exact_block, exact_X = copy.deepcopy(block).double(), X.double().requires_grad_()
    exact = _gradients(exact_block.reference(exact_X), exact_X, exact_block)
    X.requires_grad_(frozen not in ('X', 'everything else'))
    for name, parameter in block.named_parameters():
        asked = name == 'project_out.weight' if frozen == 'everything else' else not name.startswith(frozen)
        parameter.requires_grad_(asked)
    Y = block(X)
    assert '_Block' in _functions(Y)
    direction = torch.randn(Y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).float()
    Y.backward(direction)
    for name, tensor in {'X': X, **dict(block.named_parameters())}.items():
        if tensor.requires_grad:
            assert tensor.grad is not None
            assert _error(tensor.grad, exact[name]) < 1e-5, name
        else:
            assert tensor.grad is None, name


def test_backward_twice() -> None:
    block, X = _block(16, 1).float(), _image(1, 16, 12, 8).float().requires_grad_()
    Y = block(X).square().sum()
    first = torch.autograd.grad(Y, X, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(Y, X)[0])


def test_a_second_derivative_is_refused() -> None:
    block, X = _block(16, 1).float(), _image(1, 16, 8, 8).float().requires_grad_()
    (gradient,) = torch.autograd.grad(block(X).square().sum(), X, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        gradient.sum().backward()


@pytest.mark.parametrize('dtype', training.TYPES)
def test_gives_the_same_twice(dtype: torch.dtype) -> None:
    block, X = _block(32, 2).float(), _image(3, 32, 20, 20).to(dtype)
    results = []
    for _ in range(2):
        x = X.clone().requires_grad_()
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
            Y = block(x)
        results.append(_gradients(Y, x, block))
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_not_a_number_is_passed_on() -> None:
    for dtype in training.TYPES:
        block, X = _block(16, 1).float(), _image(1, 16, 16, 16).to(dtype)
        X[0, 0, 3, 3] = float('nan')
        X.requires_grad_()
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
            Y = block(X)
        assert Y.isnan().any()
        assert torch.autograd.grad(Y.float().sum(), X)[0].isnan().any()


def test_memory_that_is_computed_again_is_not_kept() -> None:
    def kept(block: DSGA, X: Tensor) -> int:
        """Bytes that the graph holds on to beyond X and the parameters."""
        known = {tensor.untyped_storage().data_ptr() for tensor in (X, *block.parameters())}
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            block(X)
        return sum(size for start, size in sizes.items() if start not in known)

    block, X = _block(16, 1).float(), _image(1, 16, 64, 64).float().requires_grad_()
    X = X.contiguous(memory_format=torch.channels_last)
    assert kept(block, X) < 6 * X.nbytes
    block.recompute = True
    assert kept(block, X) < 1.2 * X.nbytes


@pytest.mark.parametrize('amp', [False, True])
def test_a_network_trains_as_by_the_eager_form(amp: bool) -> None:
    torch.manual_seed(0)
    network = DSGformer(width=16, num_blocks=(1, 1, 1, 1))
    X, target = torch.rand(2, 3, 40, 48), torch.rand(2, 3, 40, 48)
    losses: dict[str, list[float]] = {}
    path: ops.Path
    for path in ('fast', 'eager'):
        twin = copy.deepcopy(network)
        optimizer = torch.optim.AdamW(twin.parameters(), 1e-3)
        losses[path] = []
        for _ in range(4):
            optimizer.zero_grad()
            with ops.use(path), torch.autocast('cpu', torch.bfloat16, enabled=amp):
                Y = twin(X)
            loss = nn.functional.l1_loss(Y.float(), target)
            loss.backward()
            optimizer.step()
            losses[path].append(loss.item())
    assert losses['fast'][-1] < losses['fast'][0]
    assert losses['fast'] == pytest.approx(losses['eager'], rel=2e-2 if amp else 1e-4)


def test_heads_that_no_vector_fits_train_in_the_eager_form() -> None:
    block, X = _block(12, 1).float(), _image(1, 12, 8, 8).float().requires_grad_()
    Y = block(X)
    assert '_Block' not in _functions(Y)
    Y.sum().backward()


def test_without_a_compiler_the_eager_form_trains(tmp_path: Path) -> None:
    code = """
import torch
from dsgformer_arch.archs.dsgformer_arch import DSGA
from dsgformer_arch.ops.cpu import training
block, X = DSGA(16, 1), torch.rand(1, 16, 16, 16)
block(X).sum().backward()
assert block.project_in.weight.grad is not None
assert not training.takes(torch.float32, 16, 1)
"""
    environment = os.environ | {'CXX': 'no-such-compiler', 'XDG_CACHE_HOME': str(tmp_path)}
    done = subprocess.run(
        [sys.executable, '-c', code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_wrong_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, 'library', lambda source: None)
    monkeypatch.setattr(training, '_VERDICTS', {})
    monkeypatch.setattr(selftest, '_warned', set())
    monkeypatch.setattr(training, 'differentiable', lambda x, weights: eager.whole(x, x, weights) * 1.01)
    with pytest.warns(UserWarning, match='off by'):
        assert not training.works(torch.float32).passed


class TestSteps:
    """The steps outside the levels, trained by the kernel, against their modules."""

    @pytest.fixture(autouse=True)
    def _kernel(self) -> None:
        if not binding.works(torch.float32):
            pytest.skip('there are no small matrix products for this processor')

    @staticmethod
    def _compare(step: Callable[..., Tensor], module: nn.Module, *images: Tensor) -> None:
        """In float32 and under autocast: no worse than the modules, twice the rounding allowed."""
        exact_module = copy.deepcopy(module).double()
        names = [f'image {i}' for i in range(len(images))] + [name for name, _ in module.named_parameters()]
        with ops.use('plain'):
            exact = TestSteps._gradients(step, exact_module, [image.double() for image in images])
        path: ops.Path
        for amp, floor in ((False, 1e-6), (True, 3e-3)):  # a skip is added in bfloat16
            errors: dict[str, list[float]] = {}
            for path in ('fast', 'plain'):
                with ops.use(path), torch.autocast('cpu', torch.bfloat16, enabled=amp):
                    found = TestSteps._gradients(step, module, [image.clone() for image in images])
                errors[path] = [_error(ours, theirs) for ours, theirs in zip(found, exact, strict=True)]
            for name, ours, theirs in zip(['Y', *names], errors['fast'], errors['plain'], strict=True):
                assert ours <= 2 * theirs + floor, (name, amp)

    @staticmethod
    def _gradients(step: Callable[..., Tensor], module: nn.Module, images: list[Tensor]) -> list[Tensor]:
        for image in images:
            image.requires_grad_()
        Y = step(module, *images)
        compiled = any(
            name in _functions(Y) for name in ('_Convolved', '_Downsampled', '_Upsampled', '_Tail')
        )
        assert compiled == (ops.path() == 'fast')
        direction = torch.randn(Y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        inputs = [*images, *module.parameters()]
        return [Y.detach(), *torch.autograd.grad(Y, inputs, direction.to(Y.dtype))]

    @pytest.mark.parametrize('size', [(2, 16, 20), (1, 3, 70), (3, 1, 1)])
    @pytest.mark.parametrize(('channels', 'outputs'), [(3, 16), (3, 24), (12, 24)])
    def test_head(self, channels: int, outputs: int, size: tuple[int, int, int]) -> None:
        n, h, w = size
        conv = nn.Conv2d(channels, outputs, 3, padding=1)
        self._compare(resampling.head, conv, _image(n, channels, h, w).float())

    @pytest.mark.parametrize('size', [(2, 8, 10), (1, 3, 70), (3, 1, 1)])
    @pytest.mark.parametrize('channels', [16, 24])
    def test_down(self, channels: int, size: tuple[int, int, int]) -> None:
        n, h, w = size
        conv = nn.Conv2d(channels, 2 * channels, 2, stride=2)
        self._compare(resampling.down, conv, _image(n, channels, 2 * h, 2 * w).float())

    @pytest.mark.parametrize('skip', [True, False])
    @pytest.mark.parametrize('size', [(2, 8, 10), (1, 3, 70), (3, 1, 1)])
    @pytest.mark.parametrize('channels', [16, 24])
    def test_up(self, channels: int, size: tuple[int, int, int], skip: bool) -> None:
        n, h, w = size
        shuffled = nn.Sequential(nn.Conv2d(2 * channels, 4 * channels, 1, bias=False), nn.PixelShuffle(2))
        x, added = _image(n, 2 * channels, h, w).float(), _image(n, channels, 2 * h, 2 * w).float()
        if skip:
            self._compare(resampling.up, shuffled, x, added)
        else:
            self._compare(lambda module, x: resampling.up(module, x, None), shuffled, x)

    @pytest.mark.parametrize('size', [(2, 16, 20), (1, 3, 70), (3, 1, 1)])
    def test_tail(self, size: tuple[int, int, int]) -> None:
        n, h, w = size
        conv = nn.Conv2d(32, 3, 3, padding=1)
        self._compare(resampling.tail, conv, _image(n, 32, h, w).float(), _image(n, 3, h, w).float())

    @pytest.mark.parametrize('threads', [1, 3])
    def test_sharing_out_among_threads(self, threads: int) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            self.test_down(16, (2, 8, 10))
            self.test_head(3, 16, (1, 2, 70))
        finally:
            torch.set_num_threads(before)

    def test_frozen_kernels(self) -> None:
        conv, x = (
            nn.Conv2d(16, 32, 2, stride=2).requires_grad_(False),
            _image(1, 16, 8, 8).float().requires_grad_(),
        )
        resampling.down(conv, x).sum().backward()
        assert x.grad is not None
        assert conv.weight.grad is None
        assert conv.bias is not None
        assert conv.bias.grad is None
