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

from dsgformer_arch import zoo
from dsgformer_arch.benchmark import learning
from dsgformer_arch.benchmark import record as records
from dsgformer_arch.benchmark.training import attempt
from dsgformer_arch.progress import Stages

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
    recipe = learning.Recipe(iterations, None, batch, patch, lr, validations)
    pairs = learning.read(data, patch)
    settings = {
        'model': model, 'data': Path(data).name, 'seeds': seeds, 'device': device,
        'threads': torch.get_num_threads(), **recipe.__dict__,
    }  # fmt: skip
    path = out.with_suffix('.json')
    record = records.start('ablation', settings, recipe.describe(), path, resume)
    record.extra['blurred'] = learning.blurred_scores(pairs)
    variants = [
        {'attention': attention, 'gate': gate, 'score': score}
        for attention, gate, score in itertools.product(ATTENTIONS, GATES, SCORES)
    ]
    todo = [(s, variant) for s in range(seeds) for variant in variants if not record.find(seed=s, **variant)]
    stages = Stages('ablation', len(todo))
    for seed, variant in todo:
        build = partial(zoo.create, model, **variant)
        row: dict[str, Any] = {'seed': seed, **variant}
        row |= attempt(build, pairs, recipe, seed, torch.device(device), stages)
        record.rows.append(row)
        record.save(path)
    out.with_suffix('.md').write_text(page(record), encoding='utf-8')
    draw(record, out.with_suffix('.png'))
    print(table(record))
    print(f'wrote {path}, {out.with_suffix(".md")} and {out.with_suffix(".png")}', file=sys.stderr)
    return int(any(row.get('error') for row in record.rows))


def scores_of(record: records.Record, attention: str, gate: str, score: str) -> list[float]:
    """PSNR of one variant by seed."""
    return [
        row['psnr']
        for row in record.rows
        if (row['attention'], row['gate'], row['score']) == (attention, gate, score) and 'psnr' in row
    ]


def table(record: records.Record) -> str:
    """The paper's layout: gates in rows, scores in columns; whose numbers they are stands in each row."""
    columns = {'whose': 'numbers of', 'attention': 'attention', 'gate': 'gate'}
    columns |= {score: TITLES[score] for score in SCORES}
    rows = [
        {
            'whose': '**the paper** (RealBlur-J)', 'attention': TITLES['dtsas'], 'gate': TITLES[gate],
            **{s: f'{PAPER[gate, s]:.2f}' if (gate, s) in PAPER else None for s in SCORES},
        }
        for gate in GATES
    ]  # fmt: skip
    for attention in ATTENTIONS:
        for gate in GATES:
            row = {'whose': 'this run', 'attention': TITLES[attention], 'gate': TITLES[gate]}
            for score in SCORES:
                values = scores_of(record, attention, gate, score)
                if values:
                    half = (max(values) - min(values)) / 2
                    row[score] = f'{statistics.mean(values):.2f} ± {half:.2f}'
            rows.append(row)
    return records.markdown_table(columns, rows)


def page(record: records.Record) -> str:
    """The Markdown page of a run."""
    s = record.settings
    note = (
        f"PSNR in dB. The paper's rows are its table 2 on RealBlur-J after full training (its DFGB row cannot be "
        f'read); the rows of this run are {s["model"]} after {s["iterations"]} iterations on the set '
        f'`{s["data"]}`, mean of {s["seeds"]} seeds ± half their range; the blurred images have '
        f'{record.extra["blurred"]["psnr"]:.2f} dB. MDTA has no top-k: its scores are the dense map.'
    )
    return records.markdown_page('Ablation: attention, score and gate', record, [note, table(record)])


def draw(record: records.Record, path: Path) -> None:
    """A point for each seed, a bar for each variant's mean."""
    import matplotlib as mpl

    mpl.use('Agg')
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, attention in zip(axes, ATTENTIONS, strict=True):
        for i, (gate, score) in enumerate(itertools.product(GATES, SCORES)):
            values = scores_of(record, attention, gate, score)
            if values:
                axis.plot(
                    [i - 0.3, i + 0.3], [statistics.mean(values)] * 2, color=f'C{SCORES.index(score)}', lw=2
                )
                axis.plot([i] * len(values), values, 'o', color=f'C{SCORES.index(score)}', ms=4)
        axis.axhline(record.extra['blurred']['psnr'], color='grey', linestyle=':')
        axis.set_xticks([1, 4, 7], [TITLES[gate] for gate in GATES])
        axis.set_title(TITLES[attention])
        axis.grid(axis='y', alpha=0.3)
        axis.spines[['top', 'right']].set_visible(False)
    handles = [plt.Line2D([], [], color=f'C{i}', lw=2, label=TITLES[s]) for i, s in enumerate(SCORES)]
    axes[0].legend(handles=handles, frameon=False)
    axes[0].set_ylabel('PSNR on held-out images, dB')
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
