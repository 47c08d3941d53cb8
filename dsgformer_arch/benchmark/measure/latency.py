"""Latency of a system in PyTorch and in the runtimes that it is exported to, in one process on the CPU.

All backends of a system take turns at the same image, A B C A B C, with the same number of threads.  Every
exported file has been verified against PyTorch (see `export`) before it is timed.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dsgformer_arch import zoo
from dsgformer_arch.archs.layers.padding import padded_size
from dsgformer_arch.benchmark import record as records
from dsgformer_arch.benchmark.measure import machine, speed
from dsgformer_arch.export import export
from dsgformer_arch.export.image_to_image import INPUT, OUTPUT
from dsgformer_arch.restore import restore, set_memory_format
from dsgformer_arch.utils.allocator import keeps_freed_memory
from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.progress import track

PROTOCOL = """\
Latency: median over {rounds} turns, each of which measures every backend of a system once, after {untimed} \
untimed calls; spread is (largest - smallest) / median. All backends run in one process with {threads} \
threads on the same image of random numbers, float32 from and to memory, padded to the multiple that the \
network takes; weights are initial ones. PyTorch restores as `dsgformer deblur` does: freed memory is \
{freed}, blocks run in the fused kernels of this package or in strips of rows where there are any, bf16 by \
autocast. Exported files were verified against PyTorch before."""

UNTIMED = 2
"""Calls before the first turn: runtimes allocate memory and choose kernels during the first."""

Image = NDArray[np.float32]
Call = Callable[[Image], object]


@dataclass(frozen=True)
class Backend:
    """One way to run a network."""

    title: str
    precision: str
    prepare: Callable[[nn.Module, Path, int], Call]
    """`prepare(network, file, threads)`; `file` is the exported one, of `suffix`"""
    suffix: str = ''
    """Of the file that it runs; empty for PyTorch itself"""
    format: str = ''
    """The file's format, a key of `export.FORMATS`"""


def pytorch(precision: str, channels_last: bool) -> Callable[[nn.Module, Path, int], Call]:
    """A network as this package restores with it."""
    order = torch.channels_last if channels_last else torch.contiguous_format

    def prepare(network: nn.Module, file: Path, threads: int) -> Call:
        ordered = set_memory_format(copy.deepcopy(network), order) if channels_last else network

        def call(image: Image) -> object:
            tensor = torch.from_numpy(image).contiguous(memory_format=order)
            return restore(ordered, tensor, precision=precision)

        return call

    return prepare


def onnxruntime(network: nn.Module, file: Path, threads: int) -> Call:
    """An ONNX graph on onnxruntime's CPU provider, with all graph optimisations."""
    import onnxruntime as runtime

    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    session = runtime.InferenceSession(str(file), options, providers=['CPUExecutionProvider'])
    return lambda image: session.run([OUTPUT], {INPUT: image})


def openvino(precision: str) -> Callable[[nn.Module, Path, int], Call]:
    """OpenVINO's CPU plug-in with one stream, as `LATENCY` asks for."""

    def prepare(network: nn.Module, file: Path, threads: int) -> Call:
        import openvino as runtime

        settings = {
            'PERFORMANCE_HINT': 'LATENCY',
            'INFERENCE_PRECISION_HINT': precision,
            'INFERENCE_NUM_THREADS': threads,
        }
        compiled = runtime.Core().compile_model(str(file), 'CPU', settings)
        return lambda image: np.array(compiled(image)[0])

    return prepare


def aotinductor(network: nn.Module, file: Path, threads: int) -> Call:
    """AOTInductor's package; its threads are PyTorch's."""
    model: Any = torch._inductor.aoti_load_package(str(file))

    def call(image: Image) -> object:
        with torch.inference_mode():
            return model(torch.from_numpy(image))

    return call


BACKENDS: dict[str, Backend] = {
    'pytorch': Backend('PyTorch', 'fp32', pytorch('fp32', False)),
    'pytorch-nhwc': Backend('PyTorch, channels-last', 'fp32', pytorch('fp32', True)),
    'pytorch-bf16': Backend('PyTorch', 'bf16', pytorch('bf16', False)),
    'pytorch-nhwc-bf16': Backend('PyTorch, channels-last', 'bf16', pytorch('bf16', True)),
    'onnxruntime': Backend('onnxruntime', 'fp32', onnxruntime, '.onnx', 'onnx'),
    'openvino': Backend('OpenVINO', 'fp32', openvino('f32'), '.xml', 'openvino'),
    'openvino-bf16': Backend('OpenVINO', 'bf16', openvino('bf16'), '.xml', 'openvino'),
    'aoti': Backend('AOTInductor', 'fp32', aotinductor, '.pt2', 'aoti'),
}
"""By name."""


