"""Replacements for parts of networks that exporters cannot express, with equal parameters and results.

`substitute(network)` replaces modules, in a copy that is made for the export; `variable_sizes()` is for
code that turns sizes into numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsgformer_arch.archs.dsgformer_arch import BLOCK, DFGB, LayerNorm
from dsgformer_arch.archs.mprnet_arch import SpandrelMPRNet
from dsgformer_arch.ops import dfgb


class ExportLayerNorm(nn.Module):
    """LN over the channels.  The number of channels is a constant of the graph, not read from its input."""

    def __init__(self, original: LayerNorm) -> None:
        super().__init__()
        self.channels = original.weight.shape[0]
        self.weight, self.bias = original.weight, original.bias

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, (self.channels,), self.weight, self.bias).permute(0, 3, 1, 2)


class ExportDFGB(nn.Module):
    """DFGB without a Fourier transform: GELU(Bᵀ diag(m) B U) for each 8×8 block of U (see `ops.dfgb`).

    B is a convolution of 64 kernels with stride 8, and Bᵀ one of 1×1 whose 64 channels are an 8×8 block.
    """

    def __init__(self, original: DFGB) -> None:
        super().__init__()
        mask = original.mask.detach()
        self.channels = mask.shape[0]
        self.analysis: Tensor
        self.synthesis: Tensor
        self.diagonal: Tensor
        B = dfgb.basis(mask.dtype, mask.device).clone()
        self.register_buffer('analysis', B.view(-1, 1, BLOCK, BLOCK))
        self.register_buffer('synthesis', B.t().reshape(BLOCK * BLOCK, BLOCK * BLOCK, 1, 1).clone())
        self.register_buffer('diagonal', dfgb.diagonal(mask).t()[..., None, None].clone())

    def forward(self, U: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        h, w = U.shape[2:]
        x = _filled(_filled(U, 2), 3)
        rows, columns = x.shape[2] // BLOCK, x.shape[3] // BLOCK
        blocks = F.conv2d(x.reshape(-1, 1, rows * BLOCK, columns * BLOCK), self.analysis, stride=BLOCK)
        blocks = blocks.reshape(-1, self.channels, BLOCK * BLOCK, rows, columns) * self.diagonal
        blocks = F.conv2d(blocks.reshape(-1, BLOCK * BLOCK, rows, columns), self.synthesis)
        x = F.pixel_shuffle(blocks, BLOCK)
        return F.gelu(x.reshape(-1, self.channels, rows * BLOCK, columns * BLOCK)[:, :, :h, :w])


def _filled(x: Tensor, dim: int) -> Tensor:
    """`x` up to a multiple of 8 along a dimension, its border repeated.

    Exporters turn a selection into a graph for any size; a padding whose amount is computed they may not.
    """
    size = x.shape[dim]
    target = (size + BLOCK - 1) // BLOCK * BLOCK
    return x.index_select(dim, torch.arange(target, device=x.device).clamp(max=size - 1))


def substitute(network: nn.Module) -> None:
    """Replace every module of `network` that has a form for export, in place."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LayerNorm):
                setattr(module, name, ExportLayerNorm(child))
            elif isinstance(child, DFGB):
                setattr(module, name, ExportDFGB(cast(DFGB, child)))


@contextmanager
def variable_sizes() -> Iterator[None]:
    """Keep the image's size a variable of the graph within a `with` statement.

    spandrel's MPRNet cuts its image into halves at `int(H / 2)`, and `int` makes a constant of H.
    """
    module: Any = sys.modules[SpandrelMPRNet.__module__]
    module.int = _whole
    try:
        yield
    finally:
        del module.int


def _whole(value: Any) -> Any:
    """`int(value)` that keeps traced tensors and symbolic numbers symbolic."""
    return value.long() if isinstance(value, Tensor) else torch.sym_int(value)
