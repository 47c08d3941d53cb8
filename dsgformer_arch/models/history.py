"""The history of a training run: losses and metrics as JSON lines, curves, and a summary.

Each line of `history.jsonl` in the experiment's folder is a JSON object of an
iteration (losses, learning rate, speed) or of a validation (metrics).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from filelock import FileLock, Timeout

from dsgformer_arch.models.checkpointing import newest_states
from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.files import write_atomically

FILE = 'history.jsonl'

Entry = dict[str, Any]


class History:
    """The file `history.jsonl` of a run.

    Args:
        folder: folder of the experiment.
        start: iteration from which the run continues.  Entries of later iterations are dropped, as these are
            repeated, and so is a validation at `start`.
    """

    def __init__(self, folder: str, start: int = 0) -> None:
        self.path = os.path.join(folder, FILE)
        kept = [
            entry
            for entry in read(folder)
            if entry['iteration'] < start or (entry['iteration'] == start and 'metrics' not in entry)
        ]

        def write(temporary: str) -> None:
            with open(temporary, 'w', encoding='utf-8') as file:
                file.writelines(json.dumps(entry) + '\n' for entry in kept)

        write_atomically(write, self.path)

    def add(self, entry: Entry) -> None:
        """Append an entry, which has at least the key `iteration`."""
        with open(self.path, 'a', encoding='utf-8') as file:
            file.write(json.dumps(entry) + '\n')


def read(folder: str) -> list[Entry]:
    """The entries of a run's history; incomplete lines of a killed process are skipped."""
    entries = []
    try:
        with open(os.path.join(folder, FILE), encoding='utf-8') as file:
            for line in file:
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue
                if isinstance(entry, dict) and isinstance(entry.get('iteration'), int):
                    entries.append(entry)
    except FileNotFoundError:
        pass
    return entries


def draw_curves(folder: str) -> bool:
    """Draw losses, learning rate and metrics by iteration to `curves.png`.

    Returns:
        Whether it was drawn: matplotlib is an optional requirement (`pip install dsgformer[benchmark]`).
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    entries = read(folder)
    steps = [entry for entry in entries if 'losses' in entry]
    validations = [entry for entry in entries if 'metrics' in entry]
    metrics = sorted({f'{entry["dataset"]} {name}' for entry in validations for name in entry['metrics']})
    figure = Figure(figsize=(7, 2.4 * (2 + len(metrics))), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots(2 + len(metrics), 1, sharex=True, squeeze=False)[:, 0]
    for name in sorted({name for entry in steps for name in entry['losses']}):
        points = [(entry['iteration'], entry['losses'][name]) for entry in steps if entry['losses'].get(name)]
        if points:
            axes[0].plot(*zip(*points, strict=True), label=name)
    if axes[0].lines:
        axes[0].set_yscale('log')
        axes[0].legend()
    axes[0].set_ylabel('loss')
    axes[1].plot([entry['iteration'] for entry in steps], [entry['lr'] for entry in steps])
    axes[1].set_ylabel('learning rate')
    for axis, title in zip(axes[2:], metrics, strict=True):
        dataset, name = title.rsplit(' ', 1)
        points = [
            (entry['iteration'], entry['metrics'][name])
            for entry in validations
            if entry['dataset'] == dataset and entry['metrics'].get(name) is not None
        ]
        if points:
            axis.plot(*zip(*points, strict=True), marker='.')
        axis.set_ylabel(title)
    axes[-1].set_xlabel('iteration')
    write_atomically(
        lambda temporary: figure.savefig(temporary, format='png', dpi=110), os.path.join(folder, 'curves.png')
    )
    return True


def is_running(folder: str) -> bool:
    """Whether a process holds the lock of the run in a folder."""
    path = lock_path(folder)
    if not os.path.exists(path):
        return False
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


def lock_path(folder: str) -> str:
    """The lock file of a run: next to its folder, which is renamed when a new run of that name starts."""
    parent, name = os.path.split(os.path.abspath(folder))
    return os.path.join(parent, f'.{name}.lock')


def summary(folder: str) -> str:
    """The output of `basicsr status` for an experiment.

    Raises:
        UserError: the folder holds no training run.
    """
    if not os.path.isdir(os.path.join(folder, 'training_states')):
        raise UserError(f'{folder} holds no training run; give a folder below experiments/')
    return '\n'.join(_summary(folder, read(folder)))


def _summary(folder: str, entries: list[Entry]) -> Iterable[str]:
    running = is_running(folder)
    steps = [entry for entry in entries if 'losses' in entry]
    name = os.path.basename(os.path.abspath(folder))
    if not steps:
        yield f'{name}: {"running" if running else "not running"}, nothing logged yet'
    else:
        last = steps[-1]
        total = last['total']
        state = 'running' if running else 'finished' if last['iteration'] >= total else 'stopped'
        yield f'{name}: {state} at iteration {last["iteration"]:,d} of {total:,d}'
        values = [
            (key, 'not finite' if value is None else f'{value:.4g}') for key, value in last['losses'].items()
        ]
        losses = ', '.join(f'{key} {value}' for key, value in values)
        yield f'  {losses}, learning rate {last["lr"]:.3g}, {last["skipped"]} steps skipped'
        yield (
            f'  {last["images_per_second"]:.1f} images/s, waited {last["data_wait"] * 1000:.0f} ms for data, '
            f'{last["memory_gb"]:.2f} GB'
        )
        if running:
            yield f'  {timedelta(seconds=round(last["seconds_left"]))} left'
    latest = {entry['dataset']: entry for entry in entries if 'metrics' in entry}
    for dataset, entry in latest.items():
        for metric, value in entry['metrics'].items():
            best = entry['best'].get(metric) or {}
            shown = 'not finite' if value is None else f'{value:.4f}'
            yield (
                f'  {dataset}: {metric} {shown} at {entry["iteration"]:,d}, '
                f'best {best.get("val", float("nan")):.4f} at {best.get("iter", -1):,d}'
            )
    states = newest_states(os.path.join(folder, 'training_states'))
    yield f'  {len(states)} checkpoints' + (f', the newest {os.path.basename(states[0])}' if states else '')
