"""MkDocs hook: pages of the repository outside docs/ become pages of the site, and links follow them."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]

OUTSIDE = {
    'README.md': 'index.md',
    'README.zh-CN.md': 'zh.md',
    'CONTRIBUTING.md': 'contributing.md',
    'datasets/README.md': 'datasets.md',
    'dsgformer_arch/weights/README.md': 'model-card.md',
}
"""Pages of the site by their file in the repository."""

LINK = re.compile(r'(!?)\[([^\]]*)\]\(([^)\s]+)\)')


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of `OUTSIDE`."""
    for source, page in OUTSIDE.items():
        text = (ROOT / source).read_text(encoding='utf-8')
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links between files of the repository as links between pages; to other files as plain text."""
    sources = {target: source for source, target in OUTSIDE.items()}
    own = page.file.src_uri
    folder = posixpath.dirname(sources.get(own, f'docs/{own}'))

    def follow(match: re.Match[str]) -> str:
        mark, text, target = match.groups()
        path, _, anchor = target.partition('#')
        if not path or re.match(r'[a-z]+:', target):
            return match[0]
        source = posixpath.normpath(posixpath.join(folder, path))
        inside = OUTSIDE.get(source) or source.removeprefix('docs/')
        if files.get_file_from_path(inside) is None:
            if (ROOT / source).exists():
                return text if mark == '' else ''
            return match[0]  # MkDocs reports what is broken
        start = posixpath.dirname(own) or '.'
        return f'{mark}[{text}]({posixpath.relpath(inside, start)}{"#" * bool(anchor)}{anchor})'

    return LINK.sub(follow, markdown)
