"""MACs (multiply-accumulate operations) of a network's forward pass.

Counted are the operators that the network runs: convolutions, matrix products (linear layers and both
products of every attention), and Fourier transforms, which are kept apart because most published counts
leave them out.  Element-wise operations (activations, norms, softmax, pooling, the interpolation in
deformable convolutions) are not counted, here as in those.

DSGformer is counted in its reference implementation, whose filters are Fourier transforms; its fast
implementations compute the same with matrix products.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dsgformer_arch import ops, zoo

aten = torch.ops.aten

CONVOLUTIONS = {
    aten.convolution,
    aten._convolution,
    aten.cudnn_convolution,
    aten._slow_conv2d_forward,
    aten.convolution_overrideable,
}
"""Operators of PyTorch's counter that are convolutions; the others are matrix products."""


@dataclass(frozen=True)
class Complexity:
    """MACs by kind of operator.

    Attributes:
        convolutions: transposed ones included.
        products: of matrices.
        fourier: Fourier transforms; 5 N log2 N operations for N complex numbers, half of that for real
            ones, and two operations to a MAC.
    """

    convolutions: int
    products: int
    fourier: int

    @property
    def published(self) -> int:
        """Convolutions and products: the number that papers of this field give."""
        return self.convolutions + self.products

    @property
    def total(self) -> int:
        """All three."""
        return self.published + self.fourier


def count(name: str, height: int = 256, width: int | None = None, /, **overrides: Any) -> Complexity:
    """Count the MACs of a system's forward pass in evaluation mode, for one image, without computing it.

    Args:
        name: one of `zoo.names()`.
        height: of the image in pixels; MACs for padding are included.
        width: `height` by default.
        overrides: settings, as in `zoo.create`.

    Raises:
        UserError: as `zoo.create`.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        # IPT copies its layers, and copying a tensor without data accesses its data pointer.
        warnings.filterwarnings('ignore', 'Accessing the data pointer')
        network = zoo.create(name, **overrides).eval()
        network.join_batches()
        image = torch.empty(1, 3, height, width or height)
        counter = FlopCounterMode(display=False, custom_mapping={**FOURIER, **ATTENTION})
        with torch.no_grad(), ops.use('plain'), counter:
            network(image)
    found = counter.get_flop_counts()['Global']
    convolutions = sum(number for kind, number in found.items() if kind in CONVOLUTIONS) // 2
    fourier = sum(number for kind, number in found.items() if kind in FOURIER) // 2
    return Complexity(convolutions, sum(found.values()) // 2 - convolutions - fourier, fourier)


def multiply_adds(name: str, height: int = 256, width: int | None = None, /, **overrides: Any) -> int:
    """`count(…).total`."""
    return count(name, height, width, **overrides).total


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Operations of both products, for tensors of shape (N, heads, tokens, channels)."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _transform(shape: Shape, dims: Sequence[int]) -> int:
    """Operations of a transform of complex numbers, to a whole number of MACs."""
    length = math.prod(shape[dim] for dim in dims)
    return 2 * round(math.prod(shape) * 5 * math.log2(length) / 2)


def _half_transform(shape: Shape, dims: Sequence[int]) -> int:
    return 2 * (_transform(shape, dims) // 4)


Shape = Sequence[int]

FOURIER: dict[Any, Any] = {
    aten._fft_r2c: lambda x, dims, *_, **__: _half_transform(x, dims),
    aten._fft_c2r: lambda x, dims, *_, out_shape, **__: _half_transform(out_shape, dims),
    aten._fft_c2c: lambda x, dims, *_, **__: _transform(x, dims),
}
"""Operations of Fourier transforms, from shapes; PyTorch's counter leaves them out."""

ATTENTION: dict[Any, Any] = {aten._scaled_dot_product_flash_attention_for_cpu: _attention}
"""Operations of the CPU's fused attention; PyTorch's counter knows that of other devices."""
