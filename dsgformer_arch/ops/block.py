"""Chooses the implementation of the block for each call; `resampling.py` does so for the other steps.

| implementation | when |
|---|---|
| reference: the modules, called one by one | `'plain'`; a child with hooks, an adapter or another class than the network gave it; function transforms; tensors that are not plain ones of one device |
| operator `dsgformer::block` | the paper's switches; a CPU without gradients, or a GPU in bfloat16 or float16 |
| kernels with gradients | training on a CPU in float32 or bfloat16 |
| eager: strips of rows with a map for each window | local pooling (`archs.tlc`) without gradients |
| eager: whole tensors, or strips of rows | everything else: export, float64, variants of the ablation |
"""  # noqa: E501

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.checkpoint import checkpoint

from dsgformer_arch.ops import eager, library
from dsgformer_arch.ops.compiling import constant_when_compiled
from dsgformer_arch.ops.cpu import binding, training

if TYPE_CHECKING:
    from dsgformer_arch.archs.dsgformer_arch import DSGA

Path = Literal['fast', 'eager', 'plain']

_forced: ContextVar[Path | None] = ContextVar('_forced', default=None)


def path() -> Path:
    """The implementations that may run now.

    `'fast'`: all; the fastest that suits a call is taken.  `'eager'` (`DSGFORMER_EAGER=1`): the same without
    compiled kernels.  `'plain'` (`DSGFORMER_PLAIN=1`): the reference implementation only.
    """
    forced = _forced_path()
    if forced is not None:
        return forced
    if _set('DSGFORMER_PLAIN'):
        return 'plain'
    return 'eager' if _set('DSGFORMER_EAGER') else 'fast'


@constant_when_compiled  # a compiled network keeps the choice made at compilation
def _forced_path() -> Path | None:
    return _forced.get()


@contextmanager
def use(chosen: Path) -> Iterator[None]:
    """Run one implementation within a `with` statement and this thread, whatever the environment says."""
    token = _forced.set(chosen)
    try:
        yield
    finally:
        _forced.reset(token)


def _set(name: str) -> bool:
    return os.environ.get(name, '0') not in ('', '0')


def fast(x: Tensor) -> bool:
    """Whether another than the reference implementation may run for an image or a feature map x.

    Function transforms (`vmap`, `func.grad`, `jvp`) and forward-mode differentiation take the reference.
    """
    return (
        path() != 'plain'
        and is_plain(x)
        and x.ndim == 4
        and x.numel() > 0
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def forward(block: DSGA, X: Tensor) -> Tensor:
    """Y of the block, by the implementation that suits the call.

    Under autocast the parameters and X are cast once, here; the sum with X
    keeps the type of X if it is the wider one, as in the reference.

    Args:
        block: the block whose parameters are used.
        X: (N, C, H, W), channels-last for speed.

    Returns:
        (N, C, H, W), channels-last unless the reference ran.
    """
    if not fast(X) or not _as_built(block, X):
        if block.recompute and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(block.reference, X, use_reentrant=False))
        return block.reference(X)
    dtype = computing_dtype(X)
    residual = X.permute(0, 2, 3, 1).contiguous()
    if _operator_takes(block, X, dtype):
        tensors = (
            residual,
            block.norm.weight,
            block.norm.bias,
            block.project_in.weight,
            block.depthwise.weight,
            block.project_out.weight,
            block.attention.temperature,
            block.attention.weights,
            cast(Tensor, block.gate.mask),
        )
        operator: Callable[..., Any] = (
            library.block if library.needs_dispatcher(*tensors) else library.block_on_cpu
        )
        y, _ = operator(*tensors, block.attention.heads, block.attention.top_k, dtype)
        return cast(Tensor, y).permute(0, 3, 1, 2)
    if (
        dtype == X.dtype
        and _is_trained_on_cpu(X)
        and training.takes(dtype, X.shape[1], block.attention.heads)
    ):
        recompute = block.recompute or X.nbytes > eager.KEPT_BYTES['cpu']
        weights = eager.Weights.of(block, torch.float32)
        return training.differentiable(residual, weights, recompute).permute(0, 3, 1, 2)
    with torch.autocast(X.device.type, enabled=False):
        weights = eager.Weights.of(block, dtype)
        x = residual.to(dtype)
        if torch.is_grad_enabled():
            if not block.recompute and x.nbytes <= eager.KEPT_BYTES.get(X.device.type, 0):
                y = eager.whole(x, residual, weights)
            else:
                y = eager.recomputing(x, residual, weights, block.recompute)
        elif _is_traced() or eager.strip_rows(x) >= x.shape[1]:
            y = eager.whole(x, residual, weights)
        else:
            y = eager.in_strips(x, residual, weights)
        return y.permute(0, 3, 1, 2)


