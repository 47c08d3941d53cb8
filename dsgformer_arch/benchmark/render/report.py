"""All results in one page: what papers report, what was measured here, and how each number was made."""

from __future__ import annotations

import datetime
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from dsgformer_arch import zoo
from dsgformer_arch.benchmark import record as records
from dsgformer_arch.benchmark.measure.ablation import ATTENTIONS
from dsgformer_arch.benchmark.measure.quality import BLURRED, SHARP
from dsgformer_arch.benchmark.render import (
    ablation,
    cost,
    latency,
    loader,
    output,
    quality,
    recipe,
    speed,
    training,
)
from dsgformer_arch.benchmark.render.page import (
    Beside,
    Comparison,
    Drawing,
    Element,
    Facts,
    Listing,
    Page,
    Section,
    Table,
    Text,
)
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

OWN = 'dsgformer'

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
        if result.record.kind not in KINDS:
            raise UserError(f'its kind is {result.record.kind!r}; there are {", ".join(KINDS)}')
        part = KINDS[result.record.kind](result)
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
        *(part for kind in KINDS for result, part in own if result.record.kind == kind),
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


def facts(record: records.Record) -> Facts:
    """How a record's numbers were made."""
    return Facts(
        'How these numbers were made: command, protocol, machine, versions',
        record.command,
        output.made(record),
    )


# Table 1.


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
    table = Table(TABLE_ONE, rows, caption, tinted=tinted, own=frozenset({OWN}))
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
                Table(heads, rows, f'The same in numbers: {what}.', own=frozenset({OWN})),
            ),
            facts(record),
        ]
        yield Section(f'Quality against latency: {what}', elements)


