"""A study of the training recipe, one change at a time: initial values, k_n, optimiser, loss, resolution.

Every variant differs from the base in one setting.  Runs of a seed use the same crops, so a variant is
compared with the base of the same seed; the interval of the mean difference is Student's over the seeds.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from dsgformer_arch import zoo
from dsgformer_arch.benchmark import record as records
from dsgformer_arch.benchmark.measure import learning
from dsgformer_arch.benchmark.measure.study import Study
from dsgformer_arch.utils.errors import UserError

BASE = 'base'


@dataclass(frozen=True)
class Variant:
    """One change of the base.

    Attributes:
        title: description for the table.
        network: settings of the network other than the preset's.
        recipe: fields of `learning.Recipe` other than the base's.
        cost: an iteration's cost relative to the base's, by MACs; the budget of iterations is
            divided by it, so that all variants have the same.
    """

    title: str
    network: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    cost: float = 1.0


VARIANTS: dict[str, Variant] = {
    BASE: Variant('base'),
    'output_random': Variant("W_p' and tail start at random", {'output_init': 'random'}),
    'scaled': Variant('α starts at √c, W_n at 1.5/c', {'alpha_init': 'sqrt', 'weights_init': 'width'}),
    'drsformer_k': Variant('k_n of DRSformer: 1/2, 2/3, 3/4, 4/5', {'ratios': ('1/2', '2/3', '3/4', '4/5')}),
    'betas_999': Variant('betas 0.9 and 0.999', recipe={'betas': (0.9, 0.999)}),
    'half_rate': Variant('half the learning rate', recipe={'lr': 0.5}),
    'double_rate': Variant('twice the learning rate', recipe={'lr': 2.0}),
    'l1': Variant('L1 loss alone', recipe={'frequency': 0.0}),
    'full_resolution': Variant('patch 1, a quarter of the iterations', {'patch': 1}, cost=4.0),
    'quarter_resolution': Variant('patch 4 and twice the width, the same MACs', {'patch': 4, 'width': 32}),
    'one_head': Variant('one head a level', {'heads': (1, 1, 1, 1)}),
}
"""The variants by name.  A recipe's `lr` is a factor of the base's."""


def run(
    data: str,
    model: str = 'dsgformer_h',
    variants: Sequence[str] = (),
    iterations: int = 600,
    seeds: int = 3,
    batch: int = 4,
    patch: int = 96,
    lr: float = 1e-3,
    validations: int = 1,
    protocol: str = 'gopro',
    device: str = 'cpu',
    out: Path = Path('results/benchmark/recipe'),
    resume: bool = False,
) -> records.Record:
    """Train the base and every variant `seeds` times and write `out`.json.

    Args:
        data: folder of `{train,test}_{lq,gt}.lmdb`.
        model: the DSGformer preset that is varied.
        variants: names of `VARIANTS`; none for all.
        iterations: budget of a run.
        seeds: repetitions; seed k is the same for all variants.
        batch: crops in a step.
        patch: side of the crops.
        lr: peak of the learning rate.
        validations: how often a run is measured.
        protocol: a name in `metrics.PROTOCOLS`, by which the held-out images are scored.
        device: a torch device.
        out: results without their ending.
        resume: keep the runs that `out`.json has; more variants and seeds may be asked for than before.

    Returns:
        The record; rows that could not be measured have an `error`.

    Raises:
        UserError: `model` is not a DSGformer, or a variant is unknown.
    """
    if zoo.get(model).architecture != 'DSGformer':
        raise UserError(f'--model: {model} has no such settings; choose a DSGformer, such as dsgformer_h')
    unknown = [name for name in variants if name not in VARIANTS]
    if unknown:
        raise UserError(f'--variants: there is no {unknown[0]!r}; there are {", ".join(VARIANTS)}')
    chosen = list(dict.fromkeys([BASE, *(variants or VARIANTS)]))
    base = learning.Recipe(
        iterations,
        None,
        batch,
        patch,
        lr,
        validations,
        betas=(0.9, 0.9),
        frequency=0.1,
        precision='bf16',
        protocol=protocol,
    )
    # Seeds are the outer loop: an early end leaves every variant with the same number of runs.
    runs = list(itertools.product(range(seeds), chosen))
    study = Study('recipe', data, base, {'model': model}, len(runs), device, out, resume)
    for seed, name in runs:
        variant = VARIANTS[name]
        changes = dict(variant.recipe)
        if 'lr' in changes:
            changes['lr'] *= lr
        recipe = replace(base, iterations=max(1, round(iterations / variant.cost)), **changes)
        study.train({'seed': seed, 'variant': name}, partial(zoo.create, model, **variant.network), recipe)
    return study.record
