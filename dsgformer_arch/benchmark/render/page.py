"""One self-contained HTML page, and the same in Markdown, from a few kinds of elements.

The page loads nothing from a server: it contains its style, script, figures and images, and its content
security policy forbids everything else.
"""

from __future__ import annotations

import base64
import html
import io
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import cv2
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsgformer_arch.benchmark.render.output import markdown_table
from dsgformer_arch.utils.errors import UserError

WEBP_QUALITY = 92

INK = '#010203'
"""Drawn in this colour, a figure's text and axes take the page's, light or dark."""

FIGURE_WIDTH = 4.6
"""In inches: about what a phone shows without making the text smaller."""

SKELETON = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{css}</style>
</head>
<body>
<header>
<h1>{title}</h1>
{lead}
<nav aria-label="Sections"><ul>
{contents}
</ul></nav>
</header>
<main>
{sections}
</main>
<script>
{script}</script>
</body>
</html>
"""


class Element(Protocol):
    """A part of a page."""

    def html(self) -> str:
        """As HTML."""

    def markdown(self) -> str:
        """As Markdown; empty for what only a page can show."""


@dataclass(frozen=True)
class Text:
    """A paragraph; `code`, **bold** and [links](https://…) as in Markdown."""

    text: str

    def html(self) -> str:
        return f'<p>{inline(self.text)}</p>'

    def markdown(self) -> str:
        return self.text


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        columns: heading by key of the rows.
        rows: text by column; what is missing or None is an empty cell.
        caption: what the table shows.
        tinted: columns to set apart.
        words: columns of sentences, not numbers.
        names: columns of single words.
        own: the first cells of rows to emphasise.
    """

    columns: Mapping[str, str]
    rows: Sequence[Mapping[str, str | None]]
    caption: str
    tinted: frozenset[str] = frozenset()
    words: frozenset[str] = frozenset({'note'})
    names: frozenset[str] = frozenset({'attention', 'gate', 'mode', 'size'})
    own: frozenset[str] = frozenset()

    def html(self) -> str:
        heads = ''.join(
            f'<th scope="col"{self._classes(key)}>{inline(head)}</th>' for key, head in self.columns.items()
        )
        body = '\n'.join(self._row(row) for row in self.rows)
        # The caption stays outside what scrolls, so that a phone shows all of it.
        return (
            f'<figure><div class="scroll" role="region" tabindex="0" '
            f'aria-label="{html.escape(plain(self.caption))}">'
            f'<table><thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
            f'<figcaption>{inline(self.caption)}</figcaption></figure>'
        )

    def markdown(self) -> str:
        return f'{markdown_table(self.columns, self.rows)}\n\n*{self.caption}*'

    def _row(self, row: Mapping[str, str | None]) -> str:
        first, *others = self.columns
        cells = ''.join(
            f'<td{self._classes(key)} data-label="{html.escape(plain(self.columns[key]))}">'
            f'{inline(row.get(key) or "")}</td>'
            for key in others
        )
        name = row.get(first) or ''
        own = ' class="own"' if name in self.own else ''
        return f'<tr{own}><th scope="row">{inline(name)}</th>{cells}</tr>'

    def _classes(self, key: str) -> str:
        sets = {'tinted': self.tinted, 'words': self.words, 'names': self.names}
        found = [name for name, keys in sets.items() if key in keys]
        return f' class="{" ".join(found)}"' if found else ''


@dataclass(frozen=True)
class Listing:
    """A numbered list."""

    lines: Sequence[str]

    def html(self) -> str:
        return f'<ol>{"".join(f"<li>{inline(line)}</li>" for line in self.lines)}</ol>'

    def markdown(self) -> str:
        return '\n'.join(f'{number}. {line}' for number, line in enumerate(self.lines, 1))


@dataclass(frozen=True)
class Beside:
    """Two elements side by side where there is room."""

    left: Element
    right: Element

    def html(self) -> str:
        return f'<div class="beside"><div>{self.left.html()}</div><div>{self.right.html()}</div></div>'

    def markdown(self) -> str:
        return '\n\n'.join(part for part in (self.left.markdown(), self.right.markdown()) if part)


@dataclass(frozen=True)
class Drawing:
    """Figures side by side, drawn as SVG.

    Attributes:
        plots: each draws on the axes that it is given.
        caption: what they show.
        height: of each, in inches.
    """

    plots: Sequence[Callable[[Axes], None]]
    caption: str
    height: float = 3.4

    @cached_property
    def drawn(self) -> str:
        """The figures as SVG."""
        return ''.join(svg(plot, self.height, plain(self.caption)) for plot in self.plots)

    def html(self) -> str:
        single = ' single' if len(self.plots) == 1 else ''
        return (
            f'<figure><div class="figures{single}">{self.drawn}</div>'
            f'<figcaption>{inline(self.caption)}</figcaption></figure>'
        )

    def markdown(self) -> str:
        return ''


@dataclass(frozen=True)
class Comparison:
    """Versions of one image under each other, with a slider between any two.

    Attributes:
        caption: what is shown.
        files: an image file by version, at least two, all of one size.
        labels: what to call each version.
        left: the version shown on the left at first.
        right: likewise on the right.
    """

    caption: str
    files: Mapping[str, Path]
    labels: Mapping[str, str]
    left: str
    right: str

    def html(self) -> str:
        images = []
        height = width = 1
        for version, path in self.files.items():
            source, height, width = data_uri(path)
            side = {self.left: ' class="left"', self.right: ' class="right"'}.get(version, '')
            images.append(
                f'<img src="{source}" alt="{html.escape(plain(self.caption))}: {html.escape(version)}"{side} '
                f'data-version="{html.escape(version)}" data-label="{html.escape(self.labels[version])}">'
            )
        name = html.escape(f'Where the left image ends: {plain(self.caption)}')
        return (
            f'<figure class="compare"><div class="stage" style="aspect-ratio: {width} / {height}">'
            f'{"".join(images)}<input type="range" min="0" max="100" value="50" aria-label="{name}">'
            f'<span class="handle" aria-hidden="true"></span>'
            f'<span class="tag of-left">{html.escape(self.labels[self.left])}</span>'
            f'<span class="tag of-right">{html.escape(self.labels[self.right])}</span></div>'
            f'<div class="choice">{self._select("left", self.left)}{self._select("right", self.right)}</div>'
            f'<figcaption>{inline(self.caption)}</figcaption></figure>'
        )

    def markdown(self) -> str:
        return ''

    def _select(self, side: str, chosen: str) -> str:
        options = ''.join(
            f'<option{" selected" if version == chosen else ""}>{html.escape(version)}</option>'
            for version in self.files
        )
        return f'<label>{side} <select name="{side}">{options}</select></label>'


@dataclass(frozen=True)
class Facts:
    """How numbers were made, as a section that can be opened.

    Attributes:
        summary: what it is about.
        command: the command line.
        facts: text by what it tells.
    """

    summary: str
    command: str
    facts: Mapping[str, str]

    def html(self) -> str:
        rows = {'Command': f'`{self.command}`', **self.facts}
        pairs = ''.join(f'<dt>{html.escape(key)}</dt><dd>{inline(text)}</dd>' for key, text in rows.items())
        return f'<details><summary>{html.escape(self.summary)}</summary><dl>{pairs}</dl></details>'

    def markdown(self) -> str:
        rows = [f'{key}: {text.rstrip(".")}.' for key, text in self.facts.items()]
        return '\n\n'.join([f'    {self.command}', *rows])


@dataclass(frozen=True)
class Section:
    """A heading and the content below it."""

    title: str
    elements: Sequence[Element]

    def html(self, anchor: str) -> str:
        body = '\n'.join(element.html() for element in self.elements)
        return f'<section id="{anchor}" aria-labelledby="{anchor}-title"><h2 id="{anchor}-title">' + (
            f'{html.escape(self.title)}</h2>\n{body}\n</section>'
        )

    def markdown(self) -> str:
        parts = [element.markdown() for element in self.elements]
        return '\n\n'.join([f'## {self.title}', *(part for part in parts if part)])


@dataclass(frozen=True)
class Page:
    """A whole page."""

    title: str
    lead: Sequence[Text]
    sections: Sequence[Section] = field(default_factory=list)

    def html(self) -> str:
        """As one HTML file."""
        anchors = [f's{i}' for i in range(1, len(self.sections) + 1)]
        contents = [
            f'<li><a href="#{anchor}">{html.escape(section.title)}</a></li>'
            for anchor, section in zip(anchors, self.sections, strict=True)
        ]
        sections = [section.html(a) for a, section in zip(anchors, self.sections, strict=True)]
        return SKELETON.format(
            title=html.escape(self.title), css=asset('page.css'), script=asset('page.js'),
            lead='\n'.join(text.html() for text in self.lead), contents='\n'.join(contents),
            sections='\n'.join(sections),
        )  # fmt: skip

    def markdown(self) -> str:
        """As one Markdown file."""
        parts = [text.markdown() for text in self.lead] + [section.markdown() for section in self.sections]
        return without_html('\n\n'.join([f'# {self.title}', *parts]) + '\n')


def asset(name: str) -> str:
    """A text file of this package."""
    return resources.files('dsgformer_arch.benchmark.render').joinpath(name).read_text(encoding='utf-8')


def inline(text: str) -> str:
    """HTML of a line of Markdown: code, bold and links; all else is text."""
    escaped = html.escape(text, quote=False)
    escaped = re.sub(r'`([^`]+)`', r'<code>\1</code>', escaped)
    escaped = re.sub(r'\*\*([^*]+)\*\*', r'<strong>\1</strong>', escaped)
    return re.sub(r'\[([^\]]+)\]\((https://[^)\s"]+)\)', r'<a href="\2">\1</a>', escaped)


def without_html(text: str) -> str:
    """Markdown in which `<` is text, outside of code too: what a record holds is never HTML."""
    lines = []
    for line in text.split('\n'):
        parts = [line] if line.startswith('    ') else re.split(r'(`[^`|]*`)', line)
        lines.append(''.join(p if p.startswith(('`', '    ')) else p.replace('<', '&lt;') for p in parts))
    return '\n'.join(lines)


def plain(text: str) -> str:
    """A line of Markdown without its marks."""
    return re.sub(r'[`*]|\[([^\]]+)\]\([^)]+\)', r'\1', text)


def data_uri(path: Path) -> tuple[str, int, int]:
    """An image file as a data URI, its height and its width.

    Raises:
        UserError: the file is missing or no image.
    """
    image = cv2.imread(str(path), cv2.IMREAD_COLOR) if path.is_file() else None
    if image is None:
        raise UserError(f'there is no image {path}; run quality with --save-images again')
    encoded = cv2.imencode('.webp', image, [cv2.IMWRITE_WEBP_QUALITY, WEBP_QUALITY])[1].tobytes()
    return f'data:image/webp;base64,{base64.b64encode(encoded).decode()}', *image.shape[:2]


def svg(plot: Callable[[Axes], None], height: float, label: str) -> str:
    """A figure as SVG; its labels are text elements in the colour of the page."""
    inks = ('text.color', 'axes.edgecolor', 'axes.labelcolor', 'xtick.color', 'ytick.color', 'grid.color')
    style: Any = {
        'svg.fonttype': 'none',
        'svg.hashsalt': 'dsgformer',
        'font.size': 9,
        **dict.fromkeys(inks, INK),
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(FIGURE_WIDTH, height), layout='constrained')
        plot(figure.subplots())
        file = io.StringIO()
        nothing = dict.fromkeys(('Date', 'Creator', 'Format', 'Type'))
        figure.savefig(file, format='svg', transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index('<svg') :].replace(INK, 'currentColor')
    text = re.sub(r'<style.*?</style>', '', text, flags=re.DOTALL)  # would hold for the whole page
    text = re.sub(r"'?DejaVu Sans'?(?:, [^;\"]*)?", 'system-ui, sans-serif', text)
    # Several figures share a page, so names must not meet.
    mark = f'f{zlib.crc32(text.encode()):x}-'
    text = re.sub(r'(\bid="|url\(#|href="#)', rf'\1{mark}', text)
    return text.replace('<svg', f'<svg role="img" aria-label="{html.escape(label)}"', 1)
