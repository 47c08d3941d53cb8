"""Table, figure and page of `speed`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from dsgformer_arch.benchmark import record as records
from dsgformer_arch.benchmark.measure.speed import pixels
from dsgformer_arch.benchmark.render import output
from dsgformer_arch.benchmark.render.page import Beside, Drawing, Element, Table
from dsgformer_arch.benchmark.render.rendering import OWN, Rendering

ROOFLINE = """\
The roofline is the larger of two times: two operations for each MAC at that rate, \
and, for DSGformer, two reads of X and one write of Y for each block at the rate of the copy."""


def ratios(rows: Sequence[dict[str, Any]], first: str) -> list[float | None]:
    """For each row: how many times as long as the first system it takes, at the same size.

    The yardstick is the first system's fastest row of that size, which in a run without `--best` is
    its only one.
    """
    fastest: dict[str, float] = {}
    for row in rows:
        if row['model'] == first and row.get('latency_ms'):
            fastest[row['size']] = min(fastest.get(row['size'], math.inf), row['latency_ms'])
    return [
        row['latency_ms'] / fastest[row['size']] if row.get('latency_ms') and row['size'] in fastest else None
        for row in rows
    ]


COLUMNS = {
    'model': 'system', 'size': 'size', 'mode': 'precision', 'parameters': 'parameters',
    'macs': 'MACs', 'latency': 'latency', 'spread': 'spread', 'ratio': 'ratio', 'rate': 'MP/s',
    'memory': 'peak memory', 'first': 'first call', 'floor': 'roofline', 'over': 'times the roofline',
}  # fmt: skip


def cells(record: records.Record) -> list[dict[str, str | None]]:
    """The table's rows as text."""
    rows = []
    for row, ratio in zip(record.rows, ratios(record.rows, record.settings['models'][0]), strict=True):
        memory = row.get('peak_memory_mib')
        rows.append({
            'model': row['model'],
            'size': row['size'].replace('x', '×'),
            'mode': mode(row),
            'parameters': f'{row["parameters"] / 1e6:.2f} M',
            'macs': f'{row["multiply_adds"] / 1e9:.1f} G',
            'latency': f'{row["latency_ms"]:.1f} ms' if row.get('latency_ms') else row.get('error'),
            'spread': f'{100 * row["spread"]:.0f} %' if 'spread' in row else None,
            'ratio': f'{ratio:.2f}' if ratio else None,
            'rate': digits(row["megapixels_per_second"]) if 'megapixels_per_second' in row else None,
            'memory': f'{memory:.0f} MiB' if memory else row.get('memory_note'),
            'first': f'{row["first_call_ms"]:.0f} ms' if 'first_call_ms' in row else None,
            'floor': f'{short(row["floor_ms"])} ms' if 'floor_ms' in row else None,
            'over': over_the_roofline(row),
        })  # fmt: skip
    return rows


def over_the_roofline(row: dict[str, Any]) -> str | None:
    if not row.get('latency_ms') or 'floor_ms' not in row:
        return None
    return f'{row["latency_ms"] / row["floor_ms"]:.1f}'


GROWTH_COLUMNS = {'model': 'system', 'latency_ms': 'time ~ pixels^', 'peak_memory_mib': 'memory ~ pixels^'}


def growth_cells(record: records.Record) -> list[dict[str, str | None]]:
    """Rows of the table of exponents; none without `--scaling`."""
    fits = record.extra.get('growth', {})
    return [
        {'model': name, **{key: f'{value:.2f}' for key, value in fit.items()}} for name, fit in fits.items()
    ]


def title(record: records.Record) -> str:
    """What was measured, as a heading."""
    s = record.settings
    what = 'Speed of a training step' if s['train'] else 'Speed of restoring'
    return f'{what}: {conditions(record)}'


def conditions(record: records.Record) -> str:
    """What tells a run's results from those of another, in a few words."""
    s = record.settings
    size = 'by image size' if 'growth' in record.extra else ', '.join(f'{h}×{w}' for h, w in s['sizes'])
    modes = ', best mode' * s['best'] + ', memory kept' * s.get('keep_memory', False)
    modes += ', CUDA graphs' * s.get('cuda_graphs', False)
    modes += {'plain': ', reference implementations', 'eager': ', no compiled kernels'}.get(
        s.get('implementation', 'fast'), ''
    )
    return f'{s["device"]}, {s["precision"]}{modes}, {size}'


def ceilings(record: records.Record) -> str:
    """What the device can do at best, in sentences."""
    rates = [
        f'{kind}: {rate["operations"] / 1e12:.3g} TFLOP/s in a large product or convolution, '
        f'{rate["bytes"] / 1e9:.3g} GB/s read and written in a copy.'
        for kind, rate in record.extra['rates'].items()
    ]
    return ' '.join([*rates, ROOFLINE])


