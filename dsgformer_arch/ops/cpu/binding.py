"""Calls the entry points of `kernel.cpp`, after a check of every tensor that they are given."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsgformer_arch.ops import memory, selftest
from dsgformer_arch.ops.compiling import constant_when_compiled
from dsgformer_arch.ops.cpu import build
from dsgformer_arch.ops.selftest import Verdict

if TYPE_CHECKING:
    from dsgformer_arch.ops.eager import Weights

TYPES = (torch.float32, torch.bfloat16)

LANES = 16
"""The kernels' vectors hold 16 channels; a head's width must be a multiple."""

_RESULTS = {
    1: 'oneDNN has no small matrix product of this type for this processor',
    2: "can't allocate memory: a kernel of DSGformer ran out of it",
    3: 'a kernel of DSGformer refused its arguments',
}
"""`enum Result` of the kernels."""


class UnavailableError(RuntimeError):
    """The kernels cannot run here."""


class _Dsga(ctypes.Structure):
    """`struct Dsga` of the kernels."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ('height', 'width', 'channels', 'heads', 'thresholds')),
        *((name, ctypes.c_void_p) for name in ('x', 'y', 'scores', 'norm_weight', 'norm_bias')),
        *((name, ctypes.c_void_p) for name in ('project_in', 'depthwise', 'project_out', 'temperature')),
        *((name, ctypes.c_void_p) for name in ('step', 'mask', 'top_k')),
    ]


