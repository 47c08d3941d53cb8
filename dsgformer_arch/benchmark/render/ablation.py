"""Table, figure and page of `ablation`."""

from __future__ import annotations

import itertools
import statistics
from functools import partial

from matplotlib.axes import Axes

from dsgformer_arch.benchmark import record as records
from dsgformer_arch.benchmark.measure.ablation import ATTENTIONS, GATES, SCORES
from dsgformer_arch.benchmark.render.rendering import Rendering

PAPER = {
    ('simplegate', 'relu'): 30.29, ('simplegate', 'relu2'): 31.61, ('simplegate', 'softmax'): 30.76,
    ('gelu', 'relu'): 30.09, ('gelu', 'relu2'): 31.56, ('gelu', 'softmax'): 30.89,
}  # fmt: skip
"""PSNR on RealBlur-J in the paper's table 2, as far as it can be read (its DFGB rows cannot)."""

TITLES = {
    'simplegate': 'SimpleGate', 'gelu': 'GELU', 'dfgb': 'DFGB', 'relu': 'ReLU', 'relu2': 'ReLU²',
    'softmax': 'softmax', 'dtsas': 'DTSAS', 'mdta': 'MDTA',
}  # fmt: skip


def scores_of(record: records.Record, attention: str, gate: str, score: str) -> list[float]:
    """PSNR of one variant by seed."""
    return [
        row['psnr']
        for row in record.rows
        if (row['attention'], row['gate'], row['score']) == (attention, gate, score) and 'psnr' in row
    ]


COLUMNS = {
    'origin': 'numbers of', 'attention': 'attention', 'gate': 'gate',
    **{score: TITLES[score] for score in SCORES},
}  # fmt: skip


def cells(record: records.Record) -> list[dict[str, str | None]]:
    """The table's rows as text: gates in rows, scores in columns, and the origin of each row."""
    rows: list[dict[str, str | None]] = [
        {
            'origin': '**the paper** (RealBlur-J)', 'attention': TITLES['dtsas'], 'gate': TITLES[gate],
            **{s: f'{PAPER[gate, s]:.2f}' if (gate, s) in PAPER else None for s in SCORES},
        }
        for gate in GATES
    ]  # fmt: skip
    for attention in ATTENTIONS:
        for gate in GATES:
            row: dict[str, str | None] = {
                'origin': 'this run',
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


def note(record: records.Record) -> str:
    """The notes on the table."""
    s = record.settings
    protocol = s.get('protocol', 'gopro')  # records made before it could be chosen
    return (
        f"PSNR in dB. The paper's rows are its table 2 on RealBlur-J after full training (its DFGB row "
        f'cannot be read); the rows of this run are {s["model"]} after {s["iterations"]} iterations on the '
        f'set `{s["data"]}` under the protocol `{protocol}`, mean of {s["seeds"]} seeds ± half their range; '
        f'the blurred images have {record.extra["blurred"]["psnr"]:.2f} dB. '
        'MDTA has no top-k: its scores are the dense map.'
    )


def title(record: records.Record) -> str:
    """The heading of a run."""
    return f'Ablation of attention, score and gate: {record.settings["data"]}'


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


RENDERING = Rendering(
    title,
    lambda record: COLUMNS,
    cells,
    note,
    plots=lambda record: [partial(plot, record=record, attention=attention) for attention in ATTENTIONS],
    caption="Points are seeds, bars their means; this run's numbers, none of the paper's.",
    size=lambda record: (10, 4),
)
