"""How fast a system is and what it costs: latency, throughput, memory, multiply-adds.

All systems of a run live in one process and are measured in turn, A B C A B C,
so that a machine that slows down slows all of them; ratios to the first system
are what to compare.  Inputs are random numbers, the weights are the initial
ones: neither changes the work that these networks do.
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
from matplotlib.axes import Axes
from torch import Tensor, nn

from dsgformer_arch import zoo
from dsgformer_arch.benchmark import record as records
from dsgformer_arch.benchmark.measure import machine
from dsgformer_arch.benchmark.measure import roofline as roofs
from dsgformer_arch.benchmark.measure.complexity import multiply_adds
from dsgformer_arch.cuda_graphs import CudaGraphs
from dsgformer_arch.restore import PRECISIONS, final_output, order_memory, predict, restore
from dsgformer_arch.utils.allocator import keep_freed_memory
from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.progress import track

PROTOCOL = """\
Latency: median over {rounds} turns, each of which measures every system once, after one untimed call; \
spread is (largest - smallest) / median. The clock covers a whole call on data that is already on the device \
{clock}. Multiply-adds: the whole forward pass at the given size, products of attention and FFTs included. \
Memory: {memory}. Freed memory is {freed}. Ratios are to {first}."""

ROOFLINE = """\
The roofline is the larger of two times: two operations for each multiply-add at the rate of the \
product, and, for DSGformer, two reads of X and one write of Y for each block at the rate of the copy."""

SWEEP = (128, 192, 256, 384, 512, 768)
"""Sides of the square images of `--scaling`."""

SECONDS_A_TURN = 0.25
"""A turn repeats a fast system until it has run this long, so that the clock's grain does not count."""


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
        """What identifies its row."""
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
) -> int:
    """Measure, print, and write `out`.json, `out`.md and `out`.png.

    Args:
        models: names of the zoo; ratios are to the first.
        size: (height, width) of the images.
        device: a torch device.
        precision: `fp32`, or `bf16` or `fp16` for autocast.
        compile: `torch.compile` each network.
        channels_last: memory order of images and kernels.
        batch: images at once.
        train: a forward, backward and AdamW step instead of restoring.
        best: for each system, every precision up to `precision` with each memory order; the fastest counts.
        scaling: sweep square sizes instead of `size` and fit the growth.
        rounds: turns.
        no_memory: leave peak memory out.
        keep_memory: on a CPU, let the process keep freed memory for its next tensors, see `allocator`.
        cuda_graphs: replay each system's kernels as a CUDA graph; with `best`, try that too.
        roofline: measure what the device can do at best, and compare.
        out: results without their ending.
        resume: keep the rows that `out`.json has.

    Returns:
        0, or 1 if a system could not be measured.
    """
    target = machine.device(device)
    sizes = [(side, side) for side in SWEEP] if scaling else list(size or [(256, 256)])
    settings = {
        'models': list(models), 'sizes': sizes, 'device': device, 'precision': precision, 'compile': compile,
        'channels_last': channels_last, 'batch': batch, 'train': train, 'best': best, 'rounds': rounds,
        'keep_memory': keep_memory, 'cuda_graphs': cuda_graphs, 'roofline': roofline,
        'threads': torch.get_num_threads(),
    }  # fmt: skip
    if cuda_graphs and (target.type != 'cuda' or train):
        raise UserError('--cuda-graphs is for restoring with --device cuda; leave it out')
    path = records.beside(out, '.json')
    if keep_memory and not keep_freed_memory():
        raise UserError('--keep-memory needs glibc, as most Linux systems have it; leave it out')
    protocol = describe(device, rounds, models[0], keep_memory)
    record = records.start('speed', settings, protocol, path, resume)
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
    records.write_text(records.beside(out, '.md'), page(record))
    draw(record, records.beside(out, '.png'))
    print(table(record))
    print(f'wrote {path}, {records.beside(out, ".md")} and {records.beside(out, ".png")}', file=sys.stderr)
    return int(any(row.get('error') for row in record.rows))


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
    """One row for each variant; what fails has an `error` and no times."""
    rows: list[dict[str, Any]] = [{**variant.key(), **facts(variant)} for variant in variants]
    networks: dict[str, nn.Module] = {}
    calls: dict[int, Callable[[], None]] = {}
    for i, variant in enumerate(track(variants, 'preparing')):
        with attempt(rows[i], device):
            alone = train or variant.compiled or variant.cuda_graph
            network = None if alone else networks.get(variant.model)
            if network is None:
                network = zoo.create(variant.model).to(device)
            if not alone:
                networks[variant.model] = network
            call = prepare(network, variant, device, batch, train)
            started = time.perf_counter()
            call()  # what is set up, compiled or cached at the first call
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
        median = statistics.median(values)
        pixels = batch * variants[i].height * variants[i].width
        rows[i] |= {
            'latency_ms': 1e3 * median,
            'spread': (max(values) - min(values)) / median,
            'megapixels_per_second': pixels / median / 1e6,
        }
    calls.clear()
    networks.clear()
    machine.release(device)
    if memory:
        for variant, row in track(list(zip(variants, rows, strict=True)), 'measuring memory'):
            if not row.get('error'):
                row |= peak_memory(variant, device, batch, train, keep_memory)
    return rows


