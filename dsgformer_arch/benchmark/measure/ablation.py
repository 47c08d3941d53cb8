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

import torch

from dsgformer_arch import zoo
from dsgformer_arch.benchmark import record as records
from dsgformer_arch.benchmark.measure import learning, machine
from dsgformer_arch.benchmark.measure.training import attempt
from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.progress import Stages

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
        device: a torch device.
        out: results without their ending.
        resume: keep the runs that `out`.json has.

    Returns:
        The record; rows that could not be measured have an `error`.
    """
    target = machine.device(device)
    if zoo.get(model).architecture != 'DSGformer':
        raise UserError(f'--model: {model} has no switches to vary; choose a DSGformer, such as dsgformer_t')
    recipe = learning.Recipe(iterations, None, batch, patch, lr, validations)
    pairs = learning.read(data, patch)
    settings = {
        'model': model, 'data': records.data_name(data), 'data_sha256': pairs.digest, 'seeds': seeds,
        'device': device, 'threads': torch.get_num_threads(), **recipe.__dict__,
    }  # fmt: skip
    path = records.beside(out, '.json')
    record = records.start('ablation', settings, recipe.describe(), path, resume)
    record.drop_failed()
    record.extra['blurred'] = learning.blurred_scores(pairs)
    variants: list[dict[str, Any]] = [
        {'attention': attention, 'gate': gate, 'score': score}
        for attention, gate, score in itertools.product(ATTENTIONS, GATES, SCORES)
    ]
    todo = [(s, variant) for s in range(seeds) for variant in variants if not record.find(seed=s, **variant)]
    stages = Stages('ablation', len(todo))
    for seed, variant in todo:
        build = partial(zoo.create, model, **variant)
        row: dict[str, Any] = {'seed': seed, **variant}
        row |= attempt(build, pairs, recipe, seed, target, stages)
        record.rows.append(row)
        record.save(path)
    return record
