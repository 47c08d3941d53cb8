"""The paper's table 2 on a budget: attention × score × gate, trained alike.

The paper's numbers are PSNR on RealBlur-J after its full training; the ones
measured here come from a short run on other data.  Both are listed
to compare the order of the variants, not the numbers.
"""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

from dsgformer_arch import zoo
from dsgformer_arch.benchmark import record as records
from dsgformer_arch.benchmark.measure import learning
from dsgformer_arch.benchmark.measure.study import Study
from dsgformer_arch.utils.errors import UserError

ATTENTIONS = ('dtsas', 'mdta')
GATES = ('simplegate', 'gelu', 'dfgb')
SCORES = ('relu', 'relu2', 'softmax')


def run(
    data: str,
    model: str = 'dsgformer_t',
    iterations: int = 300,
    seeds: int = 2,
    batch: int = 8,
    patch: int = 64,
    lr: float = 1e-3,
    validations: int = 4,
    protocol: str = 'gopro',
    device: str = 'cpu',
    out: Path = Path('results/benchmark/ablation'),
    resume: bool = False,
) -> records.Record:
    """Train all 18 variants `seeds` times and write `out`.json.

    Args:
        data: folder of `{train,test}_{lq,gt}.lmdb`.
        model: the DSGformer preset that is varied.
        iterations: budget of a run.
        seeds: repetitions; seed k is the same for all variants.
        batch: crops in a step.
        patch: side of the crops.
        lr: peak of the learning rate.
        validations: how often a run is measured.
        protocol: a name in `metrics.PROTOCOLS`, by which the held-out images are scored.
        device: a torch device.
        out: results without their ending.
        resume: keep the runs that `out`.json has.

    Returns:
        The record; rows that could not be measured have an `error`.
    """
    if zoo.get(model).architecture != 'DSGformer':
        raise UserError(f'--model: {model} has no switches to vary; choose a DSGformer, such as dsgformer_t')
    recipe = learning.Recipe(iterations, None, batch, patch, lr, validations, protocol=protocol)
    variants: list[dict[str, Any]] = [
        {'attention': attention, 'gate': gate, 'score': score}
        for attention, gate, score in itertools.product(ATTENTIONS, GATES, SCORES)
    ]
    settings = {'model': model, 'seeds': seeds}
    study = Study('ablation', data, recipe, settings, seeds * len(variants), device, out, resume)
    for seed, variant in itertools.product(range(seeds), variants):
        study.train({'seed': seed, **variant}, partial(zoo.create, model, **variant), recipe)
    return study.record