class _Step(ctypes.Structure):
    """`struct Step` of the kernels."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ('height', 'width', 'fine', 'coarse')),
        *((name, ctypes.c_void_p) for name in ('x', 'weight', 'bias', 'skip', 'y')),
    ]


def takes(dtype: torch.dtype, *widths: int) -> bool:
    """Whether the kernels take images of `dtype` and products of such widths, and pass their self-test."""
    if dtype not in TYPES or not all(width and width % LANES == 0 for width in widths):
        return False
    return bool(torch.backends.mkldnn.enabled) and works(dtype).passed  # whose products they use


def block(x: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """`eager.whole` and the scores A, for the paper's switches and without gradients.

    Args:
        x: (N, H, W, C), contiguous, float32 or bfloat16.
        weights: of any floating type; the kernel takes them in float32.

    Returns:
        (N, H, W, C) of the type of x, and (N, heads, C / heads, C / heads) in float32.

    Raises:
        ValueError: a tensor is not what is said here, or the switches are not the paper's.
        UnavailableError: there is no kernel here.
        RuntimeError: memory ran out.
    """
    n, height, width, channels = _image(x)
    heads, top_k = weights.heads, weights.top_k
    if weights.score != 'relu2' or not weights.gelu or weights.step is None or weights.mask is None:
        raise ValueError("the kernel computes the block with the paper's switches only")
    if heads < 1 or channels % (heads * LANES) or not top_k or min(top_k) < 1:
        raise ValueError(f'the kernel does not take {channels} channels in {heads} heads with k = {top_k}')
    c = channels // heads
    parameters = {
        'norm_weight': (weights.norm_weight, (channels,)),
        'norm_bias': (weights.norm_bias, (channels,)),
        'project_in': (weights.project_in, (4 * channels, channels)),
        'depthwise': (weights.depthwise, (4 * channels, 1, 3, 3)),
        'project_out': (weights.project_out, (channels, channels)),
        'temperature': (weights.temperature, (heads, 1, 1)),
        'step': (weights.step, (len(top_k),)),
        'mask': (weights.mask, (channels, 8, 5)),
    }
    held = {name: _parameter(name, *given) for name, given in parameters.items()}
    y = memory.pool.empty(x.shape, x.dtype)
    scores = torch.empty((n, heads, c, c), dtype=torch.float32, device='cpu')
    ks = (ctypes.c_int64 * len(top_k))(*top_k)
    call = _Dsga(
        *(height, width, channels, heads, len(top_k)),
        top_k=ctypes.addressof(ks),
        **{name: value.data_ptr() for name, value in held.items()},
    )
    for i in range(n):
        call.x, call.y, call.scores = x[i].data_ptr(), y[i].data_ptr(), scores[i].data_ptr()
        _enter('dsga', x.dtype, call)
    return y, scores


def upsample(x: Tensor, weight: Tensor, skip: Tensor | None) -> Tensor:
    """`eager.upsample`, without gradients.

    Args:
        x: (N, H, W, C'), contiguous, float32 or bfloat16.
        weight: of the 1×1 convolution, (4C, C', 1, 1), of any floating type.
        skip: (N, 2H, 2W, C), contiguous, of the type of x; or None.

    Returns:
        (N, 2H, 2W, C), contiguous.

    Raises:
        ValueError, UnavailableError, RuntimeError: as `block`.
    """
    coarse, fine = _image(x)[3], weight.shape[0] // 4
    # PixelShuffle's (C, row, column) as (row, (column, C))
    held = _parameter('weight', weight, (4 * fine, coarse, 1, 1)).view(fine, 2, 2, coarse)
    return upsampled(x, held.permute(1, 2, 0, 3), skip)


def upsampled(x: Tensor, weight: Tensor, skip: Tensor | None) -> Tensor:
    """A 1×1 convolution whose outputs become 2×2 pixels, and the sum with `skip`.

    Args:
        x: (N, H, W, C'), contiguous.
        weight: (2, 2, C, C') of rows, columns, outputs, inputs.
        skip: (N, 2H, 2W, C), contiguous, of the type of x; or None.

    Returns:
        (N, 2H, 2W, C), contiguous.
    """
    n, height, width, coarse = _image(x)
    fine = weight.shape[2]
    shape = (n, 2 * height, 2 * width, fine)
    weight = _parameter('weight', weight, (2, 2, fine, coarse))
    return _stepped('up', _Step(height, width, fine, coarse), x, weight, None, skip, shape)


def downsampled(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 2×2 convolution of stride 2.

    Args:
        x: (N, 2H, 2W, C), contiguous.
        weight: (2, C', 2, C) of rows, outputs, columns, inputs.
        bias: (C',).

    Returns:
        (N, H, W, C'), contiguous.
    """
    n, height, width, fine = _image(x)
    coarse = weight.shape[1]
    if height % 2 or width % 2:
        raise ValueError(f'downsampling takes an even height and width, not {height} and {width}')
    weight, bias = _parameter('weight', weight, (2, coarse, 2, fine)), _parameter('bias', bias, (coarse,))
    call = _Step(height // 2, width // 2, fine, coarse)
    return _stepped('down', call, x, weight, bias, None, (n, height // 2, width // 2, coarse))


def tail(x: Tensor, weight: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
    """A 3×3 convolution to 3 channels, with a padding of 1, and the sum with `skip`.

    Args:
        x: (N, H, W, C), contiguous.
        weight: (27 and zeros up to a multiple of `LANES`, C) of rows, columns, outputs, then inputs.
        bias: (3,).
        skip: (N, H, W, 3), contiguous, float32.

    Returns:
        (N, H, W, 3), contiguous, float32.
    """
    n, height, width, channels = _image(x)
    weight, bias = _parameter('weight', weight, (32, channels)), _parameter('bias', bias, (3,))
    return _stepped('tail', _Step(height, width, channels, 3), x, weight, bias, skip, (n, height, width, 3))


def _stepped(
    name: str,
    call: _Step,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    skip: Tensor | None,
    shape: tuple[int, ...],
) -> Tensor:
    """The result of `shape`, filled image by image by the kernels' entry `name`; `call` holds the sizes."""
    dtype = torch.float32 if name == 'tail' else x.dtype
    if skip is not None and (_image(skip) != shape or skip.dtype != dtype):
        raise ValueError(f'skip is {_description(skip)}, not {dtype} of {shape}')
    y = memory.pool.empty(shape, dtype)
    call.weight, call.bias = weight.data_ptr(), None if bias is None else bias.data_ptr()
    for i in range(shape[0]):
        call.x, call.y = x[i].data_ptr(), y[i].data_ptr()
        call.skip = None if skip is None else skip[i].data_ptr()
        _enter(name, x.dtype, call)
    return y


def _image(x: Tensor) -> tuple[int, int, int, int]:
    """The shape of an image that the kernels take."""
    if x.dtype not in TYPES or x.ndim != 4 or not _has_memory(x) or not x.is_contiguous() or not x.numel():
        raise ValueError(f'the kernels take contiguous images of (N, H, W, C), not {_description(x)}')
    n, height, width, channels = x.shape
    return n, height, width, channels


def _parameter(name: str, value: Tensor, shape: Sequence[int]) -> Tensor:
    """`value` as the kernels take it: float32, contiguous."""
    if value.shape != torch.Size(shape) or not value.is_floating_point() or not _has_memory(value):
        raise ValueError(f'{name} is {_description(value)}, not of shape {tuple(shape)} on the CPU')
    return value.detach().to(torch.float32).contiguous()


def _has_memory(x: Tensor) -> bool:
    """Whether the values of `x` lie where `data_ptr` points: no fake, batched, sharded or negated tensor."""
    if type(x) not in (Tensor, torch.nn.Parameter) or x.device.type != 'cpu' or x.layout != torch.strided:
        return False
    return not (x.is_neg() or x.is_conj()) and (x.data_ptr() != 0 or not x.numel())


def _description(x: Tensor) -> str:
    return f'{type(x).__name__} of {x.dtype}, shape {tuple(x.shape)}, on {x.device}'


def _enter(name: str, dtype: torch.dtype, call: ctypes.Structure) -> None:
    entry = getattr(build.library(), f'{name}_{str(dtype).removeprefix("torch.")}')
    result = entry(ctypes.byref(call))
    if result == 1:
        raise UnavailableError(_RESULTS[result])
    if result:
        raise RuntimeError(_RESULTS[result])


_VERDICTS: dict[torch.dtype, Verdict] = {}
_LOCK = threading.RLock()


@constant_when_compiled
def works(dtype: torch.dtype) -> Verdict:
    """Whether the kernel for `dtype` can be compiled and passes its self-test; determined once per process.

    A failure that may not come again, such as a lack of memory, is not remembered.
    """
    verdict = _VERDICTS.get(dtype)
    if verdict is None:
        with _LOCK:
            verdict = _VERDICTS.get(dtype) or _verdict(dtype)
            if verdict.final:
                _VERDICTS[dtype] = verdict
            if not verdict.passed:
                selftest.warn_once(f'cpu {dtype}', verdict.reason)
    return verdict


def _verdict(dtype: torch.dtype) -> Verdict:
    try:
        build.library()
    except build.BuildError as reason:
        return Verdict(False, str(reason))
    return selftest.run(
        lambda x, residual, weights: block(x, weights)[0],
        *(2 * LANES, 2, dtype, torch.device('cpu')),
        weights_dtype=torch.float32,
    )
