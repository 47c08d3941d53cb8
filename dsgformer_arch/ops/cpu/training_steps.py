"""The steps outside the levels on a CPU, for training: what `binding` computes, and its gradients.

The gradient of a step's input is a step of another kind: downsampling's is
upsampling with the same numbers in another order, and the other way round; that
of a 3×3 convolution to few channels is a convolution of few channels.  The
gradients of the kernels are products over all pixels, by `backward.h`.  There
is no second derivative.
"""

from __future__ import annotations

import ctypes
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsgformer_arch.ops import memory
from dsgformer_arch.ops.cpu import binding, training

Gradients = tuple[Tensor | None, ...]


class _Step(ctypes.Structure):
    """`struct Step` of `backward.h`."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ('rows', 'pixels', 'a_width', 'b_width', 'height', 'channels', 'a_row', 'b_row')
        ),
        *((name, ctypes.c_void_p) for name in ('a', 'b', 'weight', 'bias', 'y', 'sums')),
    ]


def convolved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 3×3 convolution of few channels, with a padding of 1.

    Args:
        x: (N, H, W, c), contiguous, float32 or bfloat16.
        weight: (C, c, 3, 3), float32; C a multiple of 8.
        bias: (C,), float32.

    Returns:
        (N, H, W, C), contiguous, of the type of x.
    """
    return cast(Tensor, _Convolved.apply(x, weight, bias))


