"""Latency, throughput, memory and MACs of the systems.

All systems of a run are in one process and are measured alternately, A B C A B C,
so that a change of the machine's speed affects all of them; compare the ratios to
the first system.  Inputs are random and the weights are the initial ones: the work
of these networks depends on neither.
"""

from __future__ import annotations

import contextlib
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dsgformer_arch import zoo
from dsgformer_arch.benchmark import record as records
from dsgformer_arch.benchmark.measure import machine
from dsgformer_arch.benchmark.measure import roofline as roofs
from dsgformer_arch.benchmark.measure.complexity import count
from dsgformer_arch.cuda_graphs import CudaGraphs
from dsgformer_arch.ops import block
from dsgformer_arch.restore import PRECISIONS, final_output, predict, restore, set_memory_format
from dsgformer_arch.utils.allocator import keep_freed_memory
from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.progress import track

PROTOCOL = """\
Latency: median over {rounds} turns, each of which measures every system once, after one untimed call; \
spread is (largest - smallest) / median. The clock covers a whole call on data that is already on the device \
{clock}. MACs: the whole forward pass at the given size, products of attention and FFTs included. \
Memory: {memory}. Freed memory is {freed}. Ratios are to {first}."""

SWEEP = (128, 192, 256, 384, 512, 768)
"""Sides of the square images of `--scaling`."""

SECONDS_A_TURN = 0.25
"""A round repeats a fast system until it has run this long, because of the clock's resolution."""

LARGEST_NORM = 0.1
"""Max gradient norm of a training step; it does not affect the time."""


@dataclass(frozen=True)
class Variant:
    """One way to run one system."""

    model: str
    height: int
    width: int
    precision: str = 'fp32'
    channels_last: bool = False
    compiled: bool = False
    cuda_graph: bool = False

    def key(self) -> dict[str, Any]:
        """The keys of its row."""
        return {
            'model': self.model,
            'size': f'{self.height}x{self.width}',
            'precision': self.precision,
            'channels_last': self.channels_last,
            'compile': self.compiled,
            'cuda_graph': self.cuda_graph,
        }


def run(
    models: Sequence[str],
    size: Sequence[tuple[int, int]] | None = None,
    device: str = 'cpu',
    precision: str = 'fp32',
    compile: bool = False,
    channels_last: bool = False,
    batch: int = 1,
    train: bool = False,
    best: bool = False,
    scaling: bool = False,
    rounds: int = 5,
    no_memory: bool = False,
    keep_memory: bool = False,
    cuda_graphs: bool = False,
    roofline: bool = False,
    out: Path = Path('results/benchmark/speed'),
    resume: bool = False,
) -> records.Record:
    """Measure and write `out`.json.

    Args:
        models: names of the zoo; ratios are to the first.
        size: (height, width) of the images.
        device: a torch device.
        precision: `fp32`, or `bf16` or `fp16` for autocast.
        compile: `torch.compile` each network.
        channels_last: memory format of images and kernels.
        batch: images at once.
        train: a training step, see `training_step`, instead of restoring.
        best: for each system, every precision up to `precision` with each memory format; the fastest counts.
        scaling: sweep square sizes instead of `size` and fit the growth.
        rounds: rounds over the systems.
        no_memory: do not measure peak memory.
        keep_memory: on a CPU, let the process keep freed memory for its next tensors, see `allocator`.
        cuda_graphs: replay each system's kernels as a CUDA graph; with `best`, try that too.
        roofline: measure the limits of the device, and compare.
        out: results without their ending.
        resume: keep the rows that `out`.json has.

    Returns:
        The record; rows that could not be measured have an `error`.
    """
    target = machine.device(device)
    sizes = [(side, side) for side in SWEEP] if scaling else list(size or [(256, 256)])
    forced = block.path()
    settings = {
        'models': list(models), 'sizes': sizes, 'device': device, 'precision': precision, 'compile': compile,
        'channels_last': channels_last, 'batch': batch, 'train': train, 'best': best, 'rounds': rounds,
        'keep_memory': keep_memory, 'cuda_graphs': cuda_graphs, 'roofline': roofline,
        'threads': torch.get_num_threads(),
        **({'implementation': forced} if forced != 'fast' else {}),
    }  # fmt: skip
    if cuda_graphs and (target.type != 'cuda' or train):
        raise UserError('--cuda-graphs is for restoring with --device cuda; leave it out')
    path = records.beside(out, '.json')
    if keep_memory and not keep_freed_memory():
        raise UserError('--keep-memory needs glibc, the C library of most Linux systems; leave it out')
    protocol = describe(device, rounds, models[0], keep_memory)
    record = records.start('speed', settings, protocol, path, resume)
    if forced != 'fast' and not record.rows:
        record.command = f'DSGFORMER_{forced.upper()}=1 {record.command}'
    for height, width in sizes:
        variants = expand(models, height, width, precision, channels_last, compile, best, cuda_graphs)
        todo = [variant for variant in variants if record.find(**variant.key()) is None]
        if todo:
            record.rows += measure(todo, target, batch, train, rounds, not no_memory, keep_memory)
            record.save(path)
    if roofline:
        compare(record, target, batch, train)
    if scaling:
        record.extra['growth'] = {name: growth(record.rows, name) for name in models}
    record.save(path)
    return record