def run(
    models: Sequence[str],
    size: Sequence[tuple[int, int]] | None = None,
    device: str = 'cpu',
    backends: Sequence[str] = tuple(BACKENDS),
    rounds: int = 5,
    out: Path = Path('results/benchmark/latency'),
    resume: bool = False,
) -> records.Record:
    """Measure and write `out`.json.

    Args:
        models: names of the zoo.
        size: (height, width) of the images.
        device: the CPU; no other is measured.
        backends: keys of `BACKENDS`.
        rounds: turns.
        out: results without their ending.
        resume: keep the rows that `out`.json has.

    Returns:
        The record; rows that could not be measured have an `error`.

    Raises:
        UserError: an unknown backend, one whose package is missing, or another device than the CPU.
    """
    if device != 'cpu':
        raise UserError(f'--device {device}: latency compares backends of the CPU; leave it out')
    for name in backends:
        if name not in BACKENDS:
            raise UserError(f'--backends: there is no {name!r}; choose from {", ".join(BACKENDS)}')
    sizes = list(size or [(256, 256)])
    threads = torch.get_num_threads()
    settings = {
        'models': list(models), 'sizes': sizes, 'backends': list(backends), 'rounds': rounds,
        'threads': threads,
    }  # fmt: skip
    path = records.beside(out, '.json')
    freed = 'kept for the next tensors' if keeps_freed_memory() else 'left to the C library'
    protocol = PROTOCOL.format(rounds=rounds, threads=threads, untimed=UNTIMED, freed=freed)
    record = records.start('latency', settings, protocol, path, resume)
    for model in models:
        todo = [pair for pair in sizes if record.find(model=model, size=f'{pair[0]}x{pair[1]}') is None]
        if todo:
            for rows in measure(model, todo, backends, threads, rounds):
                record.rows += rows
                record.save(path)
    record.save(path)
    return record


def measure(
    model: str, sizes: Sequence[tuple[int, int]], backends: Sequence[str], threads: int, rounds: int
) -> Iterator[list[dict[str, Any]]]:
    """Yields the rows of each size: one for each backend; what fails has an `error` and no times."""
    torch.manual_seed(0)
    network = zoo.create(model).eval()
    with tempfile.TemporaryDirectory(prefix='dsgformer-latency') as folder:
        calls, failed = prepared(network, model, backends, threads, Path(folder))
        for height, width in sizes:
            multiple, least = network.pad_multiple, network.min_size
            shape = (1, 3, padded_size(height, multiple, least), padded_size(width, multiple, least))
            image = np.random.default_rng(0).random(shape, np.float32)
            rows = [
                {
                    'model': model, 'size': f'{height}x{width}', 'backend': name,
                    'precision': BACKENDS[name].precision,
                    **({'error': failed[name]} if name in failed else {}),
                }
                for name in backends
            ]  # fmt: skip
            timed(rows, calls, image, rounds)
            yield rows
    machine.release(torch.device('cpu'))


def prepared(
    network: Any, model: str, backends: Sequence[str], threads: int, folder: Path
) -> tuple[dict[str, Call], dict[str, str]]:
    """The call of each backend by name, and why there is none for the others."""
    calls: dict[str, Call] = {}
    failed: dict[str, str] = {}
    files: dict[str, Path] = {}
    for name in track(list(backends), f'exporting {model}'):
        backend = BACKENDS[name]
        try:
            if backend.format and backend.format not in files:
                files[backend.format] = folder / f'{backend.format}{backend.suffix}'
                export(network, files[backend.format], model, format=backend.format)
            calls[name] = backend.prepare(network, files.get(backend.format, folder), threads)
        except (UserError, RuntimeError, MemoryError, ValueError) as error:
            failed[name] = machine.reason(error)
    return calls, failed


def timed(rows: Sequence[dict[str, Any]], calls: Mapping[str, Call], image: Image, rounds: int) -> None:
    """Add the times of each backend to its row."""
    cpu = torch.device('cpu')
    ready = [row for row in rows if row['backend'] in calls]
    for row in ready:
        with speed.attempt(row, cpu):
            started = time.perf_counter()
            for _ in range(UNTIMED):
                calls[row['backend']](image)
            row['first_calls_ms'] = 1e3 * (time.perf_counter() - started)
    times: dict[str, list[float]] = {row['backend']: [] for row in ready}
    for _, row in track([(turn, row) for turn in range(rounds) for row in ready], 'measuring'):
        if 'error' not in row:
            with speed.attempt(row, cpu):
                call = calls[row['backend']]
                times[row['backend']].append(speed.clock(lambda call=call: call(image), cpu))  # type: ignore[misc]
    for row in ready:
        values = times[row['backend']]
        if len(values) == rounds:
            row |= {**speed.summary(values), 'least_ms': 1e3 * min(values)}
