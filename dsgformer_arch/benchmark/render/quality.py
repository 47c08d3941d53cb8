"""Table, figure and page of `quality`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from dsgformer_arch.benchmark import record as records
from dsgformer_arch.benchmark.measure.quality import BLURRED, MEAN, SHARP
from dsgformer_arch.benchmark.render import output
from dsgformer_arch.benchmark.render.page import Comparison, Drawing, Element, Table, Text
from dsgformer_arch.benchmark.render.rendering import OWN, Rendering
from dsgformer_arch.metrics.protocols import protocol as protocol_of
from dsgformer_arch.utils.errors import UserError

TITLES = {
    'psnr': 'PSNR', 'ssim': 'SSIM', 'ssim_skimage': 'SSIM (skimage)', 'ssim_basicsr': 'SSIM (BasicSR)',
    'psnr_unaligned': 'PSNR unaligned', 'ssim_unaligned': 'SSIM unaligned', 'ecc_converged': 'aligned',
}  # fmt: skip


def columns_of(record: records.Record) -> dict[str, str]:
    """Headings of the table, by key of `cells`' rows."""
    lower = record.extra.get('lower_better', [])
    scored = [*protocol_of(record.settings['protocol']).columns, *record.settings['metrics']]
    heads = {key: TITLES.get(key, key) + (' ↓' if key in lower else '') for key in scored}
    sets = {'set': 'set'} if record.extra.get('means') else {}
    return {'model': 'system', **sets, 'images': 'images', **heads, 'gain': 'gain', 'note': 'note'}


def cells(record: records.Record) -> list[dict[str, str | None]]:
    """The table's rows as text; of several sets, each system's mean over them comes after its rows."""
    scored = columns_of(record).keys() - {'model', 'set', 'images', 'note'}
    rows = []
    for row in with_means(record):
        cell: dict[str, str | None] = {'model': row['model'], 'images': str(row['images'])}
        if 'set' in row:
            cell['set'] = f'**{row["set"]}**' if row['set'] == MEAN else row['set']
        cell |= {key: formatted(key, row[key]) for key in scored if row.get(key) is not None}
        rows.append({**cell, 'note': '; '.join(notes(row)) or None})
    return rows


def with_means(record: records.Record) -> list[dict[str, Any]]:
    """A record's rows, and after those of a system its mean over several sets."""
    means = {row['model']: row for row in record.extra.get('means', [])}
    rows = []
    for i, row in enumerate(record.rows):
        rows.append(row)
        last = i + 1 == len(record.rows) or record.rows[i + 1]['model'] != row['model']
        if last and row['model'] in means:
            rows.append(means[row['model']])
    return rows


def formatted(column: str, value: float) -> str:
    """A score as the field's tables print it."""
    if column == 'ecc_converged':
        return f'{100 * value:.0f} %'
    if column == 'gain':
        return f'{value:+.2f}'
    return f'{value:.2f}' if column.startswith('psnr') else f'{value:.4f}'


def notes(row: dict[str, Any]) -> list[str]:
    """What a reader has to know about a system's means."""
    found = []
    if row['failed']:
        found.append(f'{row["failed"]} failed: {row["error"]}')
    if row['identical']:
        found.append(f'{row["identical"]} equal to the sharp image (infinite PSNR, left out)')
    if row['in_tiles']:
        found.append(f'{row["in_tiles"]} in tiles')
    if row.get('tlc'):
        found.append(f'local pooling, {row["tlc"]}')
    return found


def title(record: records.Record) -> str:
    """What was measured, as a heading."""
    s = record.settings
    count = f'{s["images"]} image{"" if s["images"] == 1 else "s"}'
    return f'Quality on {s["data"]} ({count}), protocol {s["protocol"]}'


def weights_text(record: records.Record) -> str:
    """Which files the weights came from."""
    return (
        'Weights: ' + ', '.join(f'{name} from `{f}`' for name, f in record.settings['weights'].items()) + '.'
    )


def plot(axis: Axes, record: records.Record) -> None:
    """Mean gain over the blurred images; the line reaches from the 10th to the 90th percentile of images."""
    rows = [row for row in record.rows if row.get('gain') is not None]
    rows.sort(key=lambda row: row['gain'])
    for i, row in enumerate(rows):
        axis.plot([row['gain_p10'], row['gain_p90']], [i, i], color='C0', alpha=0.5, lw=2)
        axis.plot([row['gain']], [i], 'o', color='C0')
    axis.axvline(0, color='grey', linestyle=':')
    axis.set_yticks(
        range(len(rows)), [', '.join(part for part in (row['model'], row.get('set')) if part) for row in rows]
    )
    axis.set_ylim(-0.6, max(len(rows), 1) - 0.4)
    axis.set_xlabel('PSNR over the blurred image, dB')
    axis.margins(x=0.1)
    axis.grid(axis='x', alpha=0.3)
    axis.spines[['top', 'right']].set_visible(False)


def elements(record: records.Record, folder: Path) -> list[Element]:
    """The content of the section: table, gains, and details of restored images."""
    rows = cells(record)
    data = record.settings['data']
    caption = f'Means over the images of {data}; PSNR in dB. {weights_text(record)}'
    found: list[Element] = [Table(output.filled(columns_of(record), rows), rows, caption, own=OWN)]
    restored = sum(row.get('gain') is not None for row in record.rows)
    if restored and record.settings['images'] > 1:
        spread = (
            'PSNR gained over the blurred image: mean, and from the 10th to the 90th percentile of images.'
        )
        found.append(Drawing([partial(plot, record=record)], spread, height=1 + 0.3 * restored))
    return found + comparisons(record, folder)


def comparisons(record: records.Record, folder: Path) -> list[Element]:
    """Details of restored images with a slider, where the run kept its images."""
    first = record.settings['models'][0]
    found: list[Element] = []
    for example in record.extra.get('examples', []):
        psnr = example['psnr']
        labels = {v: v if psnr.get(v) is None else f'{v} {psnr[v]:.2f} dB' for v in example['files']}
        files = {version: kept(folder, file) for version, file in example['files'].items()}
        caption = f'`{example["image"]}`, {example["why"]}'
        right = first if first in files else SHARP
        found.append(Comparison(caption, files, labels, BLURRED, right))
    if found:
        text = (
            f'Before and after: details of the images on which {first} gains least, most, and a middling '
            'amount. The numbers chose them; PSNR is of the whole image. Drag the line, or use the arrow '
            'keys. Stored as WebP at quality 92.'
        )
        found.insert(0, Text(text))
    return found


def kept(folder: Path, file: str) -> Path:
    """An image that a run has kept.

    Raises:
        UserError: it lies outside of the folder of the result, from where nothing may come into a page.
    """
    path = (folder / file).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise UserError(f'the image {file} lies outside of {folder}')
    return path


RENDERING = Rendering(
    title,
    columns_of,
    cells,
    plots=lambda record: [partial(plot, record=record)],
    size=lambda record: (7, 1.4 + 0.35 * len(record.rows)),
    parts=lambda record, table: [table, weights_text(record)],
    elements=elements,
)