def forward_in_windows(block: DSGA, X: Tensor, grid: Callable[[int, int], eager.Grid]) -> Tensor:
    """Y of a block whose attention runs in windows (local pooling).

    Args:
        block: the block; its attention is an `archs.tlc.Windowed`, which the reference calls.
        X: (N, C, H, W).
        grid: takes H and W, returns the windows.

    Returns:
        (N, C, H, W), channels-last unless the reference ran.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or _is_traced() or not fast(X):
        return block.reference(X)
    if not _as_built(block, X, replaced=('attention',)):
        return block.reference(X)
    dtype = computing_dtype(X)
    residual = X.permute(0, 2, 3, 1).contiguous()
    with torch.autocast(X.device.type, enabled=False):
        weights = eager.Weights.of(block, dtype)
        y = eager.in_windows(residual.to(dtype), residual, weights, grid(X.shape[-2], X.shape[-1]))
    return y.permute(0, 3, 1, 2)


def _operator_takes(block: DSGA, X: Tensor, dtype: torch.dtype) -> bool:
    """Whether `dsgformer::block` computes the block: a kernel takes it, and its result can be used."""
    attention = block.attention
    if path() != 'fast' or _is_traced():
        return False
    if attention.score != 'relu2' or not attention.top_k or not hasattr(block.gate, 'mask'):
        return False
    if X.device.type == 'cpu':
        width = X.shape[1] // attention.heads
        return not torch.is_grad_enabled() and dtype == X.dtype and binding.takes(dtype, width)
    if X.device.type == 'cuda' and (kernels := library.triton_kernels()) is not None:
        return bool(kernels.takes(X.device, dtype, X.shape[1], attention.heads))
    return False


def _is_trained_on_cpu(x: Tensor) -> bool:
    """Whether the training kernels may run: they are no PyTorch operators and need tensors with values."""
    return (
        torch.is_grad_enabled()
        and x.device.type == 'cpu'
        and path() == 'fast'
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode())
        and not x.is_neg()
    )


def trains_step(conv: nn.Conv2d, x: Tensor, shape: tuple[int, ...], *widths: int) -> torch.dtype | None:
    """The type in which kernels train a step outside the levels; None if its modules must be called.

    Args:
        conv: the step's convolution.
        x: its input, (N, C, H, W).
        shape: the required shape of its weight.
        widths: sizes that must be multiples of the kernels' vectors.
    """
    if not fast(x) or not _is_trained_on_cpu(x) or not is_untouched(conv, nn.Conv2d):
        return None
    parameters = (
        [(conv.weight, shape)] if conv.bias is None else [(conv.weight, shape), (conv.bias, shape[:1])]
    )
    if conv.groups != 1 or conv.dilation != (1, 1) or conv.padding_mode != 'zeros':
        return None
    if not all(suits(parameter, size, x) for parameter, size in parameters):
        return None
    dtype = computing_dtype(x)
    return dtype if binding.takes(dtype, *widths) and training.works(dtype).passed else None


def _is_traced() -> bool:
    """Whether a program is being recorded that must run with PyTorch's operators alone."""
    return torch.jit.is_tracing() or _is_exporting()


_is_exporting = getattr(torch.compiler, 'is_exporting', torch.compiler.is_compiling)  # new in torch 2.7


