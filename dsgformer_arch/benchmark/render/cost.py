"""Tables and page of `cost`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsgformer_arch.benchmark import record as records
from dsgformer_arch.benchmark.challenge import HEIGHT, LEADERBOARD, MOST_MACS, MOST_PARAMETERS, WIDTH
from dsgformer_arch.benchmark.render import output
from dsgformer_arch.benchmark.render.page import Element, Table
from dsgformer_arch.benchmark.render.rendering import OWN, Rendering

COLUMNS = {
    'model': 'system', 'parameters': 'parameters', 'macs': 'MACs', 'convolutions': 'convolutions',
    'products': 'products', 'fourier': 'FFTs', 'limits': 'limits', 'latency': 'latency',
    'memory': 'peak memory',
}  # fmt: skip

REPORTED_COLUMNS = {
    'challenge': 'challenge', 'rank': 'rank', 'method': 'method or team', 'parameters': 'parameters',
    'macs': 'MACs', 'psnr': 'PSNR', 'ssim': 'SSIM', 'note': 'note',
}  # fmt: skip


def cells(record: records.Record) -> list[dict[str, str | None]]:
    """The rows of what was counted and measured, as text."""
    rows = []
    for row in record.rows:
        memory = row.get('peak_memory_mib')
        cell: dict[str, str | None] = {
            'model': row['model'],
            'limits': limits(row),
            'latency': (
                f'{row["latency_ms"] / 1e3:.2f} s'
                if row.get('latency_ms')
                else row.get('error') or row.get('not_run')
            ),
            'memory': f'{memory:.0f} MiB' if memory else row.get('memory_note'),
        }
        if 'multiply_adds' in row:
            cell['parameters'] = f'{row["parameters"] / 1e6:.2f} M'
            cell['macs'] = giga(row['multiply_adds'])
            cell |= {kind: giga(row[kind]) for kind in ('convolutions', 'products', 'fourier') if row[kind]}
        rows.append(cell)
    return rows


def limits(row: dict[str, Any]) -> str | None:
    """`pass`, or what exceeds its limit; None where the limits do not apply."""
    if row.get('within') is None:
        return None
    over = []
    if row['parameters'] > MOST_PARAMETERS:
        over.append('parameters')
    if row['multiply_adds'] > MOST_MACS:
        over.append('MACs')
    return f'fail: {" and ".join(over)}' if over else 'pass'


def giga(number: float) -> str:
    """MACs in G with one decimal."""
    return f'{number / 1e9:.1f} G'


def reported_cells() -> list[dict[str, str | None]]:
    """The rows of what the challenges report, as text."""
    return [
        {
            'challenge': entry.challenge,
            'rank': 'baseline' if entry.rank is None else str(entry.rank),
            'method': entry.method,
            'parameters': None if entry.parameters is None else f'{entry.parameters:g} M',
            'macs': None if entry.macs is None else f'{entry.macs:g} G',
            'psnr': f'{entry.psnr:g}',
            'ssim': f'{entry.ssim:g}',
            'note': entry.note or None,
        }
        for entry in LEADERBOARD
    ]


def note(record: records.Record) -> str:
    """What a reader of the first table has to know."""
    return (
        f'Limits: at most {MOST_PARAMETERS / 1e6:.0f} M parameters and {MOST_MACS / 1e9:.0f} GMACs at '
        f'{WIDTH}×{HEIGHT}, the rules of the efficient real-world deblurring challenges of AIM 2025 and '
        'NTIRE 2026. MACs are the sum of convolutions, matrix products (both of every attention among them) '
        'and Fourier transforms.'
    )


def reported_note() -> str:
    """What a reader of the second table has to know."""
    pairs = dict.fromkeys((entry.challenge, entry.source) for entry in LEADERBOARD)
    sources = '; '.join(f'{challenge}: {source}' for challenge, source in pairs)
    return (
        'Reported by the challenges, not measured here. NTIRE 2026 is on the public test split of RSBlur, '
        'AIM 2025 on 420 new pairs: their PSNR cannot be compared. The rules do not say which operators '
        'count as MACs; the baseline, NAFNet-C16-L28, is reported with 146.3 G and counts 143.6 G here. '
        f'Sources: {sources}.'
    )


def title(record: records.Record) -> str:
    """What was measured, as a heading."""
    height, width = record.settings['size']
    return f'Cost of one image of {width}×{height}'


def columns(record: records.Record) -> dict[str, str]:
    """The columns that have a value in some row."""
    return output.filled(COLUMNS, cells(record))


def parts(record: records.Record, table: str) -> list[str]:
    """The content of the page: this run, and what the challenges report."""
    reported = output.markdown_table(REPORTED_COLUMNS, reported_cells())
    return [note(record), table, '## Results that the challenges report', reported_note(), reported]


def elements(record: records.Record, folder: Path) -> list[Element]:
    """The content of the section, likewise."""
    counted = Table(columns(record), cells(record), note(record), own=OWN)
    return [counted, Table(REPORTED_COLUMNS, reported_cells(), reported_note())]


RENDERING = Rendering(title, columns, cells, note, parts=parts, elements=elements)
