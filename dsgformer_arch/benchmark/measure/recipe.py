"""What a training recipe is made of, one change at a time: initial values, k_n, optimiser, loss, resolution.

Every variant differs from the base in the one thing that its name says.  Runs of a seed see the same crops,
so a variant is judged by its difference from the base of the same seed, and the interval of the mean
difference is Student's over the seeds.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from scipy.stats import t as student

from dsgformer_arch import zoo
from dsgformer_arch.benchmark import record as records
from dsgformer_arch.benchmark.measure import learning, machine
from dsgformer_arch.benchmark.measure.training import attempt
from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.progress import Stages

BASE = 'base'
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Variant:
    """One change of the base.

    Attributes:
        title: what is changed, for the table.
        network: settings of the network other than the preset's.
        recipe: fields of `learning.Recipe` other than the base's.
        cost: an iteration's cost relative to the base's, by multiply-adds; the budget of iterations is
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
    'quarter_resolution': Variant(
        'patch 4 and twice the width, the same multiply-adds', {'patch': 4, 'width': 32}
    ),
    'one_head': Variant('one head a level', {'heads': (1, 1, 1, 1)}),
}
"""The changes, by the names that the command line takes.  A recipe's `lr` is a factor on the base's."""


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
    device: str = 'cpu',
    out: Path = Path('results/benchmark/recipe'),
    resume: bool = False,
) -> int:
    """Train the base and every variant `seeds` times and write `out`.json, `out`.md and `out`.png.

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
        device: a torch device.
        out: results without their ending.
        resume: keep the runs that `out`.json has; more variants and seeds may be asked for than before.

    Returns:
        0, or 1 if a variant could not be trained.

    Raises:
        UserError: `model` is no DSGformer, or a variant is unknown.
    """
    target = machine.device(device)
    if zoo.get(model).architecture != 'DSGformer':
        raise UserError(f'--model: {model} has no such settings; choose a DSGformer, such as dsgformer_h')
    unknown = [name for name in variants if name not in VARIANTS]
    if unknown:
        raise UserError(f'--variants: there is no {unknown[0]!r}; there are {", ".join(VARIANTS)}')
    chosen = list(dict.fromkeys([BASE, *(variants or VARIANTS)]))
    base = learning.Recipe(
        iterations, None, batch, patch, lr, validations, betas=(0.9, 0.9), frequency=0.1, precision='bf16'
    )
    pairs = learning.read(data, patch)
    settings = {
        'model': model, 'data': records.data_name(data), 'data_sha256': pairs.digest,
        'device': device, 'threads': torch.get_num_threads(), **vars(base),
    }  # fmt: skip
    path = records.beside(out, '.json')
    record = records.start('recipe', settings, base.describe(), path, resume)
    record.drop_failed()
    record.extra['blurred'] = learning.blurred_scores(pairs)
    todo = [(s, name) for s in range(seeds) for name in chosen if not record.find(seed=s, variant=name)]
    # Seeds are the outer loop: an early end leaves every variant with the same number of runs.
    stages = Stages('recipe', len(todo))
    for seed, name in todo:
        variant = VARIANTS[name]
        build = partial(zoo.create, model, **variant.network)
        changes = dict(variant.recipe)
        if 'lr' in changes:
            changes['lr'] *= lr
        recipe = replace(base, iterations=max(1, round(iterations / variant.cost)), **changes)
        row: dict[str, Any] = {'seed': seed, 'variant': name}
        row |= attempt(build, pairs, recipe, seed, target, stages)
        record.rows.append(row)
        record.save(path)
    records.write_text(records.beside(out, '.md'), page(record))
    draw(record, records.beside(out, '.png'))
    print(table(record))
    print(f'wrote {path}, {records.beside(out, ".md")} and {records.beside(out, ".png")}', file=sys.stderr)
    return int(any(row.get('error') for row in record.rows))


def scores_of(record: records.Record, name: str) -> dict[int, float]:
    """PSNR of a variant by seed."""
    return {row['seed']: row['psnr'] for row in record.rows if row['variant'] == name and 'psnr' in row}


