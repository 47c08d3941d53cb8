"""Training of the systems at equal cost: PSNR against iterations and time, over seeds."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dsgformer_arch import zoo
from dsgformer_arch.benchmark import record as records
from dsgformer_arch.benchmark.measure import learning
from dsgformer_arch.benchmark.measure.complexity import multiply_adds
from dsgformer_arch.benchmark.measure.study import Study
from dsgformer_arch.utils.errors import UserError

MATCH_SIZE = 256
"""Side of the image at which MACs are matched."""


def run(
    models: Sequence[str],
    data: str,
    match: str | None = None,
    iterations: int | None = None,
    seconds: float | None = None,
    seeds: int = 2,
    batch: int = 8,
    patch: int = 64,
    lr: Sequence[float] = (1e-3,),
    rates: Path | None = None,
    precision: str = 'fp32',
    validations: int = 4,
    protocol: str = 'gopro',
    device: str = 'cpu',
    out: Path = Path('results/benchmark/training'),
    resume: bool = False,
) -> records.Record:
    """Train every system `seeds` times and write `out`.json.

    Args:
        models: names of the zoo.
        data: folder of `{train,test}_{lq,gt}.lmdb`.
        match: scale every other system's width to the MACs of this one.
        iterations: budget of a run; or
        seconds: the budget as a time.
        seeds: repetitions; seed k is the same for all systems.
        batch: crops in a step.
        patch: side of the crops.
        lr: peak of the learning rate. With several, seed 0 trains every system with each, and the other seeds
            train it with the rate that reached the highest PSNR.
        rates: results of an earlier comparison, PATH.json, whose best learning rate of every system takes the
            place of `lr`.
        precision: `'fp32'`, or `'bf16'` for autocast in training.
        validations: how often a run is measured.
        protocol: a name in `metrics.PROTOCOLS`, by which the held-out images are scored.
        device: a torch device.
        out: results without their ending.
        resume: keep the runs that `out`.json has.

    Returns:
        The record; rows that could not be measured have an `error`.

    Raises:
        UserError: a wrong setting, data that cannot be used, or a system that `rates` does not hold.
    """
    tried = {name: [known_rate(rates, name)] if rates else list(lr) for name in models}
    recipe = learning.Recipe(
        iterations, seconds, batch, patch, lr[0], validations, precision=precision, protocol=protocol
    )
    settings = {'models': list(models), 'match': match, 'seeds': seeds, 'lr': tried if rates else list(lr)}
    # Seeds are the outer loop: an early end leaves every system with the same number of runs.
    runs: list[tuple[int, str, float | None]] = [(0, name, rate) for name in models for rate in tried[name]]
    runs += [(seed, name, None) for seed in range(1, seeds) for name in models]
    protocol_text = describe(recipe, lr, rates)
    study = Study('training', data, recipe, settings, len(runs), device, out, resume, protocol_text)
    overrides = {name: matched(name, match) if match else {} for name in models}
    costs = {name: cost(name, overrides[name]) for name in models}
    for seed, name, given in runs:
        rate = given or best_rate(study.record, name)
        study.train(
            {'model': name, 'seed': seed, 'lr': rate},
            partial(zoo.create, name, **overrides[name]),
            replace(recipe, lr=rate),
            {'scaled': overrides[name], **costs[name]},
        )
    return study.record


def describe(recipe: learning.Recipe, lr: Sequence[float], rates: Path | None) -> str:
    """How the runs were made, in sentences."""
    if rates:
        return f'{recipe.describe(rate="its own rate")} The rate of each system is its best in {rates.name}.'
    if len(lr) == 1:
        return recipe.describe()
    tried = ', '.join(f'{rate:g}' for rate in lr)
    return (
        f'{recipe.describe(rate="its own rate")} Seed 0 trains every system with the peak learning rates '
        f'{tried}; the table holds the rate that reached the highest PSNR there, and the other seeds use it.'
    )


def best_rate(record: records.Record, model: str) -> float:
    """The learning rate that gave a system its highest PSNR in seed 0; the first if all runs failed."""
    rows = [row for row in record.rows if row['model'] == model and row['seed'] == 0]
    best = max(rows, key=lambda row: row.get('psnr', -math.inf))
    return float(best['lr'])


def known_rate(path: Path, model: str) -> float:
    """The best learning rate of a system in the results of an earlier comparison.

    Raises:
        UserError: the file holds no comparison, or not this system.
    """
    record = records.Record.load(path)
    if record.kind != 'training' or all(row['model'] != model for row in record.rows):
        raise UserError(f'--rates: {path} has no training of {model}; measure it there first')
    return best_rate(record, model)


def cost(name: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """Parameters and MACs of a system as it is trained here."""
    parameters = sum(parameter.numel() for parameter in zoo.create(name, **overrides).parameters())
    macs = multiply_adds(name, MATCH_SIZE, MATCH_SIZE, **overrides)
    return {'parameters': parameters, 'multiply_adds': macs}


NARROWEST, WIDEST = 2, 128
"""Widths that `--match` tries for the first level of a system."""

FARTHEST = 2.0
"""Largest ratio between the MACs of a scaled system and the reference, in either direction."""


def matched(name: str, reference: str) -> dict[str, Any]:
    """The overrides of a system's widths that bring its MACs nearest to the reference's.

    Raises:
        UserError: the system has no widths to scale, or none of them comes near.
    """
    if name == reference:
        return {}
    system = zoo.get(name)
    kind = zoo.network_class(system.architecture)
    if not kind.width_settings:
        raise UserError(f'--match: {name} has no widths that could be scaled; leave it out')
    target = multiply_adds(reference, MATCH_SIZE, MATCH_SIZE)
    nearest, best = math.inf, {}
    for width in range(NARROWEST, WIDEST + 1):
        overrides = kind.scaled_widths(system.settings, width)
        ratio = spent(name, overrides) / target
        distance = abs(math.log(ratio))
        if distance < nearest:
            nearest, best = distance, overrides
        if 1 < ratio < math.inf:
            break
    if nearest > math.log(FARTHEST):
        raise UserError(
            f'--match: no width of {name} comes near the {target / 1e9:.1f} G MACs of {reference}; '
            'leave it out'
        )
    return best


def spent(name: str, overrides: dict[str, Any]) -> float:
    """MACs of a system with these widths; infinite where they make no network."""
    torch_says = logging.getLogger('torch._subclasses.fake_tensor')  # a traceback for each such width
    before, torch_says.disabled = torch_says.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings('error', 'Initializing zero-element')  # a layer without channels
            return multiply_adds(name, MATCH_SIZE, MATCH_SIZE, **overrides)
    except (UserError, UserWarning, RuntimeError, ValueError, ZeroDivisionError):
        return math.inf
    finally:
        torch_says.disabled = before
