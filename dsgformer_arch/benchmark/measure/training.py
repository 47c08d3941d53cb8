"""Which system learns most at equal cost: PSNR against iterations and against time, over seeds."""

from __future__ import annotations

import logging
import math
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import nn

from dsgformer_arch import zoo
from dsgformer_arch.benchmark import record as records
from dsgformer_arch.benchmark.measure import learning, machine
from dsgformer_arch.benchmark.measure.complexity import multiply_adds
from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.progress import Stages

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
    target = machine.device(device)
    recipe = learning.Recipe(iterations, seconds, batch, patch, lr, validations)
    pairs = learning.read(data, patch)
    settings = {
        'models': list(models), 'data': records.data_name(data), 'data_sha256': pairs.digest, 'match': match,
        'seeds': seeds, 'device': device, 'threads': torch.get_num_threads(), **recipe.__dict__,
    }  # fmt: skip
    path = records.beside(out, '.json')
    record = records.start('training', settings, recipe.describe(), path, resume)
    record.drop_failed()
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
        row |= attempt(build, pairs, recipe, seed, target, stages)
        record.rows.append(row)
        record.save(path)
    records.write_text(records.beside(out, '.md'), page(record))
    draw(record, records.beside(out, '.png'))
    print(table(record))
    print(f'wrote {path}, {records.beside(out, ".md")} and {records.beside(out, ".png")}', file=sys.stderr)
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
        with machine.bounded(device):
            result = learning.train(build, data, recipe, seed, device, stages.tick)
    except (RuntimeError, MemoryError, ValueError) as error:
        result = {'error': machine.reason(error)}
    machine.release(device)
    stages.next()
    return result


def cost(name: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """Parameters and multiply-adds of a system as it is trained here."""
    parameters = sum(parameter.numel() for parameter in zoo.create(name, **overrides).parameters())
    macs = multiply_adds(name, MATCH_SIZE, MATCH_SIZE, **overrides)
    return {'parameters': parameters, 'multiply_adds': macs}


NARROWEST, WIDEST = 2, 128
"""Widths that `--match` tries for the first level of a system."""

FARTHEST = 2.0
"""How many times a scaled system's multiply-adds may be the reference's, or the other way round."""


def matched(name: str, reference: str) -> dict[str, Any]:
    """The overrides of a system's widths that bring its multiply-adds nearest to the reference's.

    Raises:
        UserError: the system has no widths to scale, or none of them comes near.
    """
    if name == reference:
        return {}
    system = zoo.get(name)
    kind = zoo.network_class(system.architecture)
    if not kind.width_settings:
        raise UserError(f'--match: {name} has no widths that could be scaled; leave it out')
    target = multiply_adds(reference, MATCH_SIZE, MATCH_SIZE)
    nearest, best = math.inf, {}
    for width in range(NARROWEST, WIDEST + 1):
        overrides = kind.scaled_widths(system.settings, width)
        ratio = spent(name, overrides) / target
        distance = abs(math.log(ratio))
        if distance < nearest:
            nearest, best = distance, overrides
        if 1 < ratio < math.inf:
            break
    if nearest > math.log(FARTHEST):
        raise UserError(
            f'--match: no width of {name} comes near the {target / 1e9:.1f} G multiply-adds of {reference}; '
            'leave it out'
        )
    return best


def spent(name: str, overrides: dict[str, Any]) -> float:
    """Multiply-adds of a system with these widths; infinite where they make no network."""
    torch_says = logging.getLogger('torch._subclasses.fake_tensor')  # a traceback for each such width
    before, torch_says.disabled = torch_says.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings('error', 'Initializing zero-element')  # a layer without channels
            return multiply_adds(name, MATCH_SIZE, MATCH_SIZE, **overrides)
    except (UserError, UserWarning, RuntimeError, ValueError, ZeroDivisionError):
        return math.inf
    finally:
        torch_says.disabled = before


COLUMNS = {
    'model': 'system', 'width': 'width', 'parameters': 'parameters', 'macs': 'multiply-adds at 256×256',
    'psnr': 'PSNR', 'gain': 'gain', 'ssim': 'SSIM', 'iterations': 'iterations', 'seconds': 'seconds',
}  # fmt: skip


def cells(record: records.Record) -> list[dict[str, str | None]]:
    """The table's rows as text, one a system: means over the seeds, and their spread."""
    blurred = record.extra['blurred']
    lines = []
    for name in record.settings['models']:
        runs = [row for row in record.rows if row['model'] == name]
        if not runs:
            continue
        first = runs[0]
        line = {
            'model': name,
            'width': ', '.join(f'{k} {width_text(v)}' for k, v in first['scaled'].items()) or 'as published',
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
    return [nothing, *lines]


def table(record: records.Record) -> str:
    """All systems as a Markdown table."""
    return records.markdown_table(COLUMNS, cells(record))


def width_text(value: int | Sequence[int]) -> str:
    """A number of channels, or one for each level."""
    return str(value) if isinstance(value, int) else '-'.join(map(str, value))


def note(record: records.Record) -> str:
    """What a reader of the table has to know."""
    budget = record.settings['iterations']
    text = f'{budget} iterations' if budget else f'{record.settings["seconds"]} seconds'
    seeds = record.settings['seeds']
    return (
        f'{text} for each system, {seeds} seed{"s" if seeds > 1 else ""}; in brackets, smallest to largest.'
    )


def title(record: records.Record) -> str:
    """What was measured, as a heading."""
    return f'Training at equal cost: {record.settings["data"]}'


def page(record: records.Record) -> str:
    """The Markdown page of a run."""
    return records.markdown_page(title(record), record, [note(record), table(record)])


AXES = {'iteration': 'iterations', 'seconds': 'seconds of training'}
"""What PSNR is drawn against, by key of a curve's points."""


def plot(axis: Axes, record: records.Record, key: str) -> None:
    """PSNR against `key` of `AXES`, the mean over seeds; the band is from the lowest to the highest."""
    for name in record.settings['models']:
        curves = [row['curve'] for row in record.rows if row['model'] == name and 'curve' in row]
        points = list(zip(*curves, strict=False))
        if not points:
            continue
        x = [statistics.mean(point[key] for point in seeds) for seeds in points]
        psnr = [[point['psnr'] for point in seeds] for seeds in points]
        (line,) = axis.plot(x, [statistics.mean(v) for v in psnr], marker='o', markersize=3, label=name)
        axis.fill_between(
            x, [min(v) for v in psnr], [max(v) for v in psnr], color=line.get_color(), alpha=0.15
        )
    axis.axhline(record.extra['blurred']['psnr'], color='grey', linestyle=':', label='blurred')
    axis.set(xlabel=AXES[key], ylabel='PSNR on held-out images, dB')
    axis.legend(frameon=False, fontsize='small', ncols=3, loc='lower left', bbox_to_anchor=(0, 1))
    axis.grid(alpha=0.3)
    axis.spines[['top', 'right']].set_visible(False)


def draw(record: records.Record, path: Path) -> None:
    """The figure of a run."""
    figure, axes = records.canvas(11, 4.5, columns=len(AXES))
    for axis, key in zip(axes, AXES, strict=True):
        plot(axis, record, key)
    records.save_figure(figure, path)
