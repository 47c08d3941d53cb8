"""Inference on a CPU, one strip of rows after the other: what a block computes on its way stays in the cache.

A block of a restoration network makes maps of two to five times its channels, and each of them is written
to memory and read again.  In strips of rows these maps are small.  The arithmetic is the block's own: its
modules are called on the strip and on `halo` more rows at either side, as far as the convolutions see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from dsgformer_arch import ops

STRIP_BYTES = 32 << 20
"""Size of a block's widest map of one strip, in float32: a server's L3.  With 4 MiB, the L2 of two cores, the
larger number of operators costs more than the cache saves (Restormer at 128×128: 1009 against 919 ms).
"""

LEAST_ROWS = 8
"""Of a strip; the halo is computed twice."""


def pointwise(conv: nn.Module, x: Tensor) -> Tensor:
    """`conv(x)` of a 1×1 convolution, in float32 by oneDNN, whatever the number of threads.

    With one thread PyTorch takes MKL, which is two to three times slower where the processor is not Intel's.
    """
    if (
        torch.get_num_threads() == 1
        and x.dtype == torch.float32
        and ops.block.computing_dtype(x) == torch.float32
        and ops.block.is_untouched(conv, nn.Conv2d)
        and torch.backends.mkldnn.enabled
        and torch.backends.mkldnn.is_available()
    ):
        kernel, bias = cast(Tensor, conv.weight), cast(Tensor | None, conv.bias)
        return torch.mkldnn_convolution(x, kernel, bias, (0, 0), (1, 1), (1, 1), 1)
    return cast(Tensor, conv(x))


class Strip(NamedTuple):
    """Some rows of one image of a batch.

    Attributes:
        maps: the rows and their halo of each map, (1, C, rows + halo, W).
        image: number of the image in the batch.
        rows: of the whole map.
        inner: the same rows in `maps`.
    """

    maps: tuple[Tensor, ...]
    image: int
    rows: slice
    inner: slice


def suit(x: Tensor) -> bool:
    """Whether strips may replace the plain call for a map x: on a CPU, without gradients, not recorded.

    `ops.use('plain')` and `DSGFORMER_PLAIN=1` forbid it.
    """
    return (
        x.device.type == 'cpu'
        and x.dtype in (torch.float32, torch.bfloat16)
        and not torch.is_grad_enabled()
        and ops.fast(x)
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode())
    )


def channels_last(x: Tensor) -> Tensor:
    """x in the memory format in which strips are contiguous, if strips suit it; otherwise x."""
    return x.contiguous(memory_format=torch.channels_last) if suit(x) else x


def strips(maps: Sequence[Tensor], widest: int, halo: int = 0) -> Iterator[Strip]:
    """The strips of a batch, from the top of each image.

    Args:
        maps: (N, C, H, W) each, of equal N, H and W; channels-last for speed.
        widest: channels of the widest map that is made of a strip.
        halo: rows above and below that it needs; fewer at the border of the image.
    """
    number, _, height, width = maps[0].shape
    count = max(1, height * width * widest * torch.float32.itemsize // STRIP_BYTES)
    rows = max(LEAST_ROWS, -(-height // count))
    for index in range(number):
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            start, end = max(top - halo, 0), min(bottom + halo, height)
            part = tuple(x[index : index + 1, :, start:end] for x in maps)
            yield Strip(part, index, slice(top, bottom), slice(top - start, bottom - start))


def in_strips(function: Callable[..., Tensor], maps: Sequence[Tensor], widest: int, halo: int = 0) -> Tensor:
    """`function(*maps)` strip by strip.

    Args:
        function: of maps of some rows, (1, C, h, W) each, to a map of the same rows, (1, C', h, W).  A row
            of its result depends on `halo` rows above and below.
        maps, widest, halo: see `strips`.

    Returns:
        (N, C', H, W), channels-last.
    """
    number, _, height, width = maps[0].shape
    result: Tensor | None = None
    for strip in strips(maps, widest, halo):
        part = function(*strip.maps)
        if number == 1 and strip.rows == slice(0, height):
            return part.contiguous(memory_format=torch.channels_last)
        if result is None:
            shape = (number, part.shape[1], height, width)
            result = torch.empty(shape, dtype=part.dtype, memory_format=torch.channels_last)
        result[strip.image, :, strip.rows] = part[0, :, strip.inner]
    assert result is not None
    return result