def facts(variant: Variant) -> dict[str, Any]:
    """What a variant costs by count, whatever the machine."""
    macs = multiply_adds(variant.model, variant.height, variant.width)
    return {'parameters': zoo.get(variant.model).parameters, 'multiply_adds': macs}


@contextlib.contextmanager
def attempt(row: dict[str, Any], device: torch.device) -> Iterator[None]:
    """Write a failure inside into the row's `error`: one system that fails does not stop the others."""
    try:
        with machine.bounded(device):
            yield
    except (RuntimeError, MemoryError, ValueError) as error:
        row['error'] = machine.reason(error)


def prepare(
    network: nn.Module, variant: Variant, device: torch.device, batch: int, train: bool
) -> Callable[[], None]:
    """What is timed: a call without arguments that does the work of one turn."""
    order = torch.channels_last if variant.channels_last else torch.contiguous_format
    # Shared between variants, so it is put in order at each call; nothing happens where it already is.
    generator = torch.Generator().manual_seed(0)
    shape = (batch, 3, variant.height, variant.width)
    image = torch.rand(shape, generator=generator).to(device).contiguous(memory_format=order)
    if train:
        return training_step(order_memory(network, order), image, variant)
    target = compiled(network) if variant.compiled else network
    if variant.cuda_graph:
        graphs = CudaGraphs(order_memory(target, order), variant.precision)

        def replayed_call() -> None:
            graphs(image)

        return replayed_call

    def call() -> None:
        restore(target, image, precision=variant.precision)

    def ordered_call() -> None:
        order_memory(network, order)
        call()

    return ordered_call


def compiled(network: nn.Module) -> nn.Module:
    """The network through `torch.compile`."""
    return cast(nn.Module, torch.compile(network))


def training_step(network: nn.Module, image: Tensor, variant: Variant) -> Callable[[], None]:
    """A full step: forward, L1 loss, backward, AdamW."""
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
        optimizer.step()

    return call


