"""The compiled kernels as PyTorch operators: `torch.ops.dsgformer.block` and `torch.ops.dsgformer.upsample`.

Each has kernels for devices, a fake implementation for `torch.compile`, `torch.export` and fake tensors, and
a gradient; `flops` counts their operations.  Where its kernel cannot run or fails, an operator runs the eager
implementation and warns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from dsgformer_arch.ops import eager, selftest
from dsgformer_arch.ops.cpu import binding


def block_on_cpu(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    project_in: Tensor,
    depthwise: Tensor,
    project_out: Tensor,
    temperature: Tensor,
    step: Tensor,
    mask: Tensor,
    heads: int,
    top_k: Sequence[int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The block DSGA with the paper's switches.

    Args:
        x: X, (N, H, W, C), contiguous.
        norm_weight: of LN, (C,).
        norm_bias: of LN, (C,).
        project_in: W_p, (4C, C, 1, 1).
        depthwise: W_d, (4C, 1, 3, 3).
        project_out: W_p', (C, C, 1, 1).
        temperature: α, (heads, 1, 1).
        step: W_n, (N,).
        mask: M of DFGB, (C, 8, 5).
        heads: heads of c = C / heads channels.
        top_k: k_n, increasing.
        dtype: the type in which products are computed.

    Returns:
        Y, (N, H, W, C), of the type of x; and the scores A, (N, heads, c, c), without a gradient.
    """
    parameters = (norm_weight, norm_bias, project_in, depthwise, project_out, temperature, step, mask)
    weights = _weights(parameters, heads, top_k)
    if dtype == x.dtype and binding.takes(dtype, x.shape[-1] // heads):
        try:
            return binding.block(x, weights)
        except binding.UnavailableError as reason:
            selftest.warn_once(f'cpu {dtype}', str(reason))
    return _eager_block(x, weights, dtype)


block = torch.library.custom_op('dsgformer::block', mutates_args=(), device_types='cpu')(block_on_cpu)


@block.register_kernel('cuda')
def _block_on_gpu(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *parameters, heads, top_k, dtype = arguments
    weights = _weights(parameters, heads, top_k)
    gpu = triton_kernels()
    if gpu is not None and gpu.takes(x.device, dtype, x.shape[-1], heads):
        try:
            with torch.autocast('cuda', enabled=False):
                return gpu.restored(x.to(dtype), x, weights.to(dtype))
        except Exception as reason:  # Triton compiles for each new size
            if selftest.transient(reason):
                raise
            gpu.disable(x.device, dtype, x.shape[-1], heads, str(reason))
            selftest.warn_once(f'{x.device} {dtype}', str(reason))
    return _eager_block(x, weights, dtype)


@block.register_fake
def _(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    heads = arguments[8]
    c = x.shape[-1] // heads
    return torch.empty_like(x), x.new_empty((x.shape[0], heads, c, c), dtype=_scores_dtype(arguments[-1]))


def upsample_on_cpu(x: Tensor, weight: Tensor, skip: Tensor | None) -> Tensor:
    """`eager.upsample`: PixelShuffle of a 1×1 convolution, plus a skip connection.

    Args:
        x: (N, H, W, C'), contiguous.
        weight: of the convolution, (4C, C', 1, 1).
        skip: (N, 2H, 2W, C), contiguous, of the type of x; or None.

    Returns:
        (N, 2H, 2W, C), contiguous, of the type of x.
    """
    if binding.takes(x.dtype, 2 * (weight.shape[0] // 4), x.shape[-1]):
        try:
            return binding.upsample(x, weight, skip)
        except binding.UnavailableError as reason:
            selftest.warn_once(f'cpu {x.dtype}', str(reason))
    with torch.autocast('cpu', enabled=False):
        return eager.upsample(x, weight.to(x.dtype), skip).contiguous()


upsample = torch.library.custom_op('dsgformer::upsample', mutates_args=(), device_types='cpu')(
    upsample_on_cpu
)


def needs_dispatcher(*tensors: Tensor) -> bool:
    """Whether an operator of these tensors has to be called as such, rather than its function for the CPU.

    The first call of an operator that is defined in Python imports PyTorch's compiler, which takes a second:
    as long as restoring some megapixels. The dispatcher also computes negated views, which the kernels do not
    know.
    """
    return (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or any(tensor.device.type != 'cpu' or tensor.is_neg() for tensor in tensors)
    )


@upsample.register_fake
def _(x: Tensor, weight: Tensor, skip: Tensor | None) -> Tensor:
    n, height, width, _ = x.shape
    return x.new_empty((n, 2 * height, 2 * width, weight.shape[0] // 4))


def _weights(parameters: Sequence[Tensor], heads: int, top_k: Sequence[int]) -> eager.Weights:
    """Those of the operator's arguments, in its order."""
    norm_weight, norm_bias, project_in, depthwise, project_out, temperature, step, mask = parameters
    return eager.Weights(
        norm_weight,
        norm_bias,
        project_in.flatten(1),
        depthwise,
        project_out.flatten(1),
        temperature,
        step,
        mask,
        heads,
        tuple(top_k),
        'relu2',
        gelu=True,
    )


@lru_cache(maxsize=1)
def triton_kernels() -> ModuleType | None:
    """The module of GPU kernels; None without Triton, which PyTorch includes on Linux for NVIDIA GPUs."""
    try:
        from dsgformer_arch.ops import gpu
    except ImportError:
        return None
    return gpu


def _scores_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _eager_block(x: Tensor, weights: eager.Weights, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        y, scores = eager.whole_with_scores(x.to(dtype), x, weights.to(dtype))
        return y.contiguous(), scores.to(_scores_dtype(dtype))


# Gradients: the one place where they are registered.


def _differentiate(operator: Any, again: Callable[..., Tensor]) -> None:
    """Register the gradient of an operator: that of `again`, which computes its first result again.

    Nothing but the inputs and the scores is kept.  Second derivatives are those of `again`.

    Args:
        operator: the operator.
        again: takes the operator's arguments, and the scores of the forward pass if there are any.
    """

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.tensors = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
        scores = output[1:] if isinstance(output, tuple) else ()
        ctx.save_for_backward(*(inputs[i] for i in ctx.tensors), *scores)

    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        create_graph = torch.is_grad_enabled()
        saved = ctx.saved_tensors
        count = len(ctx.tensors)
        wanted = [ctx.needs_input_grad[i] for i in ctx.tensors]
        arguments = list(ctx.others)
        with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
            tensors = list(saved[:count])
            for i, needed in enumerate(wanted):
                if (
                    needed
                ):  # a new node of the graph, so that the gradient of one input passes through no other
                    value = tensors[i]
                    tensors[i] = value.view_as(value) if create_graph else value.detach().requires_grad_()
            for i, value in zip(ctx.tensors, tensors, strict=True):
                arguments[i] = value
            result = again(*arguments, *(scores.detach() for scores in saved[count:]))
            inputs = [value for value, needed in zip(tensors, wanted, strict=True) if needed]
            gradients = iter(torch.autograd.grad(result, inputs, grad, create_graph=create_graph))
        results: list[Any] = [None] * len(arguments)
        for i, needed in zip(ctx.tensors, wanted, strict=True):
            results[i] = next(gradients) if needed else None
        return tuple(results)

    operator.register_autograd(backward, setup_context=keep)


def _block_again(x: Tensor, *arguments: Any) -> Tensor:
    *parameters, heads, top_k, dtype, scores = arguments
    weights = _weights(parameters, heads, top_k).to(dtype)
    return eager.whole(x.to(dtype), x, weights, ranked_by=scores)


def _upsample_again(x: Tensor, weight: Tensor, skip: Tensor | None) -> Tensor:
    return eager.upsample(x, weight.to(x.dtype), skip)


_differentiate(block, _block_again)
_differentiate(upsample, _upsample_again)
