"""Table, figure and page of `training`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes

from dsgformer_arch.benchmark import record as records
from dsgformer_arch.benchmark.measure.training import best_rate
from dsgformer_arch.benchmark.render.rendering import Rendering

COLUMNS = {
    'model': 'system', 'width': 'width', 'parameters': 'parameters', 'macs': 'MACs at 256×256',
    'lr': 'learning rate', 'psnr': 'PSNR', 'gain': 'gain', 'ssim': 'SSIM', 'iterations': 'iterations',
    'seconds': 'seconds',
}  # fmt: skip


def cells(record: records.Record) -> list[dict[str, str | None]]:
    """The table's rows as text, one a system: means over the seeds, and their spread."""
    blurred = record.extra['blurred']
    lines = []
    for name in record.settings['models']:
        runs = runs_of(record, name)
        if not runs:
            continue
        first = runs[0]
        rate = first['lr'] if 'lr' in first else record.settings['lr']  # older results name it there
        line = {
            'model': name,
            'width': ', '.join(f'{k} {width_text(v)}' for k, v in first['scaled'].items()) or 'as published',
            'parameters': f'{first["parameters"] / 1e6:.2f} M',
            'macs': f'{first["multiply_adds"] / 1e9:.2f} G',
            'lr': f'{rate:g}',
        }
        done = [row for row in runs if 'psnr' in row]
        if done:
            psnr = [row['psnr'] for row in done]
            line |= {
                'psnr': f'{statistics.mean(psnr):.2f} ({min(psnr):.2f} to {max(psnr):.2f})',
                'gain': f'{statistics.mean(psnr) - blurred["psnr"]:+.2f}',
                'ssim': f'{statistics.mean(row["ssim"] for row in done):.4f}',
                'iterations': f'{statistics.mean(row["iterations"] for row in done):.0f}',
                'seconds': f'{statistics.mean(row["seconds"] for row in done):.0f}',
            }
        else:
            line['psnr'] = first['error']
        lines.append(line)
    nothing = {'model': '(blurred)', 'psnr': f'{blurred["psnr"]:.2f}', 'ssim': f'{blurred["ssim"]:.4f}'}
    return [nothing, *lines]


def runs_of(record: records.Record, model: str) -> list[dict[str, Any]]:
    """The rows of a system; of several learning rates, those of the best in seed 0."""
    rows = [row for row in record.rows if row['model'] == model]
    rates = {row.get('lr') for row in rows}
    return [row for row in rows if row['lr'] == best_rate(record, model)] if len(rates) > 1 else rows


def width_text(value: int | Sequence[int]) -> str:
    """A number of channels, or one for each level."""
    return str(value) if isinstance(value, int) else '-'.join(map(str, value))


def budget(record: records.Record) -> str:
    """What each system was given."""
    iterations = record.settings['iterations']
    return f'{iterations} iterations' if iterations else f'{record.settings["seconds"]} seconds'


def note(record: records.Record) -> str:
    """The notes on the table."""
    seeds = record.settings['seeds']
    return (
        f'{budget(record)} for each system, {seeds} seed{"s" if seeds > 1 else ""}; '
        'in brackets, smallest to largest.'
    )


def title(record: records.Record) -> str:
    """The heading of a run."""
    return f'Training at equal cost: {record.settings["data"]}, {budget(record)}'


AXES = {'iteration': 'iterations', 'seconds': 'seconds of training'}
"""What PSNR is drawn against, by key of a curve's points."""


def plot(axis: Axes, record: records.Record, key: str) -> None:
    """PSNR against `key` of `AXES`, the mean over seeds; the band is from the lowest to the highest."""
    for name in record.settings['models']:
        curves = [row['curve'] for row in runs_of(record, name) if 'curve' in row]
        points = list(zip(*curves, strict=False))
        if not points:
            continue
        x = [statistics.mean(point[key] for point in seeds) for seeds in points]
        psnr = [[point['psnr'] for point in seeds] for seeds in points]
        (line,) = axis.plot(x, [statistics.mean(v) for v in psnr], marker='o', markersize=3, label=name)
        axis.fill_between(
            x, [min(v) for v in psnr], [max(v) for v in psnr], color=line.get_color(), alpha=0.15
        )
    axis.axhline(record.extra['blurred']['psnr'], color='grey', linestyle=':', label='blurred')
    axis.set(xlabel=AXES[key], ylabel='PSNR on held-out images, dB')
    axis.legend(frameon=False, fontsize='small', ncols=3, loc='lower left', bbox_to_anchor=(0, 1))
    axis.grid(alpha=0.3)
    axis.spines[['top', 'right']].set_visible(False)


RENDERING = Rendering(
    title,
    lambda record: COLUMNS,
    cells,
    note,
    plots=lambda record: [partial(plot, record=record, key=key) for key in AXES],
    caption='PSNR on held-out images; the band is from the lowest to the highest seed.',
    size=lambda record: (11, 4.5),
)
