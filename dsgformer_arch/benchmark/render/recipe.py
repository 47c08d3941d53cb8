"""Table, figure and page of `recipe`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import partial

from matplotlib.axes import Axes
from scipy.stats import t as student

from dsgformer_arch.benchmark import record as records
from dsgformer_arch.benchmark.measure.recipe import BASE, VARIANTS
from dsgformer_arch.benchmark.render.rendering import Rendering

CONFIDENCE = 0.95


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


def note(record: records.Record) -> str:
    """The notes on the table."""
    s = record.settings
    return (
        f'PSNR in dB of {s["model"]} after {s["iterations"]} iterations, fewer where a variant costs more. '
        "The base has the preset's settings. The difference is paired by seed: the mean, ± half the "
        f'{CONFIDENCE:.0%} interval of Student over the seeds. It covers the randomness of training, not of '
        'the choice of test images.'
    )


def title(record: records.Record) -> str:
    """The heading of a run."""
    return f'Training recipe, one change at a time: {record.settings["data"]}'


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


RENDERING = Rendering(
    title,
    lambda record: COLUMNS,
    cells,
    note,
    plots=lambda record: [partial(plot, record=record)],
    caption='Difference from the base, by seed, with its mean.',
)
