"""Chooses the implementation of the block that runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from dsgformer_arch.ops import eager
from dsgformer_arch.ops.cpu import binding, training

if TYPE_CHECKING:
    from dsgformer_arch.archs.dsgformer_arch import DSGA

Path = Literal['fast', 'eager', 'plain']

_forced: Path | None = None


def path() -> Path:
    """The form of the block that runs now.

    `'fast'` picks the fastest that suits the call.  `'eager'`
    (`DSGFORMER_EAGER=1`) does the same without compiling anything.  `'plain'`
    (`DSGFORMER_PLAIN=1`) is the literal one.
    """
    if _forced is not None:
        return _forced
    if _set('DSGFORMER_PLAIN'):
        return 'plain'
    return 'eager' if _set('DSGFORMER_EAGER') else 'fast'


def compiled_forms_take(x: Tensor) -> bool:
    """Whether a kernel may run on `x`: the path allows it, and x holds numbers of its own.

    Under a dispatch mode (fake tensors, counting of operations) tensors hold none or must be seen.
    """
    return path() == 'fast' and type(x) is Tensor and not is_in_torch_dispatch_mode()


@contextmanager
def use(chosen: Path) -> Iterator[None]:
    """Run one form within a `with` statement, whatever the environment says."""
    global _forced
    before, _forced = _forced, chosen
    try:
        yield
    finally:
        _forced = before


def _set(name: str) -> bool:
    return os.environ.get(name, '0') not in ('', '0')


def fast(X: Tensor) -> bool:
    """Whether a fast form of the block runs for X of shape (N, C, H, W)."""
    return path() != 'plain' and X.is_floating_point() and not X.is_meta


def computes_in(x: Tensor, *widths: int) -> torch.dtype | None:
    """The type in which the kernel takes products of `x` of such widths: autocast's, or that of x.

    Returns:
        None where the kernel cannot run: it takes numbers on a CPU, without gradients.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    if x.device.type != 'cpu' or any(width % binding.LANES for width in widths) or not compiled_forms_take(x):
        return None
    dtype = torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else x.dtype
    return dtype if dtype in binding.TYPES and binding.works(dtype) else None


def steps_train_in(x: Tensor, *widths: int) -> torch.dtype | None:
    """As `computes_in`, for the kernels that train the steps outside the levels."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    if x.device.type != 'cpu' or any(width % binding.LANES for width in widths) or not compiled_forms_take(x):
        return None
    dtype = torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else x.dtype
    return dtype if dtype in binding.TYPES and binding.works(dtype) and training.works(dtype) else None


def trains_in(X: Tensor, heads: int) -> torch.dtype | None:
    """As `computes_in`, for the kernel that trains: takes X of shape (N, C, H, W) and the number of heads."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    if X.device.type != 'cpu' or not X.numel() or not compiled_forms_take(X):
        return None
    dtype = torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else X.dtype
    return dtype if training.takes(dtype, X.shape[1], heads) else None


def forward(block: DSGA, X: Tensor) -> Tensor:
    """Y of the block, by the form that suits the call.

    Under autocast the parameters and X are cast once, here; the sum with X
    keeps the type of X where that is the wider, as in the literal form.

    Args:
        block: the block whose parameters are used.
        X: (N, C, H, W), channels-last for speed.

    Returns:
        (N, C, H, W), channels-last.
    """
    if computes_in(X, X.shape[1] // block.attention.heads) == X.dtype:
        y = binding.restored(X.permute(0, 2, 3, 1).contiguous(), eager.Weights.of(block, torch.float32))
        return y.permute(0, 3, 1, 2)
    if trains_in(X, block.attention.heads) == X.dtype:
        recompute = block.recompute or X.nbytes > eager.KEPT_BYTES['cpu']
        weights = eager.Weights.of(block, torch.float32)
        y = training.differentiable(X.permute(0, 2, 3, 1).contiguous(), weights, recompute)
        return y.permute(0, 3, 1, 2)
    device = X.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else X.dtype
    with torch.autocast(device, enabled=False):
        weights = eager.Weights.of(block, dtype)
        residual = X.permute(0, 2, 3, 1).contiguous()
        x = residual.to(dtype)
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            y = eager.whole(x, residual, weights)
        elif (triton := _triton(x, weights)) is not None:
            if torch.is_grad_enabled():
                y = eager.without_activations(triton.restored, residual, weights)
            else:
                y = triton.restored(x, residual, weights)
        elif torch.is_grad_enabled():
            keep = not block.recompute and x.nbytes <= eager.KEPT_BYTES.get(device, 0)
            y = (
                eager.whole(x, residual, weights)
                if keep
                else eager.recomputing(x, residual, weights, block.recompute)
            )
        elif eager.strip_rows(x) >= x.shape[1]:
            y = eager.whole(x, residual, weights)
        else:
            y = eager.in_strips(x, residual, weights)
        return y.permute(0, 3, 1, 2)


def _triton(x: Tensor, weights: eager.Weights) -> ModuleType | None:
    """The kernels for a GPU, where they take x."""
    if x.device.type != 'cuda' or not compiled_forms_take(x):
        return None
    kernels = _triton_kernels()
    return kernels if kernels is not None and kernels.suits(x, weights) else None


@lru_cache(maxsize=1)
def _triton_kernels() -> ModuleType | None:
    try:
        from dsgformer_arch.ops import gpu
    except ImportError:  # of Triton, which PyTorch brings for Linux and NVIDIA's GPUs
        return None
    return gpu
