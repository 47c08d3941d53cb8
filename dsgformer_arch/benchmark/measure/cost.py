"""What systems cost at the size of the efficient deblurring challenges, and whether they keep the limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from dsgformer_arch import zoo
from dsgformer_arch.archs.layers.padding import padded_size
from dsgformer_arch.benchmark import record as records
from dsgformer_arch.benchmark.challenge import HEIGHT, MOST_MACS, MOST_PARAMETERS, WIDTH
from dsgformer_arch.benchmark.measure import machine, speed
from dsgformer_arch.benchmark.measure.complexity import multiply_adds
from dsgformer_arch.utils.progress import track

PROTOCOL = """\
Parameters: all that are trained. MACs: counted from the operators that restoring one image of \
{width}×{height} (width×height) in evaluation mode runs, padding included: convolutions; matrix products, \
which are linear layers and both products of every attention; and Fourier transforms, 5 N log2 N operations \
for N complex numbers, half of that for real ones, two operations to a MAC. Element-wise operations, norms, \
pooling and interpolation are not counted. DSGformer is counted in its reference implementation, whose \
filters are Fourier transforms. {ran}"""

RAN = """\
Latency: median of {rounds} calls after an untimed one, on data that is already on the device; spread is \
(largest - smallest) / median. Memory: {memory}. A system whose call takes longer than {limit} s, as \
expected from its time for a small image and the MACs of both sizes, is not run."""

NOT_RUN = 'Nothing was run: there is neither latency nor peak memory.'

LIMIT = 120
"""Seconds that one call may take; a system is called `rounds` + 2 times."""

SMALL = 64
"""About the side in pixels of the image from whose time that of the whole one is expected."""


def run(
    models: Sequence[str],
    size: tuple[int, int] = (HEIGHT, WIDTH),
    device: str = 'cpu',
    precision: str = 'fp32',
    rounds: int = 3,
    no_latency: bool = False,
    limit: int = LIMIT,
    out: Path = Path('results/benchmark/cost'),
    resume: bool = False,
) -> records.Record:
    """Count, and by default measure, every system; write `out`.json.

    Args:
        models: names of the zoo.
        size: (height, width) of the image.
        device: a torch device.
        precision: `fp32`, or `bf16` or `fp16` for autocast; of latency and memory.
        rounds: calls that are timed.
        no_latency: count alone, without running the systems for latency and peak memory.
        limit: seconds that one call may take; systems that are expected to take longer are not run.
        out: results without their ending.
        resume: keep the rows that `out`.json has.

    Returns:
        The record; `within` of a row is whether it keeps both limits, None at another size than the
        challenges'; rows that could not be measured have an `error`, those that were not run a `not_run`.
        It is saved after each system.
    """
    target = machine.device(device)
    height, width = size
    settings = {
        'models': list(models), 'size': list(size), 'device': device, 'precision': precision,
        'rounds': rounds, 'no_latency': no_latency, 'limit': limit, 'threads': torch.get_num_threads(),
    }  # fmt: skip
    memory = speed.memory_protocol(target.type == 'cuda')
    ran = NOT_RUN if no_latency else RAN.format(rounds=rounds, memory=memory, limit=limit)
    protocol = PROTOCOL.format(width=width, height=height, ran=ran)
    path = records.beside(out, '.json')
    record = records.start('cost', settings, protocol, path, resume)
    record.drop_failed()
    missing = [name for name in models if record.find(model=name) is None]
    order = {name: i for i, name in enumerate(models)}
    for name in track(missing, 'counting' if no_latency else 'measuring'):
        variant = speed.Variant(name, height, width, precision)
        row = variant.key()
        with speed.attempt(row, target):
            row |= speed.facts(variant)
            if not no_latency:
                row |= measured(variant, target, rounds, limit, row['multiply_adds'])
        row['within'] = within(row) if {*size} == {HEIGHT, WIDTH} else None
        record.rows = sorted([*record.rows, row], key=lambda row: order[row['model']])
        record.save(path)
    record.save(path)
    return record


def measured(
    variant: speed.Variant, device: torch.device, rounds: int, limit: int, macs: int
) -> dict[str, Any]:
    """Latency and peak memory of a system, or why it was not run.

    Args:
        variant: the system, the size and the precision.
        device: where it runs.
        rounds: calls that are timed.
        limit: see `run`.
        macs: of one call.
    """
    network: Any = zoo.create(variant.model).to(device)
    side = padded_size(SMALL, network.pad_multiple, network.min_size)
    small = replace(variant, height=side, width=side)
    if side**2 < variant.height * variant.width:
        seconds = timed(network, small, device, 1)[0] * macs / multiply_adds(variant.model, side)
        if seconds > limit:
            about = timedelta(seconds=round(seconds))
            return {'not_run': f'not run: a call takes about {about} (--limit {limit})'}
    times = timed(network, variant, device, rounds)
    del network
    machine.release(device)
    return {**speed.summary(times), **speed.peak_memory(variant, device, 1, False)}


def timed(network: Any, variant: speed.Variant, device: torch.device, rounds: int) -> list[float]:
    """Seconds of each call after an untimed one."""
    call = speed.prepare(network, variant, device, 1, False)
    call()
    machine.wait(device)
    return [speed.clock(call, device) for _ in range(rounds)]


def within(row: dict[str, Any]) -> bool | None:
    """Does a system keep both limits of the challenges?  None where its MACs could not be counted."""
    if 'multiply_adds' not in row:
        return None
    return bool(row['parameters'] <= MOST_PARAMETERS and row['multiply_adds'] <= MOST_MACS)