def expand(
    models: Sequence[str],
    height: int,
    width: int,
    precision: str,
    channels_last: bool,
    compiled: bool,
    best: bool,
    cuda_graphs: bool = False,
) -> list[Variant]:
    """The variants to measure at one size."""
    if not best:
        one = (height, width, precision, channels_last, compiled, cuda_graphs)
        return [Variant(name, *one) for name in models]
    precisions = dict.fromkeys(['fp32', precision])
    return [
        Variant(name, height, width, kind, order, built, graph)
        for name in models
        for kind in precisions
        for order in (False, True)
        for built in dict.fromkeys([False, compiled])
        for graph in dict.fromkeys([False, cuda_graphs])
    ]


def measure(
    variants: Sequence[Variant],
    device: torch.device,
    batch: int,
    train: bool,
    rounds: int,
    memory: bool,
    keep_memory: bool = False,
) -> list[dict[str, Any]]:
    """One row per variant; those that fail have an `error` and no times."""
    rows: list[dict[str, Any]] = [variant.key() for variant in variants]
    networks: dict[tuple[str, bool], nn.Module] = {}
    calls: dict[int, Callable[[], None]] = {}
    for i, variant in enumerate(track(variants, 'preparing')):
        with attempt(rows[i], device):
            rows[i] |= facts(variant)
            alone = train or variant.compiled or variant.cuda_graph
            key = variant.model, variant.channels_last
            network = None if alone else networks.get(key)
            if network is None:
                network = set_memory_format(zoo.create(variant.model).to(device), memory_format(variant))
            if not alone:
                networks[key] = network
            call = prepare(network, variant, device, batch, train)
            started = time.perf_counter()
            call()  # set-up, compilation and caches of the first call
            machine.wait(device)
            rows[i]['first_call_ms'] = 1e3 * (time.perf_counter() - started)
            calls[i] = call
        machine.release(device)
    times: dict[int, list[float]] = {i: [] for i in calls}
    for _, i in track([(turn, i) for turn in range(rounds) for i in calls], 'measuring'):
        if 'error' not in rows[i]:
            with attempt(rows[i], device):
                times[i].append(clock(calls[i], device))
    for i, values in times.items():
        if len(values) < rounds:
            continue
        pixels = batch * variants[i].height * variants[i].width
        rows[i] |= {**summary(values), 'megapixels_per_second': pixels / statistics.median(values) / 1e6}
    calls.clear()
    networks.clear()
    machine.release(device)
    if memory:
        for variant, row in track(list(zip(variants, rows, strict=True)), 'measuring memory'):
            if not row.get('error'):
                row |= peak_memory(variant, device, batch, train, keep_memory)
    return rows


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median and spread of the times of equal calls, as rows hold them."""
    median = statistics.median(seconds)
    return {'latency_ms': 1e3 * median, 'spread': (max(seconds) - min(seconds)) / median}


def facts(variant: Variant) -> dict[str, Any]:
    """The costs of a variant that are independent of the machine."""
    macs = count(variant.model, variant.height, variant.width)
    return {
        'parameters': zoo.get(variant.model).parameters, 'multiply_adds': macs.total, **asdict(macs)
    }  # fmt: skip


@contextlib.contextmanager
def attempt(row: dict[str, Any], device: torch.device) -> Iterator[None]:
    """Write a failure inside into the row's `error`: one system that fails does not stop the others."""
    try:
        with machine.bounded(device):
            yield
    except Exception as error:  # networks of any kind, on any device
        row['error'] = machine.reason(error)


def prepare(
    network: nn.Module, variant: Variant, device: torch.device, batch: int, train: bool
) -> Callable[[], None]:
    """The function that is timed: one restoration or training step, without arguments.

    The network's weights already are in the variant's memory format.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (batch, 3, variant.height, variant.width)
    image = torch.rand(shape, generator=generator).to(device).contiguous(memory_format=memory_format(variant))
    if train:
        return training_step(network, image, variant)
    target = compiled(network) if variant.compiled else network
    if variant.cuda_graph:
        graphs = CudaGraphs(target, variant.precision)

        def replayed_call() -> None:
            graphs(image)

        return replayed_call

    def call() -> None:
        restore(target, image, precision=variant.precision)

    return call


def memory_format(variant: Variant) -> torch.memory_format:
    """The memory format of a variant's images and weights."""
    return torch.channels_last if variant.channels_last else torch.contiguous_format


def compiled(network: nn.Module) -> nn.Module:
    """The network through `torch.compile`."""
    return cast(nn.Module, torch.compile(network))


def training_step(network: nn.Module, image: Tensor, variant: Variant) -> Callable[[], None]:
    """A full step: forward, L1 loss, backward, clipping of the gradient's norm, AdamW."""
    network.train()
    offset = getattr(network, 'input_offset', 0.0)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4, fused=True)
    target = compiled(network) if variant.compiled else network
    dtype = PRECISIONS[variant.precision]
    half = dtype is not torch.float32

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(image.device.type, dtype if half else torch.bfloat16, enabled=half):
            output = final_output(network, predict(target, image, offset))
        nn.functional.l1_loss(output.float(), image).backward()
        nn.utils.clip_grad_norm_(network.parameters(), LARGEST_NORM)
        optimizer.step()

    return call


