"""All results in one page: what papers report, what was measured here, and how each number was made."""

from __future__ import annotations

import datetime
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from dsgformer_arch import zoo
from dsgformer_arch.benchmark import record as records
from dsgformer_arch.benchmark.measure.quality import BLURRED
from dsgformer_arch.benchmark.render import output, quality, speed
from dsgformer_arch.benchmark.render.kinds import RENDERINGS
from dsgformer_arch.benchmark.render.page import (
    Beside,
    Drawing,
    Element,
    Listing,
    Page,
    Section,
    Table,
    Text,
)
from dsgformer_arch.benchmark.render.rendering import OWN, facts
from dsgformer_arch.benchmark.render.system_table import macs_text
from dsgformer_arch.utils.errors import UserError

GOPRO = 'GoPro'
"""The test set of the paper's table 1, as `Reported.dataset` has it."""

GOPRO_PAIRS = 1111
"""Number of its pairs.  Results on fewer are listed in a separate table, not in table 1."""

GOPRO_PROTOCOL = 'gopro'

TABLE_SIDE = 256
"""Side of the image for which table 1 gives MACs and the plot latency."""

TABLE_SIZE = f'{TABLE_SIDE}x{TABLE_SIDE}'

LEAD = (
    'What papers report and what was measured here, side by side. **Reported** numbers are copied from the '
    'source named beside them and were not checked here; **measured** ones were made by the commands '
    'below the tables. A cell is empty where nothing was measured.'
)


@dataclass(frozen=True)
class Result:
    """A record and its file."""

    path: Path
    record: records.Record


@dataclass(frozen=True)
class Point:
    """A system in the plot of quality against latency.

    Attributes:
        name: of the system.
        latency_ms: measured.
        psnr: on GoPro, in dB.
        measured: whether `psnr` was measured here or is the paper's.
    """

    name: str
    latency_ms: float
    psnr: float
    measured: bool


def run(inputs: Sequence[str], out: Path = Path('results/benchmark/report')) -> int:
    """Write `out`.html and `out`.md.

    Args:
        inputs: result files, or folders of them.
        out: the report without its ending.

    Returns:
        0.

    Raises:
        UserError: an input is missing or no result, or there is none at all.
    """
    own = [(result, part) for result in gather(inputs) if (part := own_section(result)) is not None]
    results = [result for result, _ in own]
    if not results:
        raise UserError(f'there are no results in {", ".join(inputs)}; make some, such as with speed')
    page = Page('DSGformer: benchmarks', lead(results), sections(own))
    for end, text in (('.html', page.html()), ('.md', page.markdown())):
        records.write_text(records.beside(out, end), text)
    print(f'wrote {records.beside(out, ".html")} and {records.beside(out, ".md")}', file=sys.stderr)
    return 0


def gather(inputs: Sequence[str]) -> list[Result]:
    """Read the results; folders are searched, and other files in them are ignored.

    Raises:
        UserError: an input is missing or no result, or there is none at all.
    """
    found: dict[Path, Result] = {}
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            for file in sorted(path.rglob('*.json')):
                result = _in_folder(file)
                if result is not None:
                    found[file.resolve()] = result
        else:
            found[path.resolve()] = Result(path, records.Record.load(path))
    results = [result for result in found.values() if result.record.rows]
    for result in found.values():
        if not result.record.rows:
            print(f'{result.path} has no rows yet; finish it with --resume', file=sys.stderr)
    return results


def _in_folder(file: Path) -> Result | None:
    try:
        return Result(file, records.Record.load(file))
    except UserError:
        return None


def own_section(result: Result) -> Section | None:
    """The section of one result; None, and a line on standard error, if its contents are not of its kind."""
    try:
        lead([result])
        if result.record.kind not in RENDERINGS:
            raise UserError(f'its kind is {result.record.kind!r}; there are {", ".join(RENDERINGS)}')
        part = RENDERINGS[result.record.kind].section(result.record, result.path.parent)
        part.html('')  # drawings keep what they have drawn
        return part
    except UserError as error:
        reason = str(error)
    except Exception as error:  # a file may hold anything, and must not stop the others
        reason = f'{type(error).__name__}: {error}'
    print(f'{result.path} is left out, as it is not a result of this version ({reason})', file=sys.stderr)
    return None


def of_kind(results: Sequence[Result], kind: str) -> list[Result]:
    """The results of one subcommand."""
    return [result for result in results if result.record.kind == kind]


