"""Runs a benchmark for `tools/benchmark.py`: measures, and writes the record, its table, figure and page."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsgformer_arch.benchmark.measure import (
    ablation,
    cost,
    latency,
    loader,
    quality,
    recipe,
    speed,
    training,
)
from dsgformer_arch.benchmark.record import Record, beside, write_text
from dsgformer_arch.benchmark.render.kinds import RENDERINGS

MEASURES: dict[str, Callable[..., Record]] = {
    'speed': speed.run,
    'cost': cost.run,
    'latency': latency.run,
    'quality': quality.run,
    'training': training.run,
    'ablation': ablation.run,
    'recipe': recipe.run,
    'loader': loader.run,
}
"""By kind of record: the function that measures."""


def run(kind: str, *arguments: Any, **settings: Any) -> int:
    """Measure, and write `out`.json, `out`.md and, where there is a figure, `out`.png.

    Args:
        kind: a key of `MEASURES`.
        arguments, settings: of the measuring function; `out` is among the settings.

    Returns:
        0, or 1 if something could not be measured.

    Raises:
        UserError: a setting does not fit; see the measuring modules.
    """
    record, rendering = MEASURES[kind](*arguments, **settings), RENDERINGS[kind]
    out: Path = settings['out']
    write_text(beside(out, '.md'), rendering.page(record))
    written = ['.json', '.md']
    if rendering.draw(record, beside(out, '.png')):
        written.append('.png')
    print(rendering.table(record))
    print(f'wrote {", ".join(str(beside(out, end)) for end in written)}', file=sys.stderr)
    return int(any(row.get('error') or row.get('failed') for row in record.rows))