def computing_dtype(x: Tensor) -> torch.dtype:
    """The type of products with x: autocast's, which leaves float64 alone, or that of x."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def is_untouched(module: nn.Module, kind: type[nn.Module], replaced: bool = False) -> bool:
    """Whether `module` is exactly a `kind`, and calling it would do nothing but its `forward`.

    Adapters, parametrizations, pruning, weight normalization, sharding and quantization show here.

    Args:
        module: the module.
        kind: the class.
        replaced: whether its `forward` is known to be replaced.
    """
    return (
        type(module) is kind
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and (replaced or 'forward' not in vars(module))
    )


def _is_convolution(conv: nn.Module, channels_in: int, channels_out: int, side: int, groups: int = 1) -> bool:
    """Whether `conv` is an untouched convolution without bias, of stride 1, that keeps height and width."""
    return (
        is_untouched(conv, nn.Conv2d)
        and (conv.in_channels, conv.out_channels, conv.groups) == (channels_in, channels_out, groups)
        and conv.kernel_size == (side, side)
        and conv.padding == (side // 2, side // 2)
        and conv.stride == (1, 1)
        and conv.dilation == (1, 1)
        and (conv.padding_mode == 'zeros' or side == 1)
        and conv.bias is None
    )


def _as_built(block: DSGA, X: Tensor, replaced: Sequence[str] = ()) -> bool:
    """Whether the children and the parameters of `block` are those that it was built with, and fit X.

    Args:
        block: the block.
        X: its input, (N, C, H, W).
        replaced: children whose `forward` is known to be replaced.
    """
    C, heads = X.shape[1], block.attention.heads
    kinds = block.kinds
    gate = block.gate
    if not all(is_untouched(getattr(block, name), kind, name in replaced) for name, kind in kinds.items()):
        return False
    if not (is_untouched(gate, block.gate_kind) and getattr(gate, 'approximate', 'none') == 'none'):
        return False
    if torch.nn.modules.module._has_any_global_hook() or C % heads:
        return False
    if not (
        _is_convolution(block.project_in, C, 4 * C, 1)
        and _is_convolution(block.depthwise, 4 * C, 4 * C, 3, 4 * C)
        and _is_convolution(block.project_out, C, C, 1)
    ):
        return False
    attention = block.attention
    parameters: list[tuple[Any, tuple[int, ...]]] = [
        (block.norm.weight, (C,)),
        (block.norm.bias, (C,)),
        (block.project_in.weight, (4 * C, C, 1, 1)),
        (block.depthwise.weight, (4 * C, 1, 3, 3)),
        (block.project_out.weight, (C, C, 1, 1)),
        (attention.temperature, (heads, 1, 1)),
    ]
    if attention.top_k:
        parameters.append((attention.weights, (len(attention.top_k),)))
    if hasattr(gate, 'mask'):
        parameters.append((gate.mask, (C, 8, 5)))
    for parameter, _ in parameters:
        if parameter.device != X.device and _is_dense(parameter):
            # PyTorch's convolution reads a CPU's image with the weights of the meta device without an error.
            raise RuntimeError(
                'Expected all tensors to be on the same device, but the parameters of DSGA are on '
                f'{parameter.device} and its input is on {X.device}'
            )
    return all(suits(parameter, shape, X) for parameter, shape in parameters)


def _is_dense(x: Tensor) -> bool:
    """Whether x is of no subclass: not fake, sharded or quantized."""
    return type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided


def is_plain(x: Tensor) -> bool:
    """Whether x is a dense tensor of floating-point numbers, with values."""
    return _is_dense(x) and x.is_floating_point() and not x.is_meta


def suits(parameter: Any, shape: tuple[int, ...], X: Tensor) -> bool:
    """Whether a parameter is a plain tensor of `shape`, on the device of X, of its type or autocast."""
    return (
        isinstance(parameter, Tensor)
        and is_plain(parameter)
        and parameter.shape == shape
        and parameter.device == X.device
        and (parameter.dtype == X.dtype or torch.is_autocast_enabled(X.device.type))
    )