def compare(record: records.Record, device: torch.device, batch: int, train: bool) -> None:
    """Add to each row the least time that the measured ceilings of the device allow.

    A training step is three times the work of restoring: each product of the forward pass has two in the
    backward pass.
    """
    if all('floor_ms' in row for row in record.rows):
        return  # a resumed run that was complete
    rates = roofs.measure(device, sorted({row['precision'] for row in record.rows}))
    record.extra['rates'] = {kind: asdict(rate) for kind, rate in rates.items()}
    times = batch * (3 if train else 1)
    for row in record.rows:
        height, width = map(int, row['size'].split('x'))
        traffic = roofs.least_traffic(row['model'], height, width, row['precision'])
        rate = rates[row['precision']]
        row['floor_ms'] = 1e3 * rate.floor(times * row['multiply_adds'], times * traffic)


def clock(call: Callable[[], None], device: torch.device) -> float:
    """Seconds of one call, the mean over as many as fit in `SECONDS_A_TURN`."""
    count = 0
    if device.type == 'cuda':
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        begun = time.perf_counter()
        start.record()
        while not count or time.perf_counter() - begun < SECONDS_A_TURN:
            call()
            count += 1
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3 / count
    begun = time.perf_counter()
    while not count or time.perf_counter() - begun < SECONDS_A_TURN:
        call()
        count += 1
    return (time.perf_counter() - begun) / count


# Peak memory: on a CPU it needs a separate process.


def peak_memory(
    variant: Variant, device: torch.device, batch: int, train: bool, keep_memory: bool = False
) -> dict[str, Any]:
    """`peak_memory_mib` of one call, measured in a new process."""
    task = {**variant.__dict__, 'device': str(device), 'batch': batch, 'train': train}
    task |= {'threads': torch.get_num_threads(), 'keep_memory': keep_memory}
    done = subprocess.run(
        [sys.executable, '-m', 'dsgformer_arch.benchmark.measure.speed', json.dumps(task)],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode < 0 or not done.stdout.strip():
        return {
            'peak_memory_mib': None,
            'memory_note': 'ended by the system' if done.returncode < 0 else 'failed',
        }
    return json.loads(done.stdout.splitlines()[-1])


def peak_memory_here(task: dict[str, Any]) -> dict[str, Any]:
    """Run one call and report this process's peak; `task` is what `peak_memory` sends."""
    device, batch, train = torch.device(task.pop('device')), task.pop('batch'), task.pop('train')
    torch.set_num_threads(task.pop('threads'))
    if task.pop('keep_memory'):
        keep_freed_memory()
    variant = Variant(**task)
    row: dict[str, Any] = {}
    with attempt(row, device):
        network = set_memory_format(zoo.create(variant.model).to(device), memory_format(variant))
        call = prepare(network, variant, device, batch, train)
        for _ in range(2 if train else 1):  # the optimiser creates its state in the first step
            call()
    if row:
        return {'peak_memory_mib': None, 'memory_note': row['error']}
    if device.type == 'cuda':
        return {'peak_memory_mib': torch.cuda.max_memory_allocated(device) / 2**20}
    return {'peak_memory_mib': resident_peak_mib()}


def resident_peak_mib() -> float:
    """The largest resident size of this process.

    Linux counts a parent's peak into `ru_maxrss` of what it starts, so the process's own record is read.
    """
    try:
        status = Path('/proc/self/status').read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith('VmHWM')) / 2**10
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def memory_protocol(on_gpu: bool) -> str:
    """How `peak_memory` measures, in words."""
    return "the allocator's peak" if on_gpu else 'resident peak of a process that makes one call'


def describe(device: str, rounds: int, first: str, keep_memory: bool = False) -> str:
    on_gpu = device.startswith('cuda')
    clock_text = '(CUDA events)' if on_gpu else "(the processor's clock)"
    memory = memory_protocol(on_gpu)
    freed = 'kept for the next tensors' if keep_memory or on_gpu else 'left to the C library'
    return PROTOCOL.format(rounds=rounds, first=first, clock=clock_text, memory=memory, freed=freed)


def growth(rows: Sequence[dict[str, Any]], name: str) -> dict[str, float]:
    """Exponents of time and memory over pixels: 1 is linear.  Least squares on logarithms."""
    fits = {}
    for quantity in ('latency_ms', 'peak_memory_mib'):
        points = [
            (math.log(pixels(row)), math.log(row[quantity]))
            for row in rows
            if row['model'] == name and row.get(quantity)
        ]
        if len(points) > 1:
            fits[quantity] = statistics.linear_regression(*zip(*points, strict=True)).slope
    return fits


def pixels(row: dict[str, Any]) -> int:
    """Pixels of a row's image."""
    return math.prod(map(int, row['size'].split('x')))


if __name__ == '__main__':
    print(json.dumps(peak_memory_here(json.loads(sys.argv[1]))))
