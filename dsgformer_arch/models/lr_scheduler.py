"""Learning-rate schedules that BasicSR lacks, by iteration.

BasicSR steps a schedule once before every iteration but the first, so that
`last_epoch` of a schedule is the number of completed iterations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class WarmupCosineLR(LRScheduler):
    """Linear warm-up, then one cosine down to `eta_min`, which the last iteration reaches.

    Iteration t = 1 … warmup_iter has lr · t / warmup_iter; the following ones
    fall from lr along half a cosine.  (The paper: 10 epochs of warm-up, then
    2990 to 1e-6; also what MPRNet's and MHNet's training does by epoch.)

    Args:
        optimizer: its `lr` is the peak.
        total_iter: iterations of the whole run.
        warmup_iter: iterations of warm-up, 0 for none.
        eta_min: learning rate of the last iteration.
        last_epoch: iterations already done; -1 at the start.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_iter: int,
        warmup_iter: int = 0,
        eta_min: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        if not 0 <= warmup_iter < total_iter:
            raise ValueError(f'warmup_iter is {warmup_iter}, but should lie between 0 and total_iter - 1')
        self.total_iter = total_iter
        self.warmup_iter = warmup_iter
        self.eta_min = eta_min
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        done = self.last_epoch
        if done < self.warmup_iter:
            return [lr * (done + 1) / self.warmup_iter for lr in self.base_lrs]
        steps = max(1, self.total_iter - 1 - self.warmup_iter)
        fraction = min(1.0, (done - self.warmup_iter) / steps)
        cosine = 0.5 * (1 + math.cos(math.pi * fraction))
        return [self.eta_min + (lr - self.eta_min) * cosine for lr in self.base_lrs]


class CosineAnnealingRestartCyclicLR(LRScheduler):
    """Cosines one after another, each with its own floor (Restormer, CVPR 2022).

    With a floor equal to the peak, a cycle is a plateau: Restormer keeps 3e-4
    for 92,000 iterations and then falls to 1e-6 over 208,000.

    Args:
        optimizer: its `lr` is the peak.
        periods: iterations of each cycle.
        restart_weights: factor on the peak of each cycle.
        eta_mins: learning rate at the end of each cycle.
        last_epoch: iterations already done; -1 at the start.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        periods: Sequence[int],
        restart_weights: Sequence[float] = (1,),
        eta_mins: Sequence[float] = (0,),
        last_epoch: int = -1,
    ) -> None:
        if not len(periods) == len(restart_weights) == len(eta_mins):
            raise ValueError('periods, restart_weights and eta_mins should have the same length')
        self.periods = periods
        self.restart_weights = restart_weights
        self.eta_mins = eta_mins
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        start = cycle = 0
        while cycle < len(self.periods) - 1 and self.last_epoch > start + self.periods[cycle]:
            start += self.periods[cycle]
            cycle += 1
        fraction = min(1.0, (self.last_epoch - start) / self.periods[cycle])
        floor, weight = self.eta_mins[cycle], self.restart_weights[cycle]
        cosine = 0.5 * (1 + math.cos(math.pi * fraction))
        return [floor + weight * (lr - floor) * cosine for lr in self.base_lrs]
