"""Table, figure and page of `loader`."""

from __future__ import annotations

from dsgformer_arch.benchmark import record as records
from dsgformer_arch.benchmark.render.rendering import Rendering

COLUMNS = {'dataset': 'data set class', 'rate': 'pairs a second', 'ratio': 'ratio'}


def cells(record: records.Record) -> list[dict[str, str | None]]:
    """The table's rows as text: each loader, and how many times BasicSR's own it delivers."""
    base = record.rows[0]['pairs_per_second']
    return [
        {
            'dataset': row['dataset'],
            'rate': f'{row["pairs_per_second"]:.1f} ({row["lowest"]:.1f} to {row["highest"]:.1f})',
            'ratio': f'{row["pairs_per_second"] / base:.2f}',
        }
        for row in record.rows
    ]


def note(record: records.Record) -> str:
    """The notes on the table."""
    s = record.settings
    return (
        f'Crops of {s["patch"]}×{s["patch"]} from `{s["data"]}`, batch {s["batch"]}, workers: {s["workers"]}.'
    )


def title(record: records.Record) -> str:
    """The heading of a run."""
    return f'Data loaders: {record.settings["data"]}'


RENDERING = Rendering(title, lambda record: COLUMNS, cells, note)