def downsampled(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 2×2 convolution of stride 2.

    Args:
        x: (N, 2H, 2W, C), contiguous, float32 or bfloat16.
        weight: (C', C, 2, 2), float32; C' and 2C multiples of 16.
        bias: (C',), float32.

    Returns:
        (N, H, W, C'), contiguous, of the type of x.
    """
    return cast(Tensor, _Downsampled.apply(x, weight, bias))


def upsampled(x: Tensor, weight: Tensor, skip: Tensor | None) -> Tensor:
    """A 1×1 convolution, then PixelShuffle(2), and the sum with `skip`.

    Args:
        x: (N, H, W, C'), contiguous, float32 or bfloat16.
        weight: (4C, C', 1, 1), float32; C' and 2C multiples of 16.
        skip: (N, 2H, 2W, C), contiguous, of the type of x; or None.

    Returns:
        (N, 2H, 2W, C), contiguous, of the type of x.
    """
    return cast(Tensor, _Upsampled.apply(x, weight, skip))


def tail(x: Tensor, weight: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
    """A 3×3 convolution to 3 channels, with a padding of 1, and the sum with `skip`.

    Args:
        x: (N, H, W, C), contiguous, float32 or bfloat16; C a multiple of 16.
        weight: (3, C, 3, 3), float32.
        bias: (3,), float32.
        skip: (N, H, W, 3), contiguous, float32.

    Returns:
        (N, H, W, 3), contiguous, float32.
    """
    return cast(Tensor, _Tail.apply(x, weight, bias, skip))


class _Convolved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _convolve(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        x, weight = ctx.saved_tensors
        dy = dy.contiguous()
        products, sums = _correlate(dy, x)
        dx = None
        if ctx.needs_input_grad[0]:  # not in a network, where x is the image
            first = (dy.float().permute(0, 3, 1, 2), weight)
            dx = F.conv_transpose2d(*first, padding=1).permute(0, 2, 3, 1).to(x.dtype)
        return dx, products.permute(0, 3, 1, 2).contiguous(), sums


class _Downsampled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        # (C', C, 2, 2) as (row, C', (column, C)): what a row of the image is multiplied with
        return binding.downsampled(x, weight.permute(2, 0, 3, 1).contiguous(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        x, weight = ctx.saved_tensors
        dy = dy.contiguous()
        dx = None
        if ctx.needs_input_grad[0]:
            dx = binding.upsampled(dy, weight.permute(2, 3, 1, 0).contiguous(), None)
        products, sums = _correlate_fine(dy, x)  # (row, C', column, C)
        return dx, products.permute(1, 3, 0, 2).contiguous(), sums


class _Upsampled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, skip: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        # (4C, C') with PixelShuffle's (C, row, column) first, as (row, (column, C), C')
        split = weight.view(-1, 2, 2, x.shape[-1])
        return binding.upsampled(x, split.permute(1, 2, 0, 3).contiguous(), skip)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        x, weight = ctx.saved_tensors
        dy = dy.contiguous()
        dx = None
        if ctx.needs_input_grad[0]:
            split = weight.view(-1, 2, 2, x.shape[-1]).permute(1, 3, 2, 0).contiguous()
            dx = binding.downsampled(dy, split, weight.new_zeros(x.shape[-1]))
        products, _ = _correlate_fine(x, dy)  # (row, C', column, C)
        d_weight = products.permute(3, 0, 2, 1).reshape(weight.shape)
        return dx, d_weight, dy if ctx.needs_input_grad[2] else None


class _Tail(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        # (3, C, 3, 3) as ((row, column, 3), C): a pixel gives its numbers to the neighbours that see it there
        taps = weight.permute(2, 3, 0, 1).flatten(0, 2)
        return binding.tail(x, F.pad(taps, (0, 0, 0, -len(taps) % binding.LANES)), bias, skip)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        x, weight = ctx.saved_tensors
        narrow = dy.to(x.dtype).contiguous()
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _convolve(narrow, weight.transpose(0, 1).flip(2, 3), None)
        products, _ = _correlate(x, narrow)  # (C, row, column, 3), the neighbourhood turned round
        d_weight = products.flip(1, 2).permute(3, 0, 1, 2).contiguous()
        return dx, d_weight, dy.sum((0, 1, 2)), dy if ctx.needs_input_grad[3] else None


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 3×3 convolution of (N, H, W, c) by (C, c, 3, 3), with a padding of 1; c is small."""
    n, height, width, channels = x.shape
    taps = weight.permute(0, 2, 3, 1).flatten(1)
    taps = F.pad(taps, (0, -taps.shape[1] % training.LANES)).contiguous()
    y = memory.pool.empty((n, height, width, len(taps)), x.dtype)
    call = _Step(n * height, width, len(taps), 0, height, channels)
    call.b, call.weight, call.y = x.data_ptr(), taps.data_ptr(), y.data_ptr()
    call.bias = None if bias is None else bias.data_ptr()
    training.enter('convolve', x.dtype, call)
    return y


def _correlate(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Σ aᵀ b over all pixels, b taken by its 3×3 neighbourhoods, and Σ a.

    Args:
        a: (N, H, W, C).
        b: (N, H, W, c), c small.

    Returns:
        (C, 3, 3, c) and (C,), float32.
    """
    n, height, width, channels = a.shape
    few = b.shape[-1]
    filled = -(-9 * few // training.LANES) * training.LANES
    # Of the device and the type that the kernel writes, whatever the defaults are.
    products, sums = (a.new_empty(size, dtype=torch.float32) for size in ((channels, filled), (channels,)))
    call = _Step(n * height, width, channels, 0, height, few, width * channels)
    call.a, call.b, call.y, call.sums = a.data_ptr(), b.data_ptr(), products.data_ptr(), sums.data_ptr()
    training.enter('correlate', a.dtype, call)
    return products[:, : 9 * few].unflatten(1, (3, 3, few)), sums


def _correlate_fine(coarse: Tensor, fine: Tensor) -> tuple[Tensor, Tensor]:
    """Σ of each pixel of `coarse` times the 2×2 pixels of `fine` there, and Σ of `coarse`.

    Args:
        coarse: (N, H, W, C').
        fine: (N, 2H, 2W, C).

    Returns:
        (2, C', 2, C) of rows, C', columns, C; and (C',); float32.
    """
    n, height, width, channels = coarse.shape
    pair = 2 * fine.shape[-1]
    sizes = ((2, channels, pair), (channels,))
    products, sums = (coarse.new_empty(size, dtype=torch.float32) for size in sizes)
    for i in range(2):
        call = _Step(n * height, width, channels, pair, 0, 0, width * channels, 2 * width * pair)
        call.a, call.y, call.sums = coarse.data_ptr(), products[i].data_ptr(), sums.data_ptr()
        call.b = fine.data_ptr() + i * width * pair * fine.element_size()
        training.enter('correlate', coarse.dtype, call)
    return products.unflatten(2, (2, -1)), sums