def lead(results: Sequence[Result]) -> list[Text]:
    """The introduction."""
    dates = sorted(result.record.environment['date'] for result in results)
    span = dates[0] if dates[0] == dates[-1] else f'{dates[0]} to {dates[-1]}'
    today = datetime.datetime.now(datetime.timezone.utc).strftime('%Y-%m-%d')
    count = f'{len(results)} result{"s" if len(results) > 1 else ""}'
    made = f'{count}, measured {span}. Page made {today} by `{records.command_line()}`.'
    return [Text(LEAD), Text(made)]


def sections(own: Sequence[tuple[Result, Section]]) -> list[Section]:
    """The page, the most important sections first."""
    results = [result for result, _ in own]
    parts = [
        table_one(results),
        *pareto_sections(of_kind(results, 'speed'), results),
        *(part for kind in RENDERINGS for result, part in own if result.record.kind == kind),
    ]
    return [replace(part, title=title) for part, title in zip(parts, distinct(parts), strict=True)]


def distinct(parts: Sequence[Section]) -> list[str]:
    """The titles of sections; equal ones are numbered."""
    count: Counter[str] = Counter()
    titles = []
    for part in parts:
        count[part.title] += 1
        titles.append(part.title + (f' ({count[part.title]})' if count[part.title] > 1 else ''))
    return titles


def reported(name: str) -> zoo.Reported | None:
    """What a system's paper reports on GoPro, if it does."""
    return next((found for found in zoo.get(name).reported if found.dataset == GOPRO), None)


def measured_on_gopro(results: Sequence[Result]) -> dict[str, tuple[dict[str, Any], records.Record]]:
    """For each system the row that was measured on all of GoPro's test pairs, and its record.

    Among several, a run on whole images counts before one in tiles, float32 before others, later before
    earlier.
    """
    candidates = [
        (row, result.record)
        for result in of_kind(results, 'quality')
        if result.record.settings['protocol'] == GOPRO_PROTOCOL
        for row in result.record.rows
        if row['images'] == GOPRO_PAIRS and not row['failed'] and row['psnr'] is not None
    ]
    candidates.sort(key=lambda c: c[1].environment['date'])
    candidates.sort(key=lambda c: (not c[0]['in_tiles'], c[1].settings['precision'] == 'fp32'))
    return {row['model']: (row, record) for row, record in candidates}


TABLE_ONE = {
    'model': 'system', 'reported_psnr': 'PSNR reported', 'reported_ssim': 'SSIM reported',
    'psnr': 'PSNR measured here', 'ssim': 'SSIM measured here', 'parameters': 'parameters',
    'macs': 'MACs, 256×256', 'source': 'reported in', 'note': 'measured how',
}  # fmt: skip


def table_one(results: Sequence[Result]) -> Section:
    """The paper's table 1: reported and measured."""
    measured = measured_on_gopro(results)
    sources: list[str] = []
    rows = []
    for name in [*zoo.names(), BLURRED]:
        said = reported(name) if name != BLURRED else None
        if said is None and name not in measured:
            continue
        row: dict[str, str | None] = {'model': name}
        if name != BLURRED:
            row['parameters'] = f'{zoo.get(name).parameters / 1e6:.2f} M'
            row['macs'] = macs_text(name, TABLE_SIDE)
        if said is not None:
            row['reported_psnr'] = f'{said.psnr:.2f}'
            row['reported_ssim'] = f'{said.ssim:.3f}' if said.ssim is not None else None
            sources.append(source(name, said))
            row['source'] = f'[{len(sources)}]'
        if name in measured:
            row |= _measured_cells(*measured[name])
        rows.append(row)
    caption = (
        f"GoPro's test set, {GOPRO_PAIRS} pairs; PSNR in dB. Only runs on all of it under the protocol "
        f'`{GOPRO_PROTOCOL}` count as measured. {_measured_count(measured)}'
    )
    tinted = frozenset({'psnr', 'ssim'})
    table = Table(TABLE_ONE, rows, caption, tinted=tinted, own=OWN)
    return Section('Table 1: GoPro, reported and measured', [table, Listing(sources)])


def source(name: str, said: zoo.Reported) -> str:
    """Which paper a system is from, and where its reported number was read."""
    system = zoo.get(name)
    paper = f'[{system.title}]({system.url})' if system.url else system.title
    where = ', '.join(part for part in (said.source, said.table) if part)
    return f'{name}: {paper}, {system.year}; {where}'


def _measured_cells(row: Mapping[str, Any], record: records.Record) -> dict[str, str | None]:
    how = [record.settings['precision'], *quality.notes(dict(row)), record.environment['date']]
    return {'psnr': f'{row["psnr"]:.2f}', 'ssim': f'{row["ssim"]:.4f}', 'note': ', '.join(how)}


