"""How many MACs a network's forward pass takes.

What is counted is what the network runs: convolutions, matrix products (linear layers and both
products of every attention), and Fourier transforms, which stand apart because most published counts
leave them out.  What is done element by element (activations, norms, softmax, pooling, the reading of
deformable convolution between pixels) is not counted, here as in those.

DSGformer is counted in its literal form, whose filters are Fourier transforms; its fast form computes
the same with matrix products.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dsgformer_arch import ops, zoo

aten = torch.ops.aten

CONVOLUTIONS = {
    aten.convolution,
    aten._convolution,
    aten.cudnn_convolution,
    aten._slow_conv2d_forward,
    aten.convolution_overrideable,
}
"""Operators of PyTorch's registry that are convolutions; what else it counts is a matrix product."""


@dataclass(frozen=True)
class Complexity:
    """MACs by what they are spent on.

    Attributes:
        convolutions: transposed ones included.
        products: of matrices.
        fourier: transforms; 5 N log2 N operations for N complex numbers, half of that for real ones, and
            two operations to a MAC.
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
    """Count a system's forward pass in evaluation mode, for one image, without computing it.

    Args:
        name: one of `zoo.names()`.
        height: of the image in pixels; what the system pads is counted too.
        width: `height` by default.
        overrides: settings, as in `zoo.create`.

    Raises:
        UserError: as `zoo.create`.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        # IPT copies its layers, and to copy a tensor without data asks where its data are.
        warnings.filterwarnings('ignore', 'Accessing the data pointer')
        network = zoo.create(name, **overrides).eval()
        image = torch.empty(1, 3, height, width or height)
        with torch.no_grad(), ops.use('plain'), _Counter() as counter:
            network(image)
    found = counter.multiply_adds
    convolutions = sum(number for kind, number in found.items() if kind in CONVOLUTIONS)
    fourier = sum(number for kind, number in found.items() if kind in FOURIER)
    return Complexity(convolutions, sum(found.values()) - convolutions - fourier, fourier)


def multiply_adds(name: str, height: int = 256, width: int | None = None, /, **overrides: Any) -> int:
    """`count(…).total`."""
    return count(name, height, width, **overrides).total


class _Counter(TorchDispatchMode):
    """Adds up the MACs of what runs within, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.multiply_adds: Counter[Any] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        kind = func.overloadpacket
        if kind in FOURIER:
            self.multiply_adds[kind] += FOURIER[kind](args[0], output, args[1])
        elif kind is aten._scaled_dot_product_flash_attention_for_cpu:  # the registry has other devices' only
            self.multiply_adds[kind] += _attention(*args[:3])
        elif kind in flop_registry:
            self.multiply_adds[kind] += flop_registry[kind](*args, **kwargs, out_val=output) // 2
        return output


def _attention(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Both products, for tensors of shape (N, heads, tokens, channels)."""
    return query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _real_transform(real: Tensor, dims: list[int]) -> int:
    return _complex_transform(real, dims) // 2


def _complex_transform(x: Tensor, dims: list[int]) -> int:
    length = math.prod(x.shape[dim] for dim in dims)
    return round(x.numel() * 5 * math.log2(length) / 2)


FOURIER: dict[Any, Callable[[Tensor, Tensor, list[int]], int]] = {
    aten._fft_r2c: lambda x, y, dims: _real_transform(x, dims),
    aten._fft_c2r: lambda x, y, dims: _real_transform(y, dims),
    aten._fft_c2c: lambda x, y, dims: _complex_transform(x, dims),
}
"""MACs of each Fourier transform from its input, its output and the dimensions."""
