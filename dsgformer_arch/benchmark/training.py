"""Which system learns most at equal cost: PSNR against iterations and against time, over seeds."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsgformer_arch import zoo
from dsgformer_arch.benchmark import learning
from dsgformer_arch.benchmark import record as records
from dsgformer_arch.complexity import multiply_adds
from dsgformer_arch.errors import UserError
from dsgformer_arch.progress import Stages

MATCH_SIZE = 256
"""Side of the image at which multiply-adds are matched."""


def run(
    models: Sequence[str],
    data: str,
    match: str | None = None,
    iterations: int | None = None,
    seconds: float | None = None,
    seeds: int = 2,
    batch: int = 8,
    patch: int = 64,
    lr: float = 1e-3,
    validations: int = 4,
    device: str = 'cpu',
    out: Path = Path('results/benchmark/training'),
    resume: bool = False,
) -> int:
    """Train every system `seeds` times and write `out`.json, `out`.md and `out`.png.

    Args:
        models: names of the zoo.
        data: folder of `{train,test}_{lq,gt}.lmdb`.
        match: scale every other system's width to the multiply-adds of this one.
        iterations: budget of a run; or
        seconds: the same as a time.
        seeds: repetitions; seed k is the same for all systems.
        batch: crops in a step.
        patch: side of the crops.
        lr: peak of the learning rate.
        validations: how often a run is measured.
        device: a torch device.
        out: results without their ending.
        resume: keep the runs that `out`.json has.

    Returns:
        0, or 1 if a system could not be trained.
    """
    recipe = learning.Recipe(iterations, seconds, batch, patch, lr, validations)
    pairs = learning.read(data, patch)
    settings = {
        'models': list(models), 'data': Path(data).name, 'match': match, 'seeds': seeds, 'device': device,
        'threads': torch.get_num_threads(), **recipe.__dict__,
    }  # fmt: skip
    path = out.with_suffix('.json')
    record = records.start('training', settings, recipe.describe(), path, resume)
    record.extra['blurred'] = learning.blurred_scores(pairs)
    overrides = {name: matched(name, match) if match else {} for name in models}
    todo = [(s, name) for s in range(seeds) for name in models if record.find(model=name, seed=s) is None]
    # Seeds are the outer loop: an early end leaves every system with the same number of runs.
    stages = Stages('training', len(todo))
    for seed, name in todo:
        build = partial(zoo.create, name, **overrides[name])
        row: dict[str, Any] = {
            'model': name,
            'seed': seed,
            'scaled': overrides[name],
            **cost(name, overrides[name]),
        }
        row |= attempt(build, pairs, recipe, seed, torch.device(device), stages)
        record.rows.append(row)
        record.save(path)
    out.with_suffix('.md').write_text(page(record), encoding='utf-8')
    draw(record, out.with_suffix('.png'))
    print(table(record))
    print(f'wrote {path}, {out.with_suffix(".md")} and {out.with_suffix(".png")}', file=sys.stderr)
    return int(any(row.get('error') for row in record.rows))


def attempt(
    build: Callable[[], nn.Module],
    data: learning.Data,
    recipe: learning.Recipe,
    seed: int,
    device: torch.device,
    stages: Stages,
) -> dict[str, Any]:
    """The result of a run, or its `error`: one system that fails does not stop the others."""
    try:
        result = learning.train(build, data, recipe, seed, device, stages.tick)
    except (RuntimeError, MemoryError) as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        result = {'error': text[0][:160]}
    stages.next()
    return result


def cost(name: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """Parameters and multiply-adds of a system as it is trained here."""
    parameters = sum(parameter.numel() for parameter in zoo.create(name, **overrides).parameters())
    macs = multiply_adds(name, MATCH_SIZE, MATCH_SIZE, **overrides)
    return {'parameters': parameters, 'multiply_adds': macs}


def matched(name: str, reference: str) -> dict[str, Any]:
    """The override of a system's width that brings its multiply-adds nearest to the reference's.

    Raises:
        UserError: the system has no single width to scale.
    """
    if name == reference:
        return {}
    keyword = zoo.get(name).width
    if keyword is None:
        raise UserError(f'--match: {name} has no single width that could be scaled; leave it out')
    target = multiply_adds(reference, MATCH_SIZE, MATCH_SIZE)
    best: tuple[float, int] | None = None
    # Multiply-adds grow with the square of the width, so few candidates are near; 64 is above them all.
    for width in range(2, 65, 2):
        try:
            found = multiply_adds(name, MATCH_SIZE, MATCH_SIZE, **{keyword: width})
        except (RuntimeError, ValueError, ZeroDivisionError):
            continue  # a width that heads or groups do not divide
        distance = abs(found / target - 1)
        if best is None or distance < best[0]:
            best = (distance, width)
        elif found > 2 * target:
            break
    if best is None:
        raise UserError(f'--match: no width of {name} works')
    return {keyword: best[1]}


COLUMNS = {
    'model': 'system', 'width': 'width', 'parameters': 'parameters', 'macs': 'multiply-adds at 256×256',
    'psnr': 'PSNR', 'gain': 'gain', 'ssim': 'SSIM', 'iterations': 'iterations', 'seconds': 'seconds',
}  # fmt: skip


def table(record: records.Record) -> str:
    """One line a system: means over the seeds, and their spread (smallest to largest)."""
    blurred = record.extra['blurred']
    lines = []
    for name in record.settings['models']:
        runs = [row for row in record.rows if row['model'] == name]
        if not runs:
            continue
        first = runs[0]
        line = {
            'model': name,
            'width': ', '.join(f'{k} {v}' for k, v in first['scaled'].items()) or 'as published',
            'parameters': f'{first["parameters"] / 1e6:.2f} M',
            'macs': f'{first["multiply_adds"] / 1e9:.2f} G',
        }
        done = [row for row in runs if 'psnr' in row]
        if done:
            psnr = [row['psnr'] for row in done]
            line |= {
                'psnr': f'{statistics.mean(psnr):.2f} ({min(psnr):.2f} to {max(psnr):.2f})',
                'gain': f'{statistics.mean(psnr) - blurred["psnr"]:+.2f}',
                'ssim': f'{statistics.mean(row["ssim"] for row in done):.4f}',
                'iterations': f'{statistics.mean(row["iterations"] for row in done):.0f}',
                'seconds': f'{statistics.mean(row["seconds"] for row in done):.0f}',
            }
        else:
            line['psnr'] = first['error']
        lines.append(line)
    nothing = {'model': '(blurred)', 'psnr': f'{blurred["psnr"]:.2f}', 'ssim': f'{blurred["ssim"]:.4f}'}
    return records.markdown_table(COLUMNS, [nothing, *lines])


def page(record: records.Record) -> str:
    """The Markdown page of a run."""
    budget = record.settings['iterations']
    text = f'{budget} iterations' if budget else f'{record.settings["seconds"]} seconds'
    seeds = record.settings['seeds']
    note = (
        f'{text} for each system, {seeds} seed{"s" if seeds > 1 else ""}; in brackets, smallest to largest.'
    )
    return records.markdown_page('Training at equal cost', record, [note, table(record)])


def draw(record: records.Record, path: Path) -> None:
    """PSNR against iterations and against seconds; the band is the spread over seeds."""
    import matplotlib as mpl

    mpl.use('Agg')
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for name in record.settings['models']:
        curves = [row['curve'] for row in record.rows if row['model'] == name and 'curve' in row]
        if not curves:
            continue
        points = list(zip(*curves, strict=False))
        psnr = [[point['psnr'] for point in seeds] for seeds in points]
        mean = [statistics.mean(values) for values in psnr]
        for axis, key in zip(axes, ('iteration', 'seconds'), strict=True):
            x = [statistics.mean(point[key] for point in seeds) for seeds in points]
            (line,) = axis.plot(x, mean, marker='o', markersize=3, label=name)
            axis.fill_between(
                x, [min(v) for v in psnr], [max(v) for v in psnr], color=line.get_color(), alpha=0.15
            )
    for axis, label in zip(axes, ('iterations', 'seconds of training'), strict=True):
        axis.axhline(record.extra['blurred']['psnr'], color='grey', linestyle=':', label='blurred')
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        axis.spines[['top', 'right']].set_visible(False)
    axes[0].set_ylabel('PSNR on held-out images, dB')
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