def plot(axis: Axes, record: records.Record) -> None:
    """Latency of each row, or with `--scaling` curves over pixels."""
    rows = [row for row in record.rows if row.get('latency_ms')]
    if 'growth' in record.extra:
        for name in record.settings['models']:
            mine = [row for row in rows if row['model'] == name]
            axis.plot(
                [pixels(row) / 1e6 for row in mine], [row['latency_ms'] for row in mine], 'o-', label=name
            )
        axis.set(xscale='log', yscale='log', xlabel='megapixels', ylabel='latency, ms')
        output.logarithmic(axis.xaxis)
        output.logarithmic(axis.yaxis)
        axis.legend(frameon=False, fontsize='small')
        axis.grid(alpha=0.3)
    else:
        rows.sort(key=lambda row: -row['latency_ms'])
        # Points, not bars: on a logarithmic axis the length of a bar means nothing.
        latencies = [row['latency_ms'] for row in rows]
        axis.plot(latencies, range(len(rows)), 'o', color='#4878a8')
        axis.set_yticks(range(len(rows)), labels(rows))
        for i, latency in enumerate(latencies):
            axis.annotate(short(latency), (latency, i), (7, 0), textcoords='offset points', va='center')
        modes = {mode(row) for row in rows}
        axis.set(xscale='log', xlabel='latency, ms' + f' ({min(modes)})' * (len(modes) == 1))
        axis.margins(x=0.25)
        output.logarithmic(axis.xaxis)
        axis.grid(axis='x', alpha=0.3)
    axis.spines[['top', 'right']].set_visible(False)


def labels(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A name for each row: the system, and whatever else tells the rows apart."""
    parts: list[list[str]] = [[row['model']] for row in rows]
    if len({row['size'] for row in rows}) > 1:
        parts = [[*part, row['size']] for part, row in zip(parts, rows, strict=True)]
    if len({mode(row) for row in rows}) > 1:
        parts = [[*part, mode(row)] for part, row in zip(parts, rows, strict=True)]
    return [' '.join(part) for part in parts]


def mode(row: dict[str, Any]) -> str:
    """Precision, memory format, compilation and recording of a row."""
    orders = ', channels-last' * row['channels_last'] + ', compiled' * row['compile']
    return row['precision'] + orders + ', CUDA graph' * row.get('cuda_graph', False)


def short(number: float) -> str:
    """Three significant digits; more where the integer part has more."""
    return f'{number:.3g}' if number < 100 else f'{number:.0f}'


def digits(number: float) -> str:
    """A positive number with three significant digits and no exponent."""
    return f'{number:.{max(0, 2 - math.floor(math.log10(number)))}f}'


def columns(record: records.Record) -> dict[str, str]:
    """The columns that have a value in some row."""
    return output.filled(COLUMNS, cells(record))


def parts(record: records.Record, table: str) -> list[str]:
    """The content of the page."""
    found = [table]
    if record.extra.get('growth'):
        fits = output.markdown_table(GROWTH_COLUMNS, growth_cells(record))
        found += ['## Growth with the number of pixels', fits]
    if record.extra.get('rates'):
        found += ['## Roofline', ceilings(record)]
    return found


def elements(record: records.Record, folder: Path) -> list[Element]:
    """The content of the section; columns with one value in all rows are in its title."""
    rows = cells(record)
    alike = {key for key in ('size', 'mode') if len({row[key] for row in rows}) == 1}
    heads = {key: head for key, head in columns(record).items() if key not in alike}
    caption = (
        f'Ratio: how many times as long as {record.settings["models"][0]} at the same size. Spread: (largest '
        '- smallest) / median.'
    )
    if record.extra.get('rates'):
        caption = f'{caption} {ceilings(record)}'
    found: list[Element] = [Table(heads, rows, caption, own=OWN)]
    timed = sum(bool(row.get('latency_ms')) for row in record.rows)
    if timed:
        height = 3.4 if 'growth' in record.extra else 0.8 + 0.22 * timed
        drawing = Drawing([partial(plot, record=record)], 'Latency, shorter is better.', height)
        found.append(drawing)
        if growth_cells(record):
            grown = 'Exponents of growth with the number of pixels; 1 is linear.'
            found[-1] = Beside(drawing, Table(GROWTH_COLUMNS, growth_cells(record), grown))
    return found


RENDERING = Rendering(
    title,
    columns,
    cells,
    plots=lambda record: [partial(plot, record=record)],
    size=lambda record: (8, 5 if 'growth' in record.extra else 1.2 + 0.32 * len(record.rows)),
    parts=parts,
    elements=elements,
)
