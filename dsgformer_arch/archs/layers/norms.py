"""Layer normalisation over the channels of each pixel, which several networks share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def norm_of_channels(x: Tensor, channels: int, weight: Tensor, bias: Tensor, epsilon: float = 1e-5) -> Tensor:
    """LN over the channels, (N, C, H, W) to the same, by one operator; the result is channels-last.

    A channels-last tensor is contiguous once permuted, so that PyTorch's own kernel runs without a copy.

    Args:
        x: the maps.
        channels: C; exporters keep a number as a constant.
        weight, bias: (C,).
        epsilon: added to the variance.
    """
    return F.layer_norm(x.permute(0, 2, 3, 1), (channels,), weight, bias, epsilon).permute(0, 3, 1, 2)