def plot_points(axis: Axes, found: Sequence[Point]) -> None:
    """Filled points are measured, hollow ones reported."""
    best = front(found)
    axis.plot([p.latency_ms for p in best], [p.psnr for p in best], color='grey', lw=1, zorder=1)
    for point in found:
        colour = 'C3' if point.name == OWN else 'C0'
        face = colour if point.measured else 'none'
        axis.plot(point.latency_ms, point.psnr, 'o', color=colour, markerfacecolor=face, ms=7, mew=1.6)
    axis.set(xscale='log', xlabel='latency, ms', ylabel='PSNR on GoPro, dB')
    axis.margins(x=0.25, y=0.12)
    output.logarithmic(axis.xaxis)
    for point, place in zip(found, _label_places(found), strict=True):
        axis.annotate(
            point.name, (point.latency_ms, point.psnr), xytext=(8, place), textcoords='offset points',
            va='center', fontsize=8, fontweight='bold' if point.name == OWN else 'normal',
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


# The results as they are.


def quality_section(result: Result) -> Section:
    """One run of `quality`."""
    record = result.record
    cells = quality.cells(record)
    columns = output.filled(quality.columns_of(record), cells)
    data = record.settings['data']
    caption = f'Means over the images of {data}; PSNR in dB. {quality.weights_text(record)}'
    elements: list[Element] = [Table(columns, cells, caption, own=frozenset({OWN}))]
    restored = sum(row.get('gain') is not None for row in record.rows)
    if restored and record.settings['images'] > 1:
        spread = (
            'PSNR gained over the blurred image: mean, and from the 10th to the 90th percentile of images.'
        )
        elements.append(Drawing([partial(quality.plot, record=record)], spread, height=1 + 0.3 * restored))
    elements += [*comparisons(result), facts(record)]
    return Section(quality.title(record), elements)


def comparisons(result: Result) -> list[Element]:
    """Details of restored images with a slider, where the run kept its images."""
    record = result.record
    first = record.settings['models'][0]
    found: list[Element] = []
    for example in record.extra.get('examples', []):
        psnr = example['psnr']
        labels = {v: v if psnr.get(v) is None else f'{v} {psnr[v]:.2f} dB' for v in example['files']}
        files = {version: kept(result, file) for version, file in example['files'].items()}
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


def kept(result: Result, file: str) -> Path:
    """An image that a run has kept.

    Raises:
        UserError: it lies outside of the folder of the result, from where nothing may come into a page.
    """
    folder = result.path.parent.resolve()
    path = (folder / file).resolve()
    if not path.is_relative_to(folder):
        raise UserError(f'the image {file} lies outside of {result.path.parent}')
    return path


def speed_section(result: Result) -> Section:
    """One run of `speed`."""
    record = result.record
    timed = sum(bool(row.get('latency_ms')) for row in record.rows)
    cells = speed.cells(record)
    alike = {key for key in ('size', 'mode') if len({cell[key] for cell in cells}) == 1}
    columns = output.filled({key: head for key, head in speed.COLUMNS.items() if key not in alike}, cells)
    caption = (
        f'Ratio: how many times as long as {record.settings["models"][0]} at the same size. Spread: (largest '
        '- smallest) / median.'
    )
    if record.extra.get('rates'):
        caption = f'{caption} {speed.ceilings(record)}'
    elements: list[Element] = [Table(columns, cells, caption, own=frozenset({OWN}))]
    if timed:
        height = 3.4 if 'growth' in record.extra else 0.8 + 0.22 * timed
        drawing = Drawing([partial(speed.plot, record=record)], 'Latency, shorter is better.', height)
        elements.append(drawing)
        if speed.growth_cells(record):
            grown = 'Exponents of growth with the number of pixels; 1 is linear.'
            exponents = Table(speed.GROWTH_COLUMNS, speed.growth_cells(record), grown)
            elements[-1] = Beside(drawing, exponents)
    return Section(speed.title(record), [*elements, facts(record)])


def cost_section(result: Result) -> Section:
    """One run of `cost`, and what the challenges report."""
    record = result.record
    cells = cost.cells(record)
    counted = Table(output.filled(cost.COLUMNS, cells), cells, cost.note(), own=frozenset({OWN}))
    reported = Table(cost.REPORTED_COLUMNS, cost.reported_cells(), cost.reported_note())
    return Section(cost.title(record), [counted, reported, facts(record)])


def training_section(result: Result) -> Section:
    """One run of `training`."""
    record = result.record
    plots = [partial(training.plot, record=record, key=key) for key in training.AXES]
    elements: list[Element] = [
        Table(training.COLUMNS, training.cells(record), training.note(record)),
        Drawing(plots, 'PSNR on held-out images; the band is from the lowest to the highest seed.'),
        facts(record),
    ]
    return Section(training.title(record), elements)


def ablation_section(result: Result) -> Section:
    """One run of `ablation`."""
    record = result.record
    plots = [partial(ablation.plot, record=record, attention=a) for a in ATTENTIONS]
    elements: list[Element] = [
        Table(ablation.COLUMNS, ablation.cells(record), ablation.note(record)),
        Drawing(plots, "Points are seeds, bars their means; this run's numbers, none of the paper's."),
        facts(record),
    ]
    return Section(ablation.title(record), elements)


def recipe_section(result: Result) -> Section:
    """One run of `recipe`."""
    record = result.record
    elements: list[Element] = [
        Table(recipe.COLUMNS, recipe.cells(record), recipe.note(record)),
        Drawing([partial(recipe.plot, record=record)], 'Difference from the base, by seed, with its mean.'),
        facts(record),
    ]
    return Section(recipe.title(record), elements)


def loader_section(result: Result) -> Section:
    """One run of `loader`."""
    record = result.record
    table = Table(loader.COLUMNS, loader.cells(record), loader.note(record))
    return Section(loader.title(record), [table, facts(record)])


def latency_section(result: Result) -> Section:
    """One run of `latency`."""
    record = result.record
    note = ' '.join(latency.ahead(record)) or latency.NOWHERE
    table = Table(latency.columns(record), latency.cells(record), note)
    return Section(latency.title(record), [table, facts(record)])


KINDS: dict[str, Callable[[Result], Section]] = {
    'quality': quality_section,
    'speed': speed_section,
    'cost': cost_section,
    'latency': latency_section,
    'training': training_section,
    'ablation': ablation_section,
    'recipe': recipe_section,
    'loader': loader_section,
}
"""What makes the section of a result, by kind, in the order of the page."""