def _measured_count(measured: Mapping[str, Any]) -> str:
    count = len(measured.keys() - {BLURRED})
    return (
        f'Measured so far: {count} system{"" if count == 1 else "s"}.'
        if count
        else 'None has been measured yet.'
    )


# Quality against latency.


def points(rows: Sequence[Mapping[str, Any]], measured: Mapping[str, Any]) -> list[Point]:
    """The systems of which both quality and latency are known, each with its fastest row."""
    fastest: dict[str, float] = {}
    for row in rows:
        if row['size'] == TABLE_SIZE and row.get('latency_ms'):
            fastest[row['model']] = min(row['latency_ms'], fastest.get(row['model'], float('inf')))
    found = []
    for name, milliseconds in fastest.items():
        said = reported(name)
        if name in measured:
            found.append(Point(name, milliseconds, measured[name][0]['psnr'], True))
        elif said is not None:
            found.append(Point(name, milliseconds, said.psnr, False))
    return found


def front(found: Sequence[Point]) -> list[Point]:
    """The points that no other one beats in both latency and quality, from fast to slow."""
    best: list[Point] = []
    for point in sorted(found, key=lambda p: (p.latency_ms, -p.psnr)):
        if not best or point.psnr > best[-1].psnr:
            best.append(point)
    return best


def pareto_sections(speeds: Sequence[Result], results: Sequence[Result]) -> Iterator[Section]:
    """Quality against latency, once for each run of `speed` that has at least two systems for it."""
    measured = measured_on_gopro(results)
    for result in speeds:
        record = result.record
        if record.settings['train'] or 'growth' in record.extra:
            continue
        found = points(record.rows, measured)
        if len(found) < 2:
            continue
        caption = (
            'PSNR on GoPro against the latency measured here at 256×256; up and left is better. Filled: PSNR '
            'measured here. **Hollow: PSNR as reported, not measured here.** The line joins what no other '
            'beats.'
        )
        rows: list[dict[str, str | None]] = [
            {
                'model': p.name, 'latency': f'{p.latency_ms:.1f} ms', 'psnr': f'{p.psnr:.2f}',
                'origin': 'measured here' if p.measured else 'reported',
            }
            for p in sorted(found, key=lambda p: p.latency_ms)
        ]  # fmt: skip
        heads = {'model': 'system', 'latency': 'latency', 'psnr': 'PSNR on GoPro', 'origin': 'PSNR is'}
        what = speed.conditions(record)
        elements: list[Element] = [
            Beside(
                Drawing([partial(plot_points, found=found)], caption, height=4.2),
                Table(heads, rows, f'The same in numbers: {what}.', own=OWN),
            ),
            facts(record),
        ]
        yield Section(f'Quality against latency: {what}', elements)


def plot_points(axis: Axes, found: Sequence[Point]) -> None:
    """Filled points are measured, hollow ones reported."""
    best = front(found)
    axis.plot([p.latency_ms for p in best], [p.psnr for p in best], color='grey', lw=1, zorder=1)
    for point in found:
        colour = 'C3' if point.name in OWN else 'C0'
        face = colour if point.measured else 'none'
        axis.plot(point.latency_ms, point.psnr, 'o', color=colour, markerfacecolor=face, ms=7, mew=1.6)
    axis.set(xscale='log', xlabel='latency, ms', ylabel='PSNR on GoPro, dB')
    axis.margins(x=0.25, y=0.12)
    output.logarithmic(axis.xaxis)
    for point, place in zip(found, _label_places(found), strict=True):
        axis.annotate(
            point.name, (point.latency_ms, point.psnr), xytext=(8, place), textcoords='offset points',
            va='center', fontsize=8, fontweight='bold' if point.name in OWN else 'normal',
        )  # fmt: skip
    axis.grid(alpha=0.3)
    axis.spines[['top', 'right']].set_visible(False)


def _label_places(found: Sequence[Point]) -> list[float]:
    """How far up or down to write each name, so that those of points of similar quality do not meet."""
    places = [0.0] * len(found)
    order = sorted(range(len(found)), key=lambda i: found[i].psnr)
    span = max(found[order[-1]].psnr - found[order[0]].psnr, 1e-6)
    points_high = 200.0
    last = float('-inf')
    for i in order:
        height = (found[i].psnr - found[order[0]].psnr) / span * points_high
        written = max(height, last + 10)
        places[i] = min(written - height, 14.0)
        last = written
    return places
