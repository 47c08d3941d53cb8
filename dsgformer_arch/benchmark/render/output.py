"""Parts of all pages: figures, Markdown tables, and how the numbers were made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from dsgformer_arch.benchmark.record import Record, put


def canvas(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure that needs no display, and its axes side by side with a common y.

    Args:
        width: in inches, likewise `height`.
        height: of the whole figure.
        columns: number of axes.
    """
    figure = Figure(figsize=(width, height), layout='constrained')
    return figure, [*figure.subplots(1, columns, sharey=True, squeeze=False)[0]]


def logarithmic(axis: Axis) -> None:
    """Ticks of a logarithmic axis, already drawn on, as plain numbers: 1, 2, 5, 10, 20, …"""
    low, high = axis.get_view_interval()
    ratio = high / low
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if ratio < 60 else (1, 3) if ratio < 600 else (1,)))
    axis.set_major_formatter('{x:g}')
    axis.set_minor_formatter(NullFormatter())


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    put(lambda temporary: figure.savefig(temporary, dpi=130, format='png'), path)


def markdown_table(columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]]) -> str:
    """A Markdown table.

    Args:
        columns: heading by key of the rows; the first column is left-aligned, the others right.
        rows: their values are text already, or None for an empty cell.
    """
    heads = list(columns.values())
    lines = ['| ' + ' | '.join(heads) + ' |', '|---|' + '---:|' * (len(heads) - 1)]
    for row in rows:
        cells = ['' if row.get(key) is None else str(row[key]) for key in columns]
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def filled(columns: Mapping[str, str], cells: Sequence[Mapping[str, str | None]]) -> dict[str, str]:
    """The columns that have a value in some row."""
    return {key: head for key, head in columns.items() if any(cell.get(key) for cell in cells)}


def made(record: Record) -> dict[str, str]:
    """How a record's numbers were made: protocol, machine, versions and date, as sentences."""
    e = record.environment
    machine = f'{e["processor"]}, {e["cores"]} cores ({e["threads"]} threads), {e["memory_gib"]} GiB'
    if e['gpus']:
        machine += f'; {", ".join(e["gpus"])}'
    if e['instructions']:
        machine += f'; {", ".join(e["instructions"])}'
    packages = ', '.join(f'{name} {version}' for name, version in e['packages'].items() if version)
    return {
        'Protocol': record.protocol,
        'Machine': machine,
        'Versions': f'Python {e["python"]}, {packages}; commit {e["commit"] or "unknown"}',
        'Date': e['date'],
    }


def markdown_page(title: str, record: Record, parts: Sequence[str]) -> str:
    """A page: title, parts, then how the numbers were made."""
    how = [f'{name}: {text.rstrip(".")}.' for name, text in made(record).items()]
    own = ['## How these numbers were made', f'    {record.command}', *how]
    return '\n\n'.join([f'# {title}', *parts, *own]) + '\n'
