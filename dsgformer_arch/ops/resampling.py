"""The steps outside the levels: the head, downsampling, upsampling with the skip connection, and the tail.

Each is one product of matrices a row of pixels: the head takes the 27 numbers
around a pixel, a 2×2 convolution of stride 2 pairs of neighbours, which lie side
by side in channels-last order; PixelShuffle puts pairs of neighbours side by
side, and the tail makes 27 numbers of a pixel.  On a CPU, `cpu/resampling.h`
computes them; elsewhere the modules run as they stand.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsgformer_arch.ops.block import computes_in, steps_train_in
from dsgformer_arch.ops.cpu import binding, training, training_steps


def head(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """`conv(x)`.

    Args:
        conv: 3×3 with a padding of 1 and a bias.
        x: (N, 3, H, W).

    Returns:
        (N, C, H, W), channels-last on the fast path.
    """
    if (dtype := steps_train_in(x)) is not None and not conv.out_channels % training.LANES:
        parameters = conv.weight.float(), _bias(conv)
        return _channels_first(training_steps.convolved(_channels_last(x, dtype), *parameters))
    dtype = computes_in(x, conv.out_channels)
    if dtype is None:
        return cast(Tensor, conv(x))
    # (C, 3, 3, 3) as (C, (row, column, 3)), filled up to whole vectors
    weight = conv.weight.float().permute(0, 2, 3, 1).flatten(1)
    weight = F.pad(weight, (0, -weight.shape[1] % binding.LANES))
    return _channels_first(binding.convolved(_channels_last(x, dtype), weight, _bias(conv)))


def down(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """`conv(x)`.

    Args:
        conv: 2×2 of stride 2, with a bias.
        x: (N, C, H, W), H and W even.

    Returns:
        (N, C', H/2, W/2), channels-last on the fast path.
    """
    widths = 2 * x.shape[1], conv.out_channels
    if (dtype := steps_train_in(x, *widths)) is not None:
        parameters = conv.weight.float(), _bias(conv)
        return _channels_first(training_steps.downsampled(_channels_last(x, dtype), *parameters))
    dtype = computes_in(x, *widths)
    if dtype is None:
        return cast(Tensor, conv(x))
    # (C', C, 2, 2) as (row, C', (column, C)): what a row of the image is multiplied with
    weight = conv.weight.float().permute(2, 0, 3, 1).contiguous()
    return _channels_first(binding.downsampled(_channels_last(x, dtype), weight, _bias(conv)))


def up(shuffled: nn.Sequential, x: Tensor, skip: Tensor | None) -> Tensor:
    """`shuffled(x) + skip`.

    Args:
        shuffled: a 1×1 convolution without bias, then PixelShuffle(2).
        x: (N, C', H, W).
        skip: (N, C, 2H, 2W), or None for zeros.

    Returns:
        (N, C, 2H, 2W), channels-last on the fast path.
    """
    conv = cast(nn.Conv2d, shuffled[0])
    fine = conv.out_channels // 4
    if (dtype := steps_train_in(x, 2 * fine, x.shape[1])) is not None:
        added = None if skip is None else _channels_last(skip, dtype)
        return _channels_first(training_steps.upsampled(_channels_last(x, dtype), conv.weight.float(), added))
    dtype = computes_in(x, 2 * fine, x.shape[1])
    if dtype is None:
        return cast(Tensor, shuffled(x)) if skip is None else cast(Tensor, shuffled(x)) + skip
    # (4C, C') with PixelShuffle's (C, row, column) first, as (row, (column, C), C')
    weight = conv.weight.float().view(fine, 2, 2, -1).permute(1, 2, 0, 3).contiguous()
    added = None if skip is None else _channels_last(skip, dtype)
    return _channels_first(binding.upsampled(_channels_last(x, dtype), weight, added))


def tail(conv: nn.Conv2d, x: Tensor, image: Tensor) -> Tensor:
    """`conv(x) + image`.

    Args:
        conv: 3×3 to 3 channels with a padding of 1 and a bias.
        x: (N, C, H, W).
        image: (N, 3, H, W).

    Returns:
        (N, 3, H, W), channels-last on the fast path.
    """
    if (dtype := steps_train_in(x, x.shape[1])) is not None and image.dtype == torch.float32:
        parameters = conv.weight.float(), _bias(conv), _channels_last(image, image.dtype)
        return _channels_first(training_steps.summed(_channels_last(x, dtype), *parameters))
    dtype = computes_in(x, x.shape[1])
    if dtype is None or image.dtype != torch.float32:
        return cast(Tensor, conv(x)) + image
    # (3, C, 3, 3) as ((row, column, 3), C): a pixel gives its numbers to the neighbours that see it there
    weight = conv.weight.float().permute(2, 3, 0, 1).flatten(0, 2)
    weight = F.pad(weight, (0, 0, 0, -weight.shape[0] % binding.LANES))
    skip = _channels_last(image, image.dtype)
    return _channels_first(binding.summed(_channels_last(x, dtype), weight, _bias(conv), skip))


def _channels_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).permute(0, 2, 3, 1).contiguous()


def _channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _bias(conv: nn.Conv2d) -> Tensor:
    return cast(Tensor, conv.bias).float().contiguous()
