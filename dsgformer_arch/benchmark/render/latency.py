"""Table and page of `latency`."""

from __future__ import annotations

from typing import Any

from dsgformer_arch.benchmark import record as records
from dsgformer_arch.benchmark.measure.latency import BACKENDS
from dsgformer_arch.benchmark.render.rendering import Rendering

NOWHERE = 'No other runtime is faster than PyTorch.'


def columns(record: records.Record) -> dict[str, str]:
    """System, size, and one column for each backend."""
    backends = {
        name: f'{BACKENDS[name].title}, {BACKENDS[name].precision}' for name in record.settings['backends']
    }
    return {'model': 'system', 'size': 'size', **backends}


def cells(record: records.Record) -> list[dict[str, str | None]]:
    """One row for each system and size; times in ms, the spread after them, the fastest in bold."""
    pairs = dict.fromkeys((row['model'], row['size']) for row in record.rows)
    found = []
    for model, size in pairs:
        rows = [row for row in record.rows if (row['model'], row['size']) == (model, size)]
        least = min((row['latency_ms'] for row in rows if row.get('latency_ms')), default=None)
        texts = {row['backend']: text(row, row.get('latency_ms') == least) for row in rows}
        found.append({'model': model, 'size': size.replace('x', '×'), **texts})
    return found


def text(row: dict[str, Any], fastest: bool) -> str:
    """A measurement in a few characters."""
    if not row.get('latency_ms'):
        return str(row.get('error', ''))
    time = f'{row["latency_ms"]:.0f} ms' if row['latency_ms'] >= 100 else f'{row["latency_ms"]:.1f} ms'
    return f'{"**" * fastest}{time}{"**" * fastest} (±{50 * row["spread"]:.0f} %)'


def ahead(record: records.Record) -> list[str]:
    """Where another runtime is faster than the faster memory format of PyTorch in the same precision."""
    sentences = []
    for model, size in dict.fromkeys((row['model'], row['size']) for row in record.rows):
        for precision in ('fp32', 'bf16'):
            rows = {
                row['backend']: row['latency_ms']
                for row in record.rows
                if (row['model'], row['size'], row['precision']) == (model, size, precision)
                and row.get('latency_ms')
            }
            ours = min((time for name, time in rows.items() if name.startswith('pytorch')), default=None)
            for name, time in rows.items():
                if ours is not None and not name.startswith('pytorch') and time < ours:
                    sentences.append(
                        f'{model}, {size.replace("x", "×")}, {precision}: {BACKENDS[name].title} takes '
                        f'{time / ours:.2f} of the time of PyTorch.'
                    )
    return sentences


def title(record: records.Record) -> str:
    """What was measured, as a heading."""
    return f'Latency of exported files: CPU, {record.settings["threads"]} threads'


def note(record: records.Record) -> str:
    """Where another runtime is faster, in sentences."""
    return ' '.join(ahead(record)) or NOWHERE


def parts(record: records.Record, table: str) -> list[str]:
    """The content of the page."""
    found = '\n'.join(f'- {sentence}' for sentence in ahead(record))
    return [table, f'Where other runtimes are faster:\n\n{found}' if found else NOWHERE]


RENDERING = Rendering(title, columns, cells, note, parts=parts)
