"""A compiled implementation of the block is tried on a small image before it is trusted."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from dsgformer_arch.ops import eager

_LOG = logging.getLogger(__name__)


def passes(
    form: eager.Form,
    channels: int,
    heads: int,
    dtype: torch.dtype,
    device: torch.device,
    weights_dtype: torch.dtype | None = None,
) -> bool:
    """Whether `form` runs and is right, up to rounding; if not, the log says why.

    Args:
        form: what is tried.
        channels: C.
        heads: heads of the attention.
        dtype: of x.
        device: where to compute.
        weights_dtype: of the weights that `form` takes; that of x by default.
    """
    x = (_random(1, 11, 13, channels) * 4).to(device)
    try:
        with torch.no_grad():
            expected = eager.whole(x, x, _weights(channels, heads, torch.float32, device))
            weights = _weights(channels, heads, weights_dtype or dtype, device)
            given = form(x.to(dtype), x.to(dtype), weights)
        error = ((given - expected).abs().max() / expected.abs().max()).item()
    except Exception as reason:  # whatever a compiler and a driver may say, there is a form that works
        level = logging.INFO if device.type == 'cpu' else logging.WARNING  # many a CPU lacks bfloat16
        _LOG.log(level, 'the eager form of DSGA runs on %s, as the one for it failed: %s', device, reason)
        return False
    if not error <= 8 * torch.finfo(dtype).eps:
        _LOG.warning('the eager form of DSGA runs on %s, as the one for it is off by %.1e', device, error)
        return False
    return True


def trains(
    form: Callable[[Tensor, eager.Weights], Tensor], channels: int, heads: int, dtype: torch.dtype
) -> bool:
    """Whether `form(x, weights)` and its gradients are right on a CPU; if not, the log says why.

    Args:
        form: what is tried; takes its weights in float32.
        channels: C.
        heads: heads of the attention.
        dtype: of x.
    """
    x = _random(1, 11, 13, channels) * 4
    direction = _random(1, 11, 13, channels)

    def gradients(form: Callable[[Tensor, eager.Weights], Tensor], dtype: torch.dtype) -> list[Tensor]:
        weights = _weights(channels, heads, torch.float32, x.device)
        given = [x.to(dtype), *(value for value in vars(weights).values() if isinstance(value, Tensor))]
        given = [value.requires_grad_() for value in given]
        with torch.enable_grad():
            y = form(given[0], weights)
            return [y.detach(), *torch.autograd.grad(y, given, direction.to(dtype))]

    try:
        with torch.inference_mode(False), torch.autocast('cpu', enabled=False):
            expected = gradients(lambda x, weights: eager.whole(x, x, weights), torch.float32)
            given = gradients(form, dtype)
        pairs = zip(given, expected, strict=True)
        error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    except Exception as reason:  # whatever a compiler may say, there is a form that works
        _LOG.info('DSGA trains in its eager form, as the one for a CPU failed: %s', reason)
        return False
    if not error <= 32 * torch.finfo(dtype).eps:
        _LOG.warning('DSGA trains in its eager form, as the one for a CPU is off by %.1e', error)
        return False
    return True


def _weights(channels: int, heads: int, dtype: torch.dtype, device: torch.device) -> eager.Weights:
    """Random ones; those that `Weights` wants in float32 at least stay so."""
    return eager.Weights(
        norm_weight=torch.ones(channels, device=device),
        norm_bias=torch.zeros(channels, device=device),
        project_in=_random(4 * channels, channels).to(device, dtype),
        depthwise=_random(4 * channels, 1, 3, 3).to(device, dtype),
        project_out=_random(channels, channels).to(device, dtype),
        temperature=torch.ones(heads, 1, 1, device=device),
        step=None,
        mask=1 + _random(channels, 8, 5).to(device),
        heads=heads,
        top_k=(),
        score='relu2',
        gelu=True,
    )


def _random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    numbers = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
    return numbers.bfloat16().float()  # so that no type rounds them
