"""A compiled form of the block is tried on a small image before it is trusted."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from dsgformer_arch.ops import dsga

_LOG = logging.getLogger(__name__)


def passes(
    form: dsga.Form,
    channels: int,
    heads: int,
    dtype: torch.dtype,
    device: torch.device,
    weights_dtype: torch.dtype | None = None,
) -> bool:
    """Whether `form` runs and is right, up to rounding; if not, the log says why.

    Arguments as for `error`.
    """
    try:
        found = error(form, channels, heads, dtype, device, weights_dtype)
    except Exception as reason:  # whatever a compiler and a driver may say, there is a form that works
        level = logging.INFO if device.type == 'cpu' else logging.WARNING  # many a CPU lacks bfloat16
        _LOG.log(level, 'the eager form of DSGA runs on %s, as the one for it failed: %s', device, reason)
        return False
    if not found <= 8 * torch.finfo(dtype).eps:
        _LOG.warning('the eager form of DSGA runs on %s, as the one for it is off by %.1e', device, found)
        return False
    return True


def error(
    form: dsga.Form,
    channels: int,
    heads: int,
    dtype: torch.dtype,
    device: torch.device,
    weights_dtype: torch.dtype | None = None,
) -> float:
    """How far `form` is from the eager one in float32, over the largest number of that.

    Args:
        form: what is tried.
        channels: C.
        heads: heads of the attention.
        dtype: of x.
        device: where to compute.
        weights_dtype: of the weights that `form` takes; that of x by default.
    """
    x = _random(1, 11, 13, channels) * 4
    parameters = {
        'norm_weight': torch.ones(channels),
        'norm_bias': torch.zeros(channels),
        'project_in': _random(4 * channels, channels),
        'depthwise': _random(4 * channels, 1, 3, 3),
        'project_out': _random(channels, channels),
        'temperature': torch.ones(heads, 1, 1),
        'mask': 1 + _random(channels, 8, 5),
    }
    wide = {'norm_weight', 'norm_bias', 'temperature', 'mask'}

    def weights(kind: torch.dtype) -> dsga.Weights:
        tensors = {
            name: value.to(device, torch.float32 if name in wide else kind)
            for name, value in parameters.items()
        }
        return dsga.Weights(**tensors, step=None, heads=heads, top_k=(), score='relu2', gelu=True)

    x = x.to(device)
    with torch.no_grad():
        expected = dsga.whole(x, x, weights(torch.float32))
        given = form(x.to(dtype), x.to(dtype), weights(weights_dtype or dtype))
    return ((given - expected).abs().max() / expected.abs().max()).item()


def _random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    numbers = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
    return numbers.bfloat16().float()  # so that no type rounds them
