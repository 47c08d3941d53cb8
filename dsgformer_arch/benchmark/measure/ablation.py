"""The paper's table 2 on a budget: attention × score × gate, trained alike.

The paper's numbers are PSNR on RealBlur-J after its full training; the ones
measured here come from a short run on other data.  They stand side by side to
compare the order of the variants, not the numbers.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes

from dsgformer_arch import zoo
from dsgformer_arch.benchmark import record as records
from dsgformer_arch.benchmark.measure import learning, machine
from dsgformer_arch.benchmark.measure.training import attempt
from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.progress import Stages

ATTENTIONS = ('dtsas', 'mdta')
GATES = ('simplegate', 'gelu', 'dfgb')
SCORES = ('relu', 'relu2', 'softmax')

PAPER = {
    ('simplegate', 'relu'): 30.29, ('simplegate', 'relu2'): 31.61, ('simplegate', 'softmax'): 30.76,
    ('gelu', 'relu'): 30.09, ('gelu', 'relu2'): 31.56, ('gelu', 'softmax'): 30.89,
}  # fmt: skip
"""PSNR on RealBlur-J in the paper's table 2, as far as it can be read (its DFGB rows cannot)."""

TITLES = {
    'simplegate': 'SimpleGate', 'gelu': 'GELU', 'dfgb': 'DFGB', 'relu': 'ReLU', 'relu2': 'ReLU²',
    'softmax': 'softmax', 'dtsas': 'DTSAS', 'mdta': 'MDTA',
}  # fmt: skip


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
) -> int:
    """Train all 18 variants `seeds` times and write `out`.json, `out`.md and `out`.png.

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
        0, or 1 if a variant could not be trained.
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
    records.write_text(records.beside(out, '.md'), page(record))
    draw(record, records.beside(out, '.png'))
    print(table(record))
    print(f'wrote {path}, {records.beside(out, ".md")} and {records.beside(out, ".png")}', file=sys.stderr)
    return int(any(row.get('error') for row in record.rows))


def scores_of(record: records.Record, attention: str, gate: str, score: str) -> list[float]:
    """PSNR of one variant by seed."""
    return [
        row['psnr']
        for row in record.rows
        if (row['attention'], row['gate'], row['score']) == (attention, gate, score) and 'psnr' in row
    ]


COLUMNS = {
    'whose': 'numbers of', 'attention': 'attention', 'gate': 'gate',
    **{score: TITLES[score] for score in SCORES},
}  # fmt: skip


def cells(record: records.Record) -> list[dict[str, str | None]]:
    """The table's rows as text: gates in rows, scores in columns, and whose numbers they are in each row."""
    rows: list[dict[str, str | None]] = [
        {
            'whose': '**the paper** (RealBlur-J)', 'attention': TITLES['dtsas'], 'gate': TITLES[gate],
            **{s: f'{PAPER[gate, s]:.2f}' if (gate, s) in PAPER else None for s in SCORES},
        }
        for gate in GATES
    ]  # fmt: skip
    for attention in ATTENTIONS:
        for gate in GATES:
            row: dict[str, str | None] = {
                'whose': 'this run',
                'attention': TITLES[attention],
                'gate': TITLES[gate],
            }
            for score in SCORES:
                values = scores_of(record, attention, gate, score)
                if values:
                    half = (max(values) - min(values)) / 2
                    row[score] = f'{statistics.mean(values):.2f} ± {half:.2f}'
            rows.append(row)
    return rows


def table(record: records.Record) -> str:
    """The paper's layout as a Markdown table."""
    return records.markdown_table(COLUMNS, cells(record))


def note(record: records.Record) -> str:
    """What a reader of the table has to know."""
    s = record.settings
    return (
        f"PSNR in dB. The paper's rows are its table 2 on RealBlur-J after full training (its DFGB row "
        f'cannot be read); the rows of this run are {s["model"]} after {s["iterations"]} iterations on the '
        f'set `{s["data"]}`, mean of {s["seeds"]} seeds ± half their range; the blurred images have '
        f'{record.extra["blurred"]["psnr"]:.2f} dB. MDTA has no top-k: its scores are the dense map.'
    )


def title(record: records.Record) -> str:
    """What was measured, as a heading."""
    return f'Ablation of attention, score and gate: {record.settings["data"]}'


def page(record: records.Record) -> str:
    """The Markdown page of a run."""
    return records.markdown_page(title(record), record, [note(record), table(record)])


def plot(axis: Axes, record: records.Record, attention: str) -> None:
    """Each seed's PSNR with one attention, as points, and the variants' means, as bars."""
    for i, (gate, score) in enumerate(itertools.product(GATES, SCORES)):
        values = scores_of(record, attention, gate, score)
        colour = f'C{SCORES.index(score)}'
        if values:
            label = TITLES[score] if gate == GATES[0] else None
            axis.plot([i - 0.3, i + 0.3], [statistics.mean(values)] * 2, color=colour, lw=2, label=label)
            axis.plot([i] * len(values), values, 'o', color=colour, ms=4)
    axis.axhline(record.extra['blurred']['psnr'], color='grey', linestyle=':', label='blurred')
    everything = [row['psnr'] for row in record.rows if 'psnr' in row] + [record.extra['blurred']['psnr']]
    margin = 0.05 * (max(everything) - min(everything)) + 0.01
    axis.set_ylim(min(everything) - margin, max(everything) + margin)
    axis.set_xticks([1, 4, 7], [TITLES[gate] for gate in GATES])
    axis.set(xlabel=f'{TITLES[attention]}, this run', ylabel='PSNR, dB')
    axis.legend(frameon=False, fontsize='small', ncols=4, loc='lower left', bbox_to_anchor=(0, 1))
    axis.grid(axis='y', alpha=0.3)
    axis.spines[['top', 'right']].set_visible(False)


def draw(record: records.Record, path: Path) -> None:
    """The figure of a run."""
    figure, axes = records.canvas(10, 4, columns=len(ATTENTIONS))
    for axis, attention in zip(axes, ATTENTIONS, strict=True):
        plot(axis, record, attention)
    records.save_figure(figure, path)
