"""The comparison that a compiled implementation of the block must pass before it is used."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dsgformer_arch.ops import eager
from dsgformer_arch.ops.isolation import in_new_thread

SLOWDOWN = 'which takes 3.6 to 5.3 times as long'
"""Slowdown of the eager implementation on a CPU (docs/benchmarks/speed.md)."""


@dataclass(frozen=True)
class Verdict:
    """The outcome of a self-test."""

    passed: bool
    reason: str = ''
    """Why it failed."""
    final: bool = True
    """Whether another attempt would have the same outcome."""


def run(
    form: eager.Form,
    channels: int,
    heads: int,
    dtype: torch.dtype,
    device: torch.device,
    weights_dtype: torch.dtype | None = None,
) -> Verdict:
    """Test whether `form` runs and equals the eager implementation in float32, up to rounding.

    The block has the paper's switches, with thresholds that drop most of the positive scores.

    Args:
        form: the implementation.
        channels: C.
        heads: heads of the attention.
        dtype: of x.
        device: where to compute.
        weights_dtype: of the weights that `form` takes; that of x by default.
    """
    try:
        error = in_new_thread(lambda: _error(form, channels, heads, dtype, device, weights_dtype or dtype))
    except Exception as reason:  # any error of a compiler or driver: the eager implementation remains
        return Verdict(False, f'{type(reason).__name__}: {reason}', final=not transient(reason))
    if not error <= 8 * torch.finfo(dtype).eps:
        return Verdict(False, f'its self-test in {dtype} is off by {error:.1e}')
    return Verdict(True)


_warned: set[str] = set()


def warn_once(what: str, reason: str) -> None:
    """Warn, once per process, that the eager implementation replaces the kernel for `what`, and why."""
    if what not in _warned:
        _warned.add(what)
        slowdown = f', {SLOWDOWN}' if what.startswith('cpu') else ''
        warnings.warn(
            f'DSGformer runs without its compiled kernel for {what}{slowdown}. Reason: {reason}', stacklevel=3
        )


def transient(reason: BaseException) -> bool:
    """Whether a failure may not recur: a lack of memory, or a CUDA graph that is being captured."""
    text = str(reason).lower()
    return isinstance(reason, (MemoryError, torch.OutOfMemoryError)) or any(
        words in text for words in ("can't allocate memory", 'out of memory', 'captur')
    )


def _error(
    form: eager.Form,
    channels: int,
    heads: int,
    dtype: torch.dtype,
    device: torch.device,
    weights_dtype: torch.dtype,
) -> float:
    """The largest difference over the largest value."""
    x = _random(1, 11, 13, channels).mul(4).to(device)
    with torch.no_grad():
        expected = eager.whole(x, x, _weights(channels, heads, torch.float32, device))
        given = form(x.to(dtype), x.to(dtype), _weights(channels, heads, weights_dtype, device))
        return ((given - expected).abs().max() / expected.abs().max()).item()


def trains(
    form: Callable[[Tensor, eager.Weights], Tensor], channels: int, heads: int, dtype: torch.dtype
) -> Verdict:
    """Whether `form(x, weights)` and its gradients are right on a CPU.

    Args:
        form: the implementation; takes its weights in float32.
        channels: C.
        heads: heads of the attention.
        dtype: of x.
    """
    x, direction = in_new_thread(lambda: (_random(1, 11, 13, channels) * 4, _random(1, 11, 13, channels)))

    def gradients(form: Callable[[Tensor, eager.Weights], Tensor], dtype: torch.dtype) -> list[Tensor]:
        weights = _weights(channels, heads, torch.float32, x.device)
        given = [x.to(dtype), *(value for value in vars(weights).values() if isinstance(value, Tensor))]
        given = [value.requires_grad_() for value in given]
        with torch.enable_grad():
            y = form(given[0], weights)
            return [y.detach(), *torch.autograd.grad(y, given, direction.to(dtype))]

    try:
        # In a new thread, as in `run`.
        expected = in_new_thread(
            lambda: gradients(lambda x, weights: eager.whole(x, x, weights), torch.float32)
        )
        given = in_new_thread(lambda: gradients(form, dtype))
        pairs = zip(given, expected, strict=True)
        error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    except Exception as reason:  # any error of a compiler: the eager implementation remains
        return Verdict(False, f'{type(reason).__name__}: {reason}', final=not transient(reason))
    if not error <= 32 * torch.finfo(dtype).eps:
        return Verdict(False, f'the self-test of its gradients in {dtype} is off by {error:.1e}')
    return Verdict(True)


def _weights(channels: int, heads: int, dtype: torch.dtype, device: torch.device) -> eager.Weights:
    """Weights of a block whose scores differ clearly, so that rounding does not decide which ones T_k keeps.

    W_p gives every channel of Q the same values a and the channels of K mixtures of a and an orthogonal b:
    the scores of a row are then the cosines of the mixtures' angles.  Parameters for which `Weights`
    requires float32 stay in float32.
    """
    c = channels // heads
    cosines = torch.linspace(-0.9, 0.9, c, dtype=torch.float32, device='cpu')
    cosines = cosines[torch.arange(c, device='cpu') * _stride(c) % c]  # shuffled
    a, b = _random(2, channels).unbind()
    b = b - (a @ b) / (a @ a) * a
    project_in = _random(4 * channels, channels)
    depthwise = _random(4 * channels, 1, 3, 3)
    project_in[:channels] = a
    project_in[channels : 2 * channels] = (
        cosines.repeat(heads)[:, None] * a + (1 - cosines.square()).sqrt().repeat(heads)[:, None] * b
    )
    project_in = project_in.bfloat16().float()
    depthwise[: 2 * channels] = depthwise[:1]
    return eager.Weights(
        norm_weight=torch.ones(channels, dtype=torch.float32, device=device),
        norm_bias=torch.zeros(channels, dtype=torch.float32, device=device),
        project_in=project_in.to(device, dtype),
        depthwise=depthwise.to(device, dtype),
        project_out=_random(channels, channels).to(device, dtype),
        temperature=torch.ones(heads, 1, 1, dtype=torch.float32, device=device),
        step=torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float32, device=device),
        mask=1 + _random(channels, 8, 5).to(device),
        heads=heads,
        top_k=(max(1, c // 8), max(1, c // 5), max(1, c // 4), max(1, c // 3)),
        score='relu2',
        gelu=True,
    )


def _stride(c: int) -> int:
    """A step that visits 0 … c - 1 in a shuffled order."""
    return next(step for step in (7, 11, 13, 1) if c % step)


def _random(*shape: int) -> Tensor:
    generator = torch.Generator('cpu').manual_seed(sum(shape))
    numbers = torch.randn(shape, generator=generator, dtype=torch.float32, device='cpu')
    return (numbers / shape[-1] ** 0.5).bfloat16().float()  # so that no type rounds them
