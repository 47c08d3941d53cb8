"""Calls that no compiled kernel may take, and modes of PyTorch: the reference's result, or its error."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.utils import parametrizations, prune

from dsgformer_arch import ops
from dsgformer_arch.archs.dsgformer_arch import DSGA, DSGformer
from tests.trees import ROOT

HEADS = (1, 1, 1, 1)


def _network() -> DSGformer:
    """A network whose blocks and upsampling all suit the kernels."""
    torch.manual_seed(0)
    return DSGformer(width=16, num_blocks=(1, 1, 1, 1), heads=HEADS).eval()


def _block() -> DSGA:
    torch.manual_seed(0)
    return DSGA(32, 2).eval()


def _image(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _like_the_reference(module: nn.Module, image: Tensor) -> Tensor:
    """The module's result, which must be the reference's; where that raises, the module must too."""
    try:
        with ops.use('plain'):
            expected = module(image)
    except Exception as reason:
        with pytest.raises(type(reason)):
            module(image)
        return image
    given = module(image)
    assert given.device == expected.device
    assert given.dtype == expected.dtype
    if not given.is_meta:
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)
    return given


@pytest.mark.parametrize('grad', [False, True])
def test_a_network_on_another_device_than_its_image(grad: bool) -> None:
    network, block = _network().to('meta'), _block().to('meta')
    with torch.set_grad_enabled(grad):
        _like_the_reference(network, _image(1, 3, 16, 16))
        _like_the_reference(block, _image(1, 32, 8, 8))


@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize('name', ['norm', 'project_in', 'depthwise', 'attention', 'gate', 'project_out'])
def test_one_module_on_another_device(name: str, grad: bool) -> None:
    """PyTorch's convolution of a CPU's image and a weight without values returns uninitialised memory."""
    block = _block()
    block.get_submodule(name).to('meta')
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match='on the same device'):
        block(_image(1, 32, 8, 8))


def test_fake_weights_and_a_real_image() -> None:
    with FakeTensorMode():
        network = _network()
    with torch.inference_mode():
        _like_the_reference(network, _image(1, 3, 16, 16))


def test_weights_of_another_type() -> None:
    block = _block()
    block.depthwise.bfloat16()
    with torch.inference_mode():
        _like_the_reference(block, _image(1, 32, 8, 8))


def test_a_wider_head_and_a_wider_tail() -> None:
    network = _network()
    network.head = nn.Conv2d(3, 16, 5, padding=2)
    network.tail = nn.Conv2d(32, 3, 1)
    with torch.inference_mode():
        _like_the_reference(network, _image(1, 3, 24, 16))
    network.head = nn.Conv2d(12, 16, 3, padding=1)
    network.tail = nn.Conv2d(32, 12, 3, padding=1)
    with torch.inference_mode():
        _like_the_reference(network, _image(1, 12, 24, 16))


@pytest.mark.parametrize(
    ('name', 'other'),
    [
        ('project_in', nn.Conv2d(32, 128, 1)),  # with a bias
        ('project_in', nn.Conv2d(32, 128, 3, padding=1, bias=False)),
        ('depthwise', nn.Conv2d(128, 128, 3, padding=1, groups=64, bias=False)),
        ('depthwise', nn.Conv2d(128, 128, 3, padding=2, dilation=2, groups=128, bias=False)),
        ('depthwise', nn.Conv2d(128, 128, 3, padding=1, groups=128, padding_mode='reflect', bias=False)),
        ('project_out', nn.Conv2d(32, 32, 1)),
        ('gate', nn.GELU(approximate='tanh')),
        ('gate', nn.SiLU()),
        ('norm', nn.InstanceNorm2d(32)),
    ],
    ids=str,
)
@pytest.mark.parametrize('grad', [False, True])
def test_a_replaced_module_counts(name: str, other: nn.Module, grad: bool) -> None:
    block = _block()
    setattr(block, name, other)
    with torch.set_grad_enabled(grad):
        _like_the_reference(block, _image(1, 32, 8, 9))


@pytest.mark.parametrize('grad', [False, True])
def test_every_hook_fires(grad: bool) -> None:
    """64 modules are called: all but lists, and the levels, whose blocks are called one by one."""

    def fired(path: ops.Path) -> list[str]:
        network = _network()
        names: list[str] = []
        for name, module in network.named_modules():
            module.register_forward_hook(lambda *_, name=name: names.append(name))
        with ops.use(path), torch.set_grad_enabled(grad):
            network(_image(1, 3, 16, 16))
        return names

    assert len(fired('plain')) == 64
    assert fired('fast') == fired('plain')


@pytest.mark.parametrize(
    'name', ['tail', 'head', 'up.0', 'up.1.0', 'encoder.0.0.attention', 'decoder.2.0.gate']
)
def test_a_hook_that_changes_the_output_counts(name: str) -> None:
    network, image = _network(), _image(1, 3, 16, 16)
    with torch.inference_mode():
        before = network(image)
        network.get_submodule(name).register_forward_hook(lambda module, given, output: output * 2)
        assert not torch.equal(_like_the_reference(network, image), before)


def test_a_pre_hook_and_global_hooks_count() -> None:
    block, image = _block(), _image(1, 32, 8, 8)
    block.depthwise.register_forward_pre_hook(lambda module, given: (given[0] * 2,))
    with torch.inference_mode():
        _like_the_reference(block, image)
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        plain = _block()
        with torch.inference_mode():
            plain(image)
    finally:
        handle.remove()
    assert plain.project_out in seen


def test_a_replaced_forward_counts() -> None:
    block = _block()
    forward = block.project_in.forward
    block.project_in.forward = lambda x: forward(x) * 2  # type: ignore[method-assign]
    with torch.inference_mode():
        _like_the_reference(block, _image(1, 32, 8, 8))


class _Adapter(nn.Module):
    """A low-rank adapter as in LoRA, which shows the weight of the convolution that it wraps."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.down = nn.Conv2d(conv.in_channels, 2, 1, bias=False)
        self.up = nn.Conv2d(2, conv.out_channels, 1, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.up(self.down(x))


def test_adapters_count_and_learn() -> None:
    network = _network().requires_grad_(False)
    adapters = []
    for module in network.modules():
        if isinstance(module, DSGA):
            for name in ('project_in', 'project_out'):
                adapters.append(_Adapter(getattr(module, name)))
                setattr(module, name, adapters[-1])
    with torch.inference_mode():
        _like_the_reference(network, _image(1, 3, 16, 16))
    network(_image(1, 3, 16, 16)).sum().backward()
    tensors = [conv.weight for adapter in adapters for conv in (adapter.down, adapter.up)]
    assert len(tensors) == 28
    assert all(tensor.grad is not None for tensor in tensors)


@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.parametrize(
    'change',
    [
        lambda conv: prune.random_unstructured(conv, 'weight', 0.5),
        lambda conv: nn.utils.weight_norm(conv),
        parametrizations.weight_norm,
    ],
    ids=['prune', 'old weight_norm', 'weight_norm'],
)
def test_derived_weights_are_up_to_date(change: Callable[[nn.Module], Any]) -> None:
    block, image = _block(), _image(1, 32, 8, 8)
    change(block.project_in)
    with torch.no_grad():
        before = block(image)
        for parameter in block.project_in.parameters():
            parameter.mul_(torch.rand_like(parameter))
        assert not torch.equal(_like_the_reference(block, image), before)


def test_parameters_that_are_tensor_subclasses() -> None:
    class Scaled(Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = super().__torch_function__(function, types, args, kwargs or {})
            return result * 2 if function is torch.nn.functional.conv2d else result

    block, image = _block(), _image(1, 32, 8, 8)
    block.project_in.weight = nn.Parameter(block.project_in.weight.detach().as_subclass(Scaled))
    with torch.inference_mode():
        _like_the_reference(block, image)


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures('process_group')
def test_convolutions_that_fsdp2_shards() -> None:
    """FSDP2 gives each sharded module a class of its own, and its parameters are distributed tensors."""
    fsdp = pytest.importorskip('torch.distributed.fsdp')
    if not hasattr(fsdp, 'fully_shard'):
        pytest.skip('this PyTorch has no FSDP2')
    network, image = _network(), _image(1, 3, 24, 24)
    sharded = copy.deepcopy(network)
    mesh = init_device_mesh('cpu', (1,))
    for module in [module for module in sharded.modules() if isinstance(module, nn.Conv2d)] + [sharded]:
        fsdp.fully_shard(module, mesh=mesh)
    with ops.use('plain'):
        expected = network(image)
        expected.square().mean().backward()
    restored = sharded(image)
    torch.testing.assert_close(restored, expected, rtol=1e-4, atol=1e-5)
    restored.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in sharded.named_parameters()}
    for name, parameter in network.named_parameters():
        gradient: Any = gradients[name]
        torch.testing.assert_close(gradient.full_tensor(), parameter.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize('shape', [(1, 32, 1, 1), (2, 32, 1, 7), (0, 32, 8, 8), (1, 16, 8, 8), (32, 8, 8)])
def test_unusual_shapes(shape: tuple[int, ...]) -> None:
    with torch.inference_mode():
        _like_the_reference(_block(), _image(*shape))


def test_maps_of_one_score_and_images_of_one_block() -> None:
    with torch.inference_mode():
        _like_the_reference(DSGA(4, 4), _image(1, 4, 8, 8))
        _like_the_reference(_network(), _image(1, 3, 8, 8))


@pytest.mark.parametrize('channels_last', [False, True])
def test_negated_views(channels_last: bool) -> None:
    image = _image(1, 32, 8, 8)
    if channels_last:
        image = image.contiguous(memory_format=torch.channels_last)
    image = torch._neg_view(image)
    with torch.inference_mode():
        _like_the_reference(_block(), image)
    block = _block()
    block.project_in.weight = nn.Parameter(torch._neg_view(block.project_in.weight.detach()))
    with torch.inference_mode():
        _like_the_reference(block, image)


@pytest.mark.parametrize('enabled', [False, True])
def test_float64_under_autocast(enabled: bool) -> None:
    network, image = _network().double(), _image(1, 3, 16, 16).double()
    with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16, enabled=enabled):
        given = _like_the_reference(network, image)
    assert given.dtype == torch.float64


def test_without_onednn() -> None:
    block, image = _block(), _image(1, 32, 8, 8)
    with torch.inference_mode(), torch.backends.mkldnn.flags(enabled=False):
        _like_the_reference(block, image)


class TestTransforms:
    """Function transforms and forward-mode differentiation, of the block and of the network."""

    @pytest.fixture(params=['block', 'network'])
    def case(self, request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
        if request.param == 'block':
            return _block(), _image(1, 32, 8, 8)
        return _network(), _image(1, 3, 8, 8)

    @staticmethod
    def _both(call: Callable[[], Tensor]) -> None:
        with ops.use('plain'):
            expected = call()
        given = call()
        assert expected is not None
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize('grad', [False, True])
    def test_vmap(self, case: tuple[nn.Module, Tensor], grad: bool) -> None:
        module, image = case
        with torch.set_grad_enabled(grad):
            self._both(lambda: torch.func.vmap(module)(torch.stack([image, image * 0.5])))

    @pytest.mark.parametrize('enabled', [False, True])
    def test_grad(self, case: tuple[nn.Module, Tensor], enabled: bool) -> None:
        module, image = case
        parameters = {name: value.detach() for name, value in module.named_parameters()}

        def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
            return torch.func.functional_call(module, parameters, (image,)).square().sum()

        with torch.set_grad_enabled(enabled):
            self._both(lambda: next(iter(torch.func.grad(loss)(parameters, image).values())))

    @pytest.mark.parametrize('enabled', [False, True])
    def test_jvp(self, case: tuple[nn.Module, Tensor], enabled: bool) -> None:
        module, image = case
        with torch.set_grad_enabled(enabled):
            self._both(lambda: torch.func.jvp(module, (image,), (torch.ones_like(image),))[1])

    @pytest.mark.parametrize('enabled', [False, True])
    def test_forward_mode(self, case: tuple[nn.Module, Tensor], enabled: bool) -> None:
        module, image = case

        def tangent() -> Tensor:
            with torch.set_grad_enabled(enabled), forward_ad.dual_level():
                output = module(forward_ad.make_dual(image, torch.ones_like(image)))
                return forward_ad.unpack_dual(output).tangent

        self._both(tangent)


def test_one_thread_does_not_choose_for_another() -> None:
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        with ops.use('plain'):
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=other)
    before = ops.path()
    with ops.use('eager'):
        thread.start()
        inside.wait(10)
        assert ops.path() == 'eager'
    assert ops.path() == before
    done.set()
    thread.join()
    assert ops.path() == before


STATES = {
    'default device': "torch.set_default_device('meta')",
    'default dtype': 'torch.set_default_dtype(torch.float64)',
    'fake tensors': """
from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode():
    from dsgformer_arch.archs.dsgformer_arch import DSGA
    with torch.inference_mode():
        assert DSGA(16, 1)(torch.rand(1, 16, 8, 8)).shape == (1, 16, 8, 8)
    DSGA(16, 1)(torch.rand(1, 16, 8, 8)).sum().backward()
""",
    'inference mode': """
with torch.inference_mode():
    from dsgformer_arch.archs.dsgformer_arch import DSGA
    DSGA(16, 1)(torch.rand(1, 16, 8, 8))
""",
}


@pytest.mark.parametrize('state', STATES)
def test_the_state_of_the_first_call(state: str) -> None:
    """Whatever a process does first, the kernel works afterwards, and so does training."""
    code = f"""
import torch
X = torch.rand(1, 16, 8, 8)
{STATES[state]}
from dsgformer_arch import ops
from dsgformer_arch.archs.dsgformer_arch import DSGA
block = DSGA(16, 1).to_empty(device='cpu').float()
generator = torch.Generator('cpu').manual_seed(0)
with torch.no_grad():
    for parameter in block.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, device='cpu') / 4)
    block.attention.temperature.fill_(1)
with torch.inference_mode():
    torch.testing.assert_close(block(X), block.reference(X), rtol=1e-4, atol=1e-4)
torch.testing.assert_close(block(X), block.reference(X), rtol=1e-4, atol=1e-4)
block(X).sum().backward()
assert block.gate.mask.grad.abs().sum() > 0
from dsgformer_arch.archs.dsgformer_arch import DSGformer
network = DSGformer(16, (1, 1, 1, 1), (1, 1, 1, 1)).to_empty(device='cpu').float()
with torch.no_grad():
    for parameter in network.parameters():
        parameter.fill_(0.01)
network(torch.zeros(1, 3, 16, 16, dtype=torch.float32, device='cpu')).sum().backward()
assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
from tests.ops import kernel
print(ops.status().self_tests['float32'], kernel.expected())
"""
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, encoding='utf-8', check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ['passed', 'True'] or done.stdout.endswith('False\n')


def test_copies_do_not_share_what_was_changed() -> None:
    block = _block()
    twin = copy.deepcopy(block)
    twin.project_in.register_forward_hook(lambda module, given, output: output * 2)
    image = _image(1, 32, 8, 8)
    with torch.inference_mode():
        assert not torch.equal(_like_the_reference(twin, image), _like_the_reference(block, image))