def differences(record: records.Record, name: str) -> list[float]:
    """PSNR of a variant minus that of the base, for each seed that both have."""
    base, other = scores_of(record, BASE), scores_of(record, name)
    return [other[seed] - base[seed] for seed in sorted(base.keys() & other.keys())]


def half_interval(values: Sequence[float]) -> float | None:
    """Half the width of Student's confidence interval of the mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    quantile = float(student.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


COLUMNS = {
    'variant': 'change', 'psnr': 'PSNR', 'spread': 'lowest to highest', 'difference': 'minus the base',
    'seeds': 'seeds', 'iterations': 'iterations', 'seconds': 'seconds a run',
}  # fmt: skip


def names_of(record: records.Record) -> list[str]:
    """The variants that a record has, in the order of `VARIANTS`."""
    return [name for name in VARIANTS if any(row['variant'] == name for row in record.rows)]


def cells(record: records.Record) -> list[dict[str, str | None]]:
    """The table's rows as text, one a variant."""
    lines: list[dict[str, str | None]] = [
        {'variant': '(blurred)', 'psnr': f'{record.extra["blurred"]["psnr"]:.3f}'}
    ]
    for name in names_of(record):
        rows = [row for row in record.rows if row['variant'] == name]
        line: dict[str, str | None] = {'variant': VARIANTS[name].title}
        scores = [*scores_of(record, name).values()]
        if scores:
            done = [row for row in rows if 'psnr' in row]
            line |= {
                'psnr': f'{statistics.mean(scores):.3f}',
                'spread': f'{min(scores):.3f} to {max(scores):.3f}',
                'seeds': str(len(scores)),
                'iterations': str(done[0]['iterations']),
                'seconds': f'{statistics.mean(row["seconds"] for row in done):.0f}',
            }
        else:
            line['psnr'] = str(rows[0].get('error'))
        paired = differences(record, name)
        if name != BASE and paired:
            half = half_interval(paired)
            line['difference'] = f'{statistics.mean(paired):+.3f}' + (
                '' if half is None else f' ± {half:.3f}'
            )
        lines.append(line)
    return lines


def table(record: records.Record) -> str:
    """All variants as a Markdown table."""
    return records.markdown_table(COLUMNS, cells(record))


def note(record: records.Record) -> str:
    """What a reader of the table has to know."""
    s = record.settings
    return (
        f'PSNR in dB of {s["model"]} after {s["iterations"]} iterations, fewer where a variant costs more. '
        "The base has the preset's settings. The difference is paired by seed: the mean, ± half the "
        f'{CONFIDENCE:.0%} interval of Student over the seeds. It covers the randomness of training, not of '
        'the choice of test images.'
    )


def title(record: records.Record) -> str:
    """What was measured, as a heading."""
    return f'Training recipe, one change at a time: {record.settings["data"]}'


def page(record: records.Record) -> str:
    """The Markdown page of a run."""
    return records.markdown_page(title(record), record, [note(record), table(record)])


def plot(axis: Axes, record: records.Record) -> None:
    """Each seed's difference from the base as a point, and the mean with its interval as a bar."""
    names = [name for name in names_of(record) if name != BASE and differences(record, name)]
    for i, name in enumerate(names):
        paired = differences(record, name)
        axis.plot(paired, [i] * len(paired), 'o', color='C0', ms=4)
        half = half_interval(paired)
        axis.errorbar(statistics.mean(paired), i, xerr=half, fmt='|', color='C1', capsize=4)
    axis.axvline(0, color='grey', linestyle=':')
    axis.set_yticks(range(len(names)), [VARIANTS[name].title for name in names])
    axis.set(xlabel='difference from the base, dB')
    axis.invert_yaxis()
    axis.grid(axis='x', alpha=0.3)
    axis.spines[['top', 'right']].set_visible(False)


def draw(record: records.Record, path: Path) -> None:
    """The figure of a run."""
    figure, axes = records.canvas(8, 4)
    plot(axes[0], record)
    records.save_figure(figure, path)
