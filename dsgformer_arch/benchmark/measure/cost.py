"""What systems cost at the size of the efficient deblurring challenges, and whether they keep the limits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dsgformer_arch.benchmark import record as records
from dsgformer_arch.benchmark.challenge import HEIGHT, MOST_MACS, MOST_PARAMETERS, WIDTH
from dsgformer_arch.benchmark.measure import machine, speed
from dsgformer_arch.utils.progress import track

PROTOCOL = """\
Parameters: all that are trained. MACs: counted from the operators that restoring one image of \
{width}×{height} (width×height) in evaluation mode runs, padding included: convolutions; matrix products, \
which are linear layers and both products of every attention; and Fourier transforms, 5 N log2 N operations \
for N complex numbers, half of that for real ones, two operations to a MAC. Element-wise operations, norms, \
pooling and interpolation are not counted. DSGformer is counted in its reference implementation, whose \
filters are Fourier transforms. {ran}"""

NOT_RUN = 'Nothing was run: there is neither latency nor peak memory.'


def run(
    models: Sequence[str],
    size: tuple[int, int] = (HEIGHT, WIDTH),
    device: str = 'cpu',
    precision: str = 'fp32',
    rounds: int = 3,
    no_latency: bool = False,
    out: Path = Path('results/benchmark/cost'),
    resume: bool = False,
) -> records.Record:
    """Count, and by default measure, every system; write `out`.json.

    Args:
        models: names of the zoo.
        size: (height, width) of the image.
        device: a torch device.
        precision: `fp32`, or `bf16` or `fp16` for autocast; of latency and memory.
        rounds: turns of the latency, see `speed`.
        no_latency: count alone, without running the systems for latency and peak memory.
        out: results without their ending.
        resume: keep the rows that `out`.json has.

    Returns:
        The record; `within` of a row is whether it keeps both limits, None at another size than the
        challenges'; rows that could not be measured have an `error`.
    """
    target = machine.device(device)
    height, width = size
    settings = {
        'models': list(models), 'size': list(size), 'device': device, 'precision': precision,
        'rounds': rounds, 'no_latency': no_latency, 'threads': torch.get_num_threads(),
    }  # fmt: skip
    ran = NOT_RUN if no_latency else speed.describe(device, rounds, models[0])
    protocol = PROTOCOL.format(width=width, height=height, ran=ran)
    path = records.beside(out, '.json')
    record = records.start('cost', settings, protocol, path, resume)
    record.drop_failed()
    missing = [name for name in models if record.find(model=name) is None]
    variants = [speed.Variant(name, height, width, precision) for name in missing]
    if no_latency:
        rows: list[dict[str, Any]] = []
        for variant in track(variants, 'counting'):
            row = variant.key()
            with speed.attempt(row, target):
                row |= speed.facts(variant)
            rows.append(row)
    else:
        rows = speed.measure(variants, target, 1, False, rounds, True)
    for row in rows:
        row['within'] = within(row) if {*size} == {HEIGHT, WIDTH} else None
    order = {name: i for i, name in enumerate(models)}
    record.rows = sorted([*record.rows, *rows], key=lambda row: order[row['model']])
    record.save(path)
    return record


def within(row: dict[str, Any]) -> bool | None:
    """Does a system keep both limits of the challenges?  None where its MACs could not be counted."""
    if 'multiply_adds' not in row:
        return None
    return bool(row['parameters'] <= MOST_PARAMETERS and row['multiply_adds'] <= MOST_MACS)
