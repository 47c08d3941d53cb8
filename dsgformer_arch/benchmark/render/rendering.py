"""How the records of a kind are shown: the page and the figure of a run, and its section of the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes

from dsgformer_arch.benchmark.record import Record
from dsgformer_arch.benchmark.render import output
from dsgformer_arch.benchmark.render.page import Drawing, Element, Facts, Section, Table

Plot = Callable[[Axes], None]
"""Draws on the axes that it is given."""

OWN = frozenset({'dsgformer'})
"""The system whose rows and points are emphasised."""


@dataclass(frozen=True)
class Rendering:
    """How the records of one kind are shown.

    Attributes:
        title: heading of a record.
        columns: headings of its table, by key of `cells`.
        cells: rows of its table, as text; None is an empty cell.
        note: text about the table: above it on the page, below it in the report.
        plots: plots of its figure, side by side; there is no figure without them.
        caption: what the plots show.
        size: width and height of the figure of a run, in inches.
        parts: Markdown of the page, except for its heading and how the numbers were made; the note and the
            table by default.
        elements: content of the section, except for the latter; called with the record and the folder of
            its file.  The table and the plots by default.
    """

    title: Callable[[Record], str]
    columns: Callable[[Record], Mapping[str, str]]
    cells: Callable[[Record], Sequence[Mapping[str, str | None]]]
    note: Callable[[Record], str] = lambda record: ''
    plots: Callable[[Record], Sequence[Plot]] = lambda record: ()
    caption: str = ''
    size: Callable[[Record], tuple[float, float]] = lambda record: (8, 4)
    parts: Callable[[Record, str], list[str]] | None = None
    elements: Callable[[Record, Path], list[Element]] | None = None

    def table(self, record: Record) -> str:
        """The table in Markdown."""
        return output.markdown_table(self.columns(record), self.cells(record))

    def page(self, record: Record) -> str:
        """The page of a run in Markdown."""
        table = self.table(record)
        parts = [self.note(record), table] if self.parts is None else self.parts(record, table)
        return output.markdown_page(self.title(record), record, parts)

    def draw(self, record: Record, path: Path) -> bool:
        """Write the figure of a run as PNG; returns whether there is one."""
        plots = self.plots(record)
        if plots:
            figure, axes = output.canvas(*self.size(record), columns=len(plots))
            for axis, plot in zip(axes, plots, strict=True):
                plot(axis)
            output.save_figure(figure, path)
        return bool(plots)

    def section(self, record: Record, folder: Path) -> Section:
        """The section of a run in the report."""
        if self.elements is not None:
            elements = self.elements(record, folder)
        else:
            elements = [Table(self.columns(record), self.cells(record), self.note(record))]
            if plots := self.plots(record):
                elements.append(Drawing(plots, self.caption))
        return Section(self.title(record), [*elements, facts(record)])


def facts(record: Record) -> Facts:
    """How a record's numbers were made."""
    title = 'How these numbers were made: command, protocol, machine, versions'
    return Facts(title, record.command, output.made(record))
