"""Replacements for parts of networks that exporters cannot express, with equal parameters and results.

`substitute(network)` replaces modules, in a copy that is made for the export; `variable_sizes()` is for
code that turns sizes into numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from spandrel.architectures.FFTformer.__arch.fftformer_arch import DFFN, FSAS
from torch import Tensor, nn

from dsgformer_arch.archs.dsgformer_arch import BLOCK, DFGB, LayerNorm
from dsgformer_arch.archs.layers.norms import norm_of_channels
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
        return norm_of_channels(x, self.channels, self.weight, self.bias)


class BlockFilter(nn.Module):
    """A real mask on the spectrum of each 8×8 block: Bᵀ diag(m) B of every block (see `ops.dfgb`).

    B is a convolution of 64 kernels with stride 8, and Bᵀ a product whose 64 rows are an 8×8 block.

    Args:
        mask: (C, 8, 5), for the half spectrum of a real block.
    """

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.channels = mask.shape[0]
        self.analysis: Tensor
        self.synthesis: Tensor
        self.diagonal: Tensor
        B = dfgb.basis(mask.dtype, mask.device).clone()
        self.register_buffer('analysis', B.view(-1, 1, BLOCK, BLOCK))
        self.register_buffer('synthesis', B.t().clone())
        self.register_buffer('diagonal', dfgb.diagonal(mask).t()[..., None, None].clone())

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same; H and W are multiples of 8."""
        spectra = in_blocks(x, self.analysis)
        filtered = spectra.reshape(x.shape[0], self.channels, *spectra.shape[1:]) * self.diagonal
        return from_blocks(filtered.flatten(0, 1), self.synthesis, x.shape)


class ExportDFGB(nn.Module):
    """DFGB without a Fourier transform: GELU of a `BlockFilter`."""

    def __init__(self, original: DFGB) -> None:
        super().__init__()
        self.filter = BlockFilter(original.mask.detach())

    def forward(self, U: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        h, w = U.shape[2:]
        return F.gelu(self.filter(_filled(_filled(U, 2), 3))[:, :, :h, :w])


class ExportDFFN(nn.Module):
    """FFTformer's feed-forward network without a Fourier transform."""

    def __init__(self, original: DFFN) -> None:
        super().__init__()
        self.project_in, self.dwconv = original.project_in, original.dwconv
        self.project_out = original.project_out
        self.filter = BlockFilter(original.fft.detach().view(-1, *original.fft.shape[-2:]))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same; H and W are multiples of 8."""
        first, second = self.dwconv(self.filter(self.project_in(x))).chunk(2, dim=1)
        return cast(Tensor, self.project_out(F.gelu(first) * second))


class ExportFSAS(nn.Module):
    """FFTformer's attention without a Fourier transform.

    The spectrum of an 8×8 block is a convolution of 80 kernels: the real parts of the half spectrum, then
    the imaginary ones.  Spectra are multiplied as complex numbers, and the inverse is a product of matrices.
    """

    def __init__(self, original: FSAS) -> None:
        super().__init__()
        self.to_hidden, self.to_hidden_dw = original.to_hidden, original.to_hidden_dw
        self.norm, self.project_out = original.norm, original.project_out
        self.analysis: Tensor
        self.synthesis: Tensor
        pixels = torch.eye(BLOCK * BLOCK, dtype=torch.float64).view(-1, BLOCK, BLOCK)
        spectra = torch.fft.rfft2(pixels).flatten(1)
        parts = torch.eye(2 * spectra.shape[1], dtype=torch.float64).view(-1, 2, BLOCK, BLOCK // 2 + 1)
        blocks = torch.fft.irfft2(torch.complex(parts[:, 0], parts[:, 1]), s=(BLOCK, BLOCK)).flatten(1)
        analysis = torch.cat([spectra.real, spectra.imag], dim=1).t().reshape(-1, 1, BLOCK, BLOCK)
        like = original.project_out.weight
        self.register_buffer('analysis', analysis.to(like).contiguous())
        self.register_buffer('synthesis', blocks.t().to(like).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same; H and W are multiples of 8."""
        q, k, v = self.to_hidden_dw(self.to_hidden(x)).chunk(3, dim=1)
        q_real, q_imaginary = in_blocks(q, self.analysis).chunk(2, dim=1)
        k_real, k_imaginary = in_blocks(k, self.analysis).chunk(2, dim=1)
        product = torch.cat(
            [q_real * k_real - q_imaginary * k_imaginary, q_real * k_imaginary + q_imaginary * k_real], dim=1
        )
        attention = self.norm(from_blocks(product, self.synthesis, q.shape))
        return cast(Tensor, self.project_out(v * attention))


def in_blocks(x: Tensor, kernels: Tensor) -> Tensor:
    """Products of each 8×8 block with kernels (K, 1, 8, 8): (N, C, H, W) to (N·C, K, H/8, W/8)."""
    return F.conv2d(x.flatten(0, 1).unsqueeze(1), kernels, stride=BLOCK)


def from_blocks(spectra: Tensor, kernels: Tensor, shape: Sequence[int]) -> Tensor:
    """Blocks from coefficients: (N·C, K, H/8, W/8) and the matrix (64, K) to (N, C, H, W).

    A product of matrices and no convolution, as those are in float16 in float16 files: products of spectra
    leave its range.

    Args:
        shape: that of the result.  A size that PyTorch has to find out (-1) becomes a quotient of sizes,
            which AOTInductor compiles for the number of blocks that the example has.
    """
    blocks = (kernels @ spectra.flatten(2)).reshape(spectra.shape[0], BLOCK * BLOCK, *spectra.shape[2:])
    return F.pixel_shuffle(blocks, BLOCK).reshape(shape)


def _filled(x: Tensor, dim: int) -> Tensor:
    """`x` up to a multiple of 8 along a dimension, its border repeated.

    Exporters turn a selection into a graph for any size; a padding whose amount is computed they may not.
    """
    size = x.shape[dim]
    target = (size + BLOCK - 1) // BLOCK * BLOCK
    return x.index_select(dim, torch.arange(target, device=x.device).clamp(max=size - 1))


EXPORTED: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    LayerNorm: ExportLayerNorm,
    DFGB: ExportDFGB,
    DFFN: ExportDFFN,
    FSAS: ExportFSAS,
}
"""Forms for export by the class that they replace."""


def substitute(network: nn.Module) -> None:
    """Replace every module of `network` that has a form for export, in place."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            kind = next((kind for kind in EXPORTED if isinstance(child, kind)), None)
            if kind is not None:
                setattr(module, name, EXPORTED[kind](child))


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
