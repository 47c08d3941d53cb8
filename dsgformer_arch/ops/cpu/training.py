"""The block on a CPU for training: `backward.h` computes Y and every gradient.

Kept for the backward pass are X, W_p LN(X) and the c×c products Q Kᵀ;
everything else is computed again, block of 8×8 pixels by block, where it stays
in the caches.  There is no second derivative.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsgformer_arch.ops import memory, selftest
from dsgformer_arch.ops.compiling import constant_when_compiled
from dsgformer_arch.ops.cpu import build
from dsgformer_arch.ops.eager import Weights

TYPES = (torch.float32, torch.bfloat16)
"""Types of X that training takes; the kernel also knows float64, to be checked with."""

LANES = 8
"""The kernel's narrowest vectors hold 8 channels; a head's width must be a multiple."""

SCORES = ('relu2', 'relu', 'softmax')
"""The kernel's enumeration of φ."""

PARAMETERS = (
    *('norm_weight', 'norm_bias', 'project_in', 'depthwise'),
    *('project_out', 'temperature', 'step', 'mask'),
)
"""The tensors of `Weights`, in the order of `_Training`."""


class _Training(ctypes.Structure):
    """`struct Training` of the kernel."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ('images', 'height', 'width', 'channels', 'heads', 'gate', 'score', 'thresholds')
        ),
        *((name, ctypes.c_void_p) for name in ('x', 'y', 'p', 'gram')),
        *((name, ctypes.c_void_p) for name in (*PARAMETERS[:-1], 'top_k', 'mask')),
        *((name, ctypes.c_void_p) for name in ('dy', 'dx')),
        *((f'd_{name}', ctypes.c_void_p) for name in PARAMETERS),
    ]


def takes(dtype: torch.dtype, channels: int, heads: int) -> bool:
    """Whether the kernel trains a block of C = `channels` on X of type `dtype`."""
    return channels // heads % LANES == 0 and dtype in TYPES and works(dtype).passed


def differentiable(x: Tensor, weights: Weights, recompute: bool = False) -> Tensor:
    """`eager.whole(x, x, weights)`, computed by the kernel.

    Args:
        x: X, (N, H, W, C), contiguous; float32, bfloat16 or float64.
        weights: in float32, or in float64 for float64.
        recompute: keep only X for the backward pass.

    Returns:
        (N, H, W, C), contiguous, of the type of x.
    """
    tensors = (getattr(weights, name) for name in PARAMETERS)
    settings = _Settings(weights.heads, weights.top_k, weights.score, weights.gelu)
    return cast(Tensor, _Block.apply(settings, recompute, x, *tensors))


class _Settings(NamedTuple):
    """What of `Weights` is not a tensor."""

    heads: int
    top_k: tuple[int, ...]
    score: str
    gelu: bool


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, settings: _Settings, recompute: bool, x: Tensor, *parameters: Tensor | None
    ) -> Tensor:
        n, height, width, channels = x.shape
        held = [None if value is None else value.contiguous() for value in parameters]
        y = memory.pool.empty(x.shape, x.dtype)
        planes = (n, 2, height + 2, width + 2, 2 * channels)
        p = None if recompute else memory.pool.empty(planes, x.dtype)
        gram = x.new_empty(n, channels * (channels // settings.heads + 2), dtype=_wide(x))
        _run('forward', settings, {'x': x, 'y': y, 'p': p, 'gram': gram, **_named(held)})
        ctx.settings = settings
        ctx.save_for_backward(x, p, gram, *held)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, p, gram, *held = ctx.saved_tensors
        dx = memory.pool.empty(x.shape, x.dtype)
        gradients = [None if value is None else torch.empty_like(value) for value in held]
        given = {'x': x, 'p': p, 'gram': gram, 'dy': dy.contiguous(), 'dx': dx}
        _run('backward', ctx.settings, {**given, **_named(held), **_named(gradients, 'd_')})
        wanted = zip((dx, *gradients), ctx.needs_input_grad[2:], strict=True)
        return None, None, *(gradient if needed else None for gradient, needed in wanted)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _named(tensors: Sequence[Tensor | None], prefix: str = '') -> dict[str, Tensor | None]:
    return {prefix + name: value for name, value in zip(PARAMETERS, tensors, strict=True)}


def _run(entry: str, settings: _Settings, tensors: Mapping[str, Tensor | None]) -> None:
    """Call the kernel, which reads and writes `tensors` by their names in `_Training`."""
    x = cast(Tensor, tensors['x'])
    top_k = (ctypes.c_int64 * len(settings.top_k))(*settings.top_k)
    gate = 0 if tensors['mask'] is not None else 1 if settings.gelu else 2
    call = _Training(
        *(*x.shape, settings.heads, gate, SCORES.index(settings.score), len(top_k)),
        top_k=ctypes.addressof(top_k),
        **{name: value.data_ptr() for name, value in tensors.items() if value is not None},
    )
    enter(entry, x.dtype, call)


def enter(entry: str, dtype: torch.dtype, call: ctypes.Structure) -> None:
    """Call the entry point `train_<entry>_<dtype>`."""
    library = build.library('backward_float64.cpp' if dtype == torch.float64 else 'backward.cpp')
    if getattr(library, f'train_{entry}_{str(dtype).removeprefix("torch.")}')(ctypes.byref(call)):
        raise MemoryError('the memory for a training step of DSGA ran out')


_VERDICTS: dict[torch.dtype, selftest.Verdict] = {}


@constant_when_compiled
def works(dtype: torch.dtype) -> selftest.Verdict:
    """Whether the kernel can be compiled, and equals the eager implementation on a small image.

    A failure that may not come again is not remembered.
    """
    verdict = _VERDICTS.get(dtype)
    if verdict is None:
        try:
            build.library('backward.cpp')
            verdict = selftest.trains(differentiable, 2 * LANES, 2, dtype)
        except build.BuildError as reason:
            verdict = selftest.Verdict(False, str(reason))
        if verdict.final:
            _VERDICTS[dtype] = verdict
        if not verdict.passed:
            selftest.warn_once(f'training on a CPU in {dtype}', verdict.reason)
    return verdict
