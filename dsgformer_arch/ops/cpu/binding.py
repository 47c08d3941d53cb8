"""Calls the compiled kernels of `kernel.cpp`."""

from __future__ import annotations

import ctypes
import logging
import subprocess
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsgformer_arch.ops import memory, selftest
from dsgformer_arch.ops.cpu import build

if TYPE_CHECKING:
    from dsgformer_arch.ops.eager import Weights

TYPES = (torch.float32, torch.bfloat16)

SCORES = ('relu2', 'relu', 'softmax')
"""The kernel's enumeration of φ."""

LANES = 16
"""The kernel's vectors hold 16 channels; a head's width must be a multiple."""

_LOG = logging.getLogger(__name__)


_POINTERS = (
    *('x', 'y', 'norm_weight', 'norm_bias', 'project_in', 'depthwise', 'project_out'),
    *('temperature', 'weights', 'top_k', 'mask'),
)


class _Call(ctypes.Structure):
    """`struct Dsga` of the kernel."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ('height', 'width', 'channels', 'heads', 'gate', 'score', 'thresholds')
        ),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    ]


class _Step(ctypes.Structure):
    """`struct Step` of the kernel."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ('height', 'width', 'fine', 'coarse')),
        *((name, ctypes.c_void_p) for name in ('x', 'weight', 'bias', 'skip', 'y')),
    ]


def restored(x: Tensor, weights: Weights) -> Tensor:
    """Y of the block, without gradients.

    Args:
        x: (N, H, W, C), contiguous.
        weights: in float32, whatever the type of x.

    Returns:
        (N, H, W, C), contiguous, as `eager.whole` gives it.
    """
    _, height, width, channels = x.shape
    y = memory.kept.empty(x.shape, x.dtype)
    parameters = {
        'norm_weight': weights.norm_weight,
        'norm_bias': weights.norm_bias,
        'project_in': weights.project_in,
        'depthwise': weights.depthwise,
        'project_out': weights.project_out,
        'temperature': weights.temperature,
        'weights': weights.step,
        'mask': weights.mask,
    }
    held = {name: value.contiguous() for name, value in parameters.items() if value is not None}
    top_k = (ctypes.c_int64 * len(weights.top_k))(*weights.top_k)
    gate = 0 if weights.mask is not None else 1 if weights.gelu else 2
    call = _Call(
        *(height, width, channels, weights.heads, gate),
        SCORES.index(weights.score),
        len(top_k),
        top_k=ctypes.addressof(top_k),
        **{name: value.data_ptr() for name, value in held.items()},
    )
    for image, restored_image in zip(x, y, strict=True):
        call.x, call.y = image.data_ptr(), restored_image.data_ptr()
        _enter('dsga', x.dtype, call)
    return y


def convolved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 3×3 convolution of few channels, with a padding of 1.

    Args:
        x: (N, H, W, C), contiguous.
        weight: (C', 9C and zeros up to a multiple of `LANES`) of outputs, then rows, columns, inputs;
            contiguous, float32.
        bias: (C',), float32.

    Returns:
        (N, H, W, C'), contiguous.
    """
    n, height, width, channels = x.shape
    y = memory.kept.empty((n, height, width, weight.shape[0]), x.dtype)
    return _stepped('head', _Step(height, width, channels, weight.shape[0]), x, weight, bias, None, y)


def downsampled(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 2×2 convolution of stride 2.

    Args:
        x: (N, 2H, 2W, C), contiguous.
        weight: (2, C', 2, C) of rows, outputs, columns, inputs; contiguous, float32.
        bias: (C',), float32.

    Returns:
        (N, H, W, C'), contiguous.
    """
    n, height, width, fine = x.shape
    y = memory.kept.empty((n, height // 2, width // 2, weight.shape[1]), x.dtype)
    return _stepped('down', _Step(height // 2, width // 2, fine, weight.shape[1]), x, weight, bias, None, y)


def upsampled(x: Tensor, weight: Tensor, skip: Tensor | None) -> Tensor:
    """A 1×1 convolution whose outputs become 2×2 pixels, and the sum with `skip`.

    Args:
        x: (N, H, W, C'), contiguous.
        weight: (2, 2, C, C') of rows, columns, outputs, inputs; contiguous, float32.
        skip: (N, 2H, 2W, C), contiguous, of the type of x; or None.

    Returns:
        (N, 2H, 2W, C), contiguous.
    """
    n, height, width, coarse = x.shape
    y = memory.kept.empty((n, 2 * height, 2 * width, weight.shape[2]), x.dtype)
    return _stepped('up', _Step(height, width, weight.shape[2], coarse), x, weight, None, skip, y)


def summed(x: Tensor, weight: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
    """A 3×3 convolution to 3 channels, with a padding of 1, and the sum with `skip`.

    Args:
        x: (N, H, W, C), contiguous.
        weight: (27 and zeros up to a multiple of `LANES`, C) of rows, columns, outputs, then inputs;
            contiguous, float32.
        bias: (3,), float32.
        skip: (N, H, W, 3), contiguous, float32.

    Returns:
        (N, H, W, 3), contiguous, float32.
    """
    _, height, width, channels = x.shape
    y = torch.empty_like(skip)
    return _stepped('tail', _Step(height, width, channels, skip.shape[-1]), x, weight, bias, skip, y)


def _stepped(
    name: str, call: _Step, x: Tensor, weight: Tensor, bias: Tensor | None, skip: Tensor | None, y: Tensor
) -> Tensor:
    """`y`, filled image by image by the kernel's entry `name`; `call` brings the sizes."""
    call.weight, call.bias = weight.data_ptr(), None if bias is None else bias.data_ptr()
    for i in range(len(x)):
        call.x, call.y = x[i].data_ptr(), y[i].data_ptr()
        call.skip = None if skip is None else skip[i].data_ptr()
        _enter(name, x.dtype, call)
    return y


def _enter(name: str, dtype: torch.dtype, call: ctypes.Structure) -> None:
    entry = getattr(build.library(), f'{name}_{str(dtype).removeprefix("torch.")}')
    if entry(ctypes.byref(call)):
        raise RuntimeError('oneDNN has no small matrix product for this processor')


@lru_cache(maxsize=len(TYPES))
def works(dtype: torch.dtype) -> bool:
    """Whether the kernel can be had for `dtype`, and gives on a small image what the eager form gives."""

    def form(x: Tensor, residual: Tensor, weights: Weights) -> Tensor:
        return restored(x, weights)

    try:
        build.library()
    except (OSError, RuntimeError, subprocess.SubprocessError) as reason:
        _LOG.info('the eager form of DSGA runs, as there is no kernel here: %s', reason)
        return False
    return selftest.passes(form, 2 * LANES, 2, dtype, torch.device('cpu'), torch.float32)
