"""A record that grows by one row per training run; `training`, `ablation` and `recipe` are made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsgformer_arch.benchmark import record as records
from dsgformer_arch.benchmark.measure import learning, machine
from dsgformer_arch.utils.progress import Stages


class Study:
    """Training runs on the same data, saved after each run.

    Args:
        kind: the benchmark's name, which is also that of the record.
        data: folder of `{train,test}_{lq,gt}.lmdb`.
        recipe: what the runs share.
        settings: further settings of the record, or other values of the recipe's.
        count: number of runs, for the estimate of the remaining time.
        device: a torch device.
        out: results without their ending.
        resume: keep the runs that `out`.json has.
        protocol: how the runs were made; the recipe's description if empty.

    Attributes:
        record: the record; rows that could not be measured have an `error`.

    Raises:
        UserError: a wrong device, data that cannot be used, or a record of other settings.
    """

    def __init__(
        self,
        kind: str,
        data: str,
        recipe: learning.Recipe,
        settings: Mapping[str, Any],
        count: int,
        device: str,
        out: Path,
        resume: bool,
        protocol: str = '',
    ) -> None:
        self.device = machine.device(device)
        self.data = learning.read(data, recipe.patch)
        self.path = records.beside(out, '.json')
        common = {
            'data': records.data_name(data), 'data_sha256': self.data.digest, 'device': device,
            'threads': torch.get_num_threads(), **vars(recipe),
        }  # fmt: skip
        self.record = records.start(
            kind, {**common, **settings}, protocol or recipe.describe(), self.path, resume
        )
        self.record.drop_failed()
        self.record.extra['blurred'] = learning.blurred_scores(self.data, recipe.protocol)
        self.stages = Stages(kind, count)

    def train(
        self,
        row: Mapping[str, Any],
        build: Callable[[], nn.Module],
        recipe: learning.Recipe,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        """Train one network and save its row, unless the record has it.

        A network that fails gets a row with an `error`, and the others are still trained.

        Args:
            row: what tells the run from the others, `seed` among it.
            build: makes the network.
            recipe: of this run.
            more: further entries of the row.
        """
        if self.record.find(**row) is None:
            try:
                with machine.bounded(self.device):
                    result = learning.train(
                        build, self.data, recipe, row['seed'], self.device, self.stages.tick
                    )
            except (RuntimeError, MemoryError, ValueError) as error:
                result = {'error': machine.reason(error)}
            machine.release(self.device)
            self.record.rows.append({**row, **(more or {}), **result})
            self.record.save(self.path)
        self.stages.next()
