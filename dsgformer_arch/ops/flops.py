"""Counts of the operators' operations, for `torch.utils.flop_counter`.

A module of its own: that of PyTorch imports Triton, which a process that only restores images does not need.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from dsgformer_arch.ops import library as library  # which has the operators


@register_flop_formula(torch.ops.dsgformer.block)
def _block_flops(x_shape: Sequence[int], *arguments: Any, out_shape: Any = None, **_: Any) -> int:
    """Two for each MAC of the convolutions and of the attention's products, as those of the reference."""
    n, height, width, channels = x_shape
    heads = arguments[8]
    macs = channels * (4 * channels + 4 * 9 + 2 * channels // heads + channels)
    return 2 * n * height * width * macs


@register_flop_formula(torch.ops.dsgformer.upsample)
def _upsample_flops(
    x_shape: Sequence[int], weight_shape: Sequence[int], *_: Any, out_shape: Any = None, **__: Any
) -> int:
    n, height, width, coarse = x_shape
    return 2 * n * height * width * coarse * weight_shape[0]
