"""The throughput model in docs/scaling.md: its script prints the tables of the page."""

from __future__ import annotations

import contextlib
import io
import re

from dsgformer_arch import zoo
from tests.trees import ROOT


def test_the_script_of_the_page_prints_its_tables() -> None:
    page = (ROOT / 'docs' / 'scaling.md').read_text(encoding='utf-8')
    (script,) = re.findall(r'```python\n(.+?)```', page, re.DOTALL)
    printed = io.StringIO()
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(printed):
        exec(script, names)
    tables = printed.getvalue().strip().split('\n\n')
    assert len(tables) == 2
    for table in tables:
        assert len(table.splitlines()) == 6
        assert table in page
    parameters = sum(p.numel() for p in zoo.create('dsgformer').parameters())
    assert abs(names['PARAMETERS'] / parameters - 1) < 1e-3  # type: ignore[operator]