def compare(record: records.Record, device: torch.device, batch: int, train: bool) -> None:
    """Add to each row the least time that the measured ceilings of the device allow.

    A training step takes three times the work of restoring: forward, and two products backward for each.
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


# Peak memory: on a CPU only a process of its own can tell.


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
        call = prepare(zoo.create(variant.model).to(device), variant, device, batch, train)
        for _ in range(2 if train else 1):  # the optimiser's own tensors are there from the second step on
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


# Presentation.


def describe(device: str, rounds: int, first: str, keep_memory: bool = False) -> str:
    on_gpu = device.startswith('cuda')
    clock_text = '(CUDA events)' if on_gpu else "(the processor's clock)"
    memory = "the allocator's peak" if on_gpu else 'resident peak of a process that makes one call'
    freed = 'kept for the next tensors' if keep_memory or on_gpu else 'left to the C library'
    return PROTOCOL.format(rounds=rounds, first=first, clock=clock_text, memory=memory, freed=freed)


def ratios(rows: Sequence[dict[str, Any]], first: str) -> list[float | None]:
    """For each row: how many times as long as the first system it takes, at the same size.

    The yardstick is the first system's fastest row of that size, which in a run without `--best` is
    its only one.
    """
    fastest: dict[str, float] = {}
    for row in rows:
        if row['model'] == first and row.get('latency_ms'):
            fastest[row['size']] = min(fastest.get(row['size'], math.inf), row['latency_ms'])
    return [
        row['latency_ms'] / fastest[row['size']] if row.get('latency_ms') and row['size'] in fastest else None
        for row in rows
    ]


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


COLUMNS = {
    'model': 'system', 'size': 'size', 'mode': 'precision', 'parameters': 'parameters',
    'macs': 'multiply-adds', 'latency': 'latency', 'spread': 'spread', 'ratio': 'ratio', 'rate': 'MP/s',
    'memory': 'peak memory', 'first': 'first call', 'floor': 'roofline', 'over': 'times the roofline',
}  # fmt: skip


def cells(record: records.Record) -> list[dict[str, str | None]]:
    """The table's rows as text."""
    rows = []
    for row, ratio in zip(record.rows, ratios(record.rows, record.settings['models'][0]), strict=True):
        memory = row.get('peak_memory_mib')
        rows.append({
            'model': row['model'],
            'size': row['size'].replace('x', '×'),
            'mode': mode(row),
            'parameters': f'{row["parameters"] / 1e6:.2f} M',
            'macs': f'{row["multiply_adds"] / 1e9:.1f} G',
            'latency': f'{row["latency_ms"]:.1f} ms' if row.get('latency_ms') else row.get('error'),
            'spread': f'{100 * row["spread"]:.0f} %' if 'spread' in row else None,
            'ratio': f'{ratio:.2f}' if ratio else None,
            'rate': f'{row["megapixels_per_second"]:.3f}' if 'megapixels_per_second' in row else None,
            'memory': f'{memory:.0f} MiB' if memory else row.get('memory_note'),
            'first': f'{row["first_call_ms"]:.0f} ms' if 'first_call_ms' in row else None,
            'floor': f'{short(row["floor_ms"])} ms' if 'floor_ms' in row else None,
            'over': over_the_roofline(row),
        })  # fmt: skip
    return rows


def over_the_roofline(row: dict[str, Any]) -> str | None:
    if not row.get('latency_ms') or 'floor_ms' not in row:
        return None
    return f'{row["latency_ms"] / row["floor_ms"]:.1f}'


def table(record: records.Record) -> str:
    """All rows as a Markdown table."""
    rows = cells(record)
    return records.markdown_table(records.filled(COLUMNS, rows), rows)


GROWTH_COLUMNS = {'model': 'system', 'latency_ms': 'time ~ pixels^', 'peak_memory_mib': 'memory ~ pixels^'}


def growth_cells(record: records.Record) -> list[dict[str, str | None]]:
    """Rows of the table of exponents; none without `--scaling`."""
    fits = record.extra.get('growth', {})
    return [
        {'model': name, **{key: f'{value:.2f}' for key, value in fit.items()}} for name, fit in fits.items()
    ]


def title(record: records.Record) -> str:
    """What was measured, as a heading."""
    s = record.settings
    what = 'Speed of a training step' if s['train'] else 'Speed of restoring'
    return f'{what}: {conditions(record)}'


def conditions(record: records.Record) -> str:
    """What tells a run's results from those of another, in a few words."""
    s = record.settings
    size = 'by image size' if 'growth' in record.extra else ', '.join(f'{h}×{w}' for h, w in s['sizes'])
    modes = ', best mode' * s['best'] + ', memory kept' * s.get('keep_memory', False)
    modes += ', CUDA graphs' * s.get('cuda_graphs', False)
    return f'{s["device"]}, {s["precision"]}{modes}, {size}'


