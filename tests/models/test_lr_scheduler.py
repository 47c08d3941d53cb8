"""Schedules, as BasicSR steps them: once before every iteration but the first."""

from __future__ import annotations

import math

import pytest
import torch

from dsgformer_arch.models.lr_scheduler import CosineAnnealingRestartCyclicLR, WarmupCosineLR


def rates(schedule: type, lr: float, iterations: int, **settings: object) -> list[float]:
    """The learning rate of iterations 1, 2, …."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr)
    scheduler = schedule(optimizer, **settings)
    values = []
    for iteration in range(1, iterations + 1):
        if iteration > 1:
            optimizer.step()
            scheduler.step()
        values.append(optimizer.param_groups[0]['lr'])
    return values


def test_warmup_then_cosine_to_the_end() -> None:
    values = rates(WarmupCosineLR, 2e-4, 100, total_iter=100, warmup_iter=10, eta_min=1e-6)
    assert values[:10] == pytest.approx([2e-4 * i / 10 for i in range(1, 11)])
    assert values[10] == pytest.approx(2e-4)
    assert values[-1] == pytest.approx(1e-6)
    assert values[10:] == sorted(values[10:], reverse=True)
    middle = 10 + 40
    expected = 1e-6 + (2e-4 - 1e-6) * 0.5 * (1 + math.cos(math.pi * 40 / 89))
    assert values[middle] == pytest.approx(expected)


def test_resumed_schedule_continues() -> None:
    settings = {'total_iter': 50, 'warmup_iter': 5, 'eta_min': 1e-6}
    whole = rates(WarmupCosineLR, 1e-3, 50, **settings)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1e-3)
    first = WarmupCosineLR(optimizer, **settings)
    for _ in range(19):
        optimizer.step()
        first.step()
    second = WarmupCosineLR(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1e-3), **settings)
    second.load_state_dict(first.state_dict())
    second.optimizer.step()
    second.step()
    assert second.get_last_lr()[0] == pytest.approx(whole[20])


def test_warmup_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match='warmup_iter'):
        rates(WarmupCosineLR, 1e-3, 1, total_iter=5, warmup_iter=5)


def test_restormer_plateau_then_fall() -> None:
    """Restormer's setting in small: a plateau of 10, then a fall over 20 to 1e-6."""
    cycles = {'periods': [10, 20], 'restart_weights': [1, 1], 'eta_mins': [3e-4, 1e-6]}
    values = rates(CosineAnnealingRestartCyclicLR, 3e-4, 31, **cycles)
    assert values[:11] == pytest.approx([3e-4] * 11)
    assert values[11] < 3e-4
    assert values[30] == pytest.approx(1e-6)
    with pytest.raises(ValueError, match='same length'):
        rates(CosineAnnealingRestartCyclicLR, 1, 1, periods=[1, 2])
