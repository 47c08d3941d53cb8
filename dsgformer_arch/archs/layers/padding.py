"""Padding of images to the sizes that networks need."""

from __future__ import annotations

import torch
from torch import Tensor


def pad_to_multiple(x: Tensor, multiple: int, minimum: int = 1) -> Tensor:
    """Pad an image by reflection, below and to the right.

    Unlike `F.pad(mode='reflect')` it takes any size: an image smaller than its padding is reflected as
    often as needed.

    Args:
        x: (…, H, W).
        multiple: the padded height and width are multiples of this.
        minimum: the least padded height and width.

    Returns:
        (…, H', W'); `x` itself if it has such a size already.
    """
    height, width = x.shape[-2:]
    target_h, target_w = (padded_size(size, multiple, minimum) for size in (height, width))
    if target_h != height:
        x = x.index_select(-2, reflected_indices(height, target_h, x.device))
    if target_w != width:
        x = x.index_select(-1, reflected_indices(width, target_w, x.device))
    return x


def crop_padding(output: Tensor, image: Tensor, padded: Tensor) -> Tensor:
    """The part of `output`, a network's result for `padded`, that belongs to `image`.

    Args:
        output: (…, h, w), of the size of `padded` or a fraction of it.
        image: (…, H, W), before padding.
        padded: (…, H', W'), after it.

    Returns:
        (…, H·h/H', W·w/W'), rounded up.
    """
    height, width = (-(-image.shape[i] * output.shape[i] // padded.shape[i]) for i in (-2, -1))
    return output[..., :height, :width]


def padded_size(size: int, multiple: int, minimum: int = 1) -> int:
    """The least multiple of `multiple` that is at least `size` and `minimum`."""
    return -(-max(size, minimum) // multiple) * multiple


def reflected_indices(size: int, target: int, device: torch.device | None = None) -> Tensor:
    """Indices 0, 1, …, size-1, size-2, …, 1, 0, 1, … of length `target`: the border is not repeated."""
    if size == 1:
        return torch.zeros(target, dtype=torch.long, device=device)
    position = torch.arange(target, device=device) % (2 * size - 2)
    return torch.where(position < size, position, 2 * size - 2 - position)