def page(record: records.Record) -> str:
    """The Markdown page of a run."""
    parts = [table(record)]
    if record.extra.get('growth'):
        fits = records.markdown_table(GROWTH_COLUMNS, growth_cells(record))
        parts += ['## Growth with the number of pixels', fits]
    if record.extra.get('rates'):
        parts += ['## Roofline', ceilings(record)]
    return records.markdown_page(title(record), record, parts)


def ceilings(record: records.Record) -> str:
    """What the device can do at best, in sentences."""
    rates = [
        f'{kind}: {rate["operations"] / 1e12:.3g} TFLOP/s in a product of large matrices, '
        f'{rate["bytes"] / 1e9:.3g} GB/s read and written in a copy.'
        for kind, rate in record.extra['rates'].items()
    ]
    return ' '.join([*rates, ROOFLINE])


def plot(axis: Axes, record: records.Record) -> None:
    """Bars of latency, or with `--scaling` curves over pixels."""
    rows = [row for row in record.rows if row.get('latency_ms')]
    if 'growth' in record.extra:
        for name in record.settings['models']:
            mine = [row for row in rows if row['model'] == name]
            axis.plot(
                [pixels(row) / 1e6 for row in mine], [row['latency_ms'] for row in mine], 'o-', label=name
            )
        axis.set(xscale='log', yscale='log', xlabel='megapixels', ylabel='latency, ms')
        records.logarithmic(axis.xaxis)
        records.logarithmic(axis.yaxis)
        axis.legend(frameon=False, fontsize='small')
        axis.grid(alpha=0.3)
    else:
        rows.sort(key=lambda row: -row['latency_ms'])
        bars = axis.barh(range(len(rows)), [row['latency_ms'] for row in rows], color='#4878a8')
        axis.set_yticks(range(len(rows)), labels(rows))
        axis.bar_label(bars, [short(row['latency_ms']) for row in rows], padding=3)
        modes = {mode(row) for row in rows}
        axis.set(xscale='log', xlabel='latency, ms' + f' ({min(modes)})' * (len(modes) == 1))
        axis.margins(x=0.15)
        records.logarithmic(axis.xaxis)
        axis.grid(axis='x', alpha=0.3)
    axis.spines[['top', 'right']].set_visible(False)


def labels(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A name for each row: the system, and whatever else tells the rows apart."""
    parts: list[list[str]] = [[row['model']] for row in rows]
    if len({row['size'] for row in rows}) > 1:
        parts = [[*part, row['size']] for part, row in zip(parts, rows, strict=True)]
    if len({mode(row) for row in rows}) > 1:
        parts = [[*part, mode(row)] for part, row in zip(parts, rows, strict=True)]
    return [' '.join(part) for part in parts]


def mode(row: dict[str, Any]) -> str:
    """Precision, memory order, compilation and recording of a row."""
    orders = ', channels-last' * row['channels_last'] + ', compiled' * row['compile']
    return row['precision'] + orders + ', CUDA graph' * row.get('cuda_graph', False)


def short(number: float) -> str:
    """Three digits, but never fewer than stand before the point."""
    return f'{number:.3g}' if number < 100 else f'{number:.0f}'


def pixels(row: dict[str, Any]) -> int:
    """Pixels of a row's image."""
    return math.prod(map(int, row['size'].split('x')))


def draw(record: records.Record, path: Path) -> None:
    """The figure of a run."""
    height = 5 if 'growth' in record.extra else 1.2 + 0.32 * len(record.rows)
    figure, (axis,) = records.canvas(8, height)
    plot(axis, record)
    records.save_figure(figure, path)


if __name__ == '__main__':
    print(json.dumps(peak_memory_here(json.loads(sys.argv[1]))))
