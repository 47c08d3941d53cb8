"""Detect failed restorations: values that are not finite, and blocks of a colour that the image lacks.

Local pooling (TLC) can divide by statistics of a flat window and return blocks of a colour that the image
does not have (megvii-research/NAFNet#25).  Deblurring moves light by no more than the length of the blur, so
the mean over a block stays close to the range of the means around it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 32
"""Side of the blocks whose means are compared, in pixels."""

MAX_SHIFT = 0.25
"""How far the mean of a block may lie outside the range of the means of the blocks around it, in [0, 1]."""


def fault(restored: Tensor, image: Tensor) -> str | None:
    """The fault of a restored image, as a phrase; None where there is none.

    Args:
        restored: (N, 3, H, W), the output of the network, not clipped.
        image: (N, 3, H, W) in [0, 1], its input.
    """
    before, after = _means(image), _means(restored)
    if not torch.isfinite(after).all():  # one such value makes the mean of its block not finite
        return 'values that are not finite'
    highest = F.max_pool2d(before, 3, 1, padding=1)
    lowest = -F.max_pool2d(-before, 3, 1, padding=1)
    if torch.maximum(after - highest, lowest - after).max() > MAX_SHIFT:
        return 'blocks of another colour'
    return None


def _means(x: Tensor) -> Tensor:
    """Mean of each block, (N, C, ⌈H / BLOCK⌉, ⌈W / BLOCK⌉); the last row and column may be smaller."""
    # Several times as fast on a CPU as `avg_pool2d`.
    return _means_along(_means_along(x, -1), -2)


def _means_along(x: Tensor, dim: int) -> Tensor:
    rest = x.shape[dim] % BLOCK
    whole = x.shape[dim] - rest
    means = x.narrow(dim, 0, whole).unflatten(dim, (whole // BLOCK, BLOCK)).mean(dim)
    if not rest:
        return means
    return torch.cat([means, x.narrow(dim, whole, rest).mean(dim, keepdim=True)], dim)
