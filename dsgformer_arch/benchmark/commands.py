"""Runs a benchmark for `tools/benchmark.py`: measures, and writes the record, its table, figure and page."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
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
from dsgformer_arch.benchmark.render import ablation as render_ablation
from dsgformer_arch.benchmark.render import cost as render_cost
from dsgformer_arch.benchmark.render import latency as render_latency
from dsgformer_arch.benchmark.render import loader as render_loader
from dsgformer_arch.benchmark.render import quality as render_quality
from dsgformer_arch.benchmark.render import recipe as render_recipe
from dsgformer_arch.benchmark.render import speed as render_speed
from dsgformer_arch.benchmark.render import training as render_training

KINDS: dict[str, tuple[ModuleType, ModuleType]] = {
    'speed': (speed, render_speed),
    'cost': (cost, render_cost),
    'latency': (latency, render_latency),
    'quality': (quality, render_quality),
    'training': (training, render_training),
    'ablation': (ablation, render_ablation),
    'recipe': (recipe, render_recipe),
    'loader': (loader, render_loader),
}
"""By command: the module that measures and the one that renders."""


def run(kind: str, *arguments: Any, **settings: Any) -> int:
    """Measure, and write `out`.json, `out`.md and, where there is a figure, `out`.png.

    Args:
        kind: a key of `KINDS`.
        arguments, settings: of the measuring module's `run`; `out` is among the settings.

    Returns:
        0, or 1 if something could not be measured.

    Raises:
        UserError: a setting does not fit; see the measuring modules.
    """
    measuring, rendering = KINDS[kind]
    record: Record = measuring.run(*arguments, **settings)
    out: Path = settings['out']
    write_text(beside(out, '.md'), rendering.page(record))
    written = ['.json', '.md']
    if hasattr(rendering, 'draw'):
        rendering.draw(record, beside(out, '.png'))
        written.append('.png')
    print(rendering.table(record))
    print(f'wrote {", ".join(str(beside(out, end)) for end in written)}', file=sys.stderr)
    return int(any(row.get('error') or row.get('failed') for row in record.rows))
