"""PyTorch's packages (.pt2): `torch.export` programs, and the same compiled ahead of time by AOTInductor.

A program runs wherever PyTorch does and can be compiled there.  AOTInductor's package holds a shared library
for this machine's processor, which C++ and Python load without this package and without compiling.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import numpy as np
import torch
from torch.fx.experimental import _config as shapes

from dsgformer_arch.export.image_to_image import INPUT, ImageToImage, Interface
from dsgformer_arch.export.onnx_file import dynamic_axes, example
from dsgformer_arch.export.verify import Run
from dsgformer_arch.utils.errors import UserError

METADATA = 'dsgformer.json'
"""Name of the file of metadata inside the package."""


def by_torch_export(module: ImageToImage, interface: Interface, path: str) -> None:
    """Write `path` as a program."""
    metadata = {**interface.metadata(), 'exporter': 'torch.export'}
    torch.export.save(program(module, interface), path, extra_files={METADATA: json.dumps(metadata)})


def by_aotinductor(module: ImageToImage, interface: Interface, path: str) -> None:
    """Write `path` as a compiled package; the metadata are those of `AOTICompiledModel.get_metadata`."""
    metadata = {**interface.metadata(), 'exporter': 'aotinductor'}
    with oblivious():
        torch._inductor.aoti_compile_and_package(
            program(module, interface),
            package_path=path,
            inductor_configs={'aot_inductor.metadata': metadata},
        )


def program(module: ImageToImage, interface: Interface) -> torch.export.ExportedProgram:
    """A network as a graph of PyTorch's operators, for images of any size that it takes."""
    with torch.no_grad(), oblivious():
        return torch.export.export(
            module, (example(interface),), dynamic_shapes={INPUT: dynamic_axes(interface)}
        )


def oblivious() -> AbstractContextManager[Any]:
    """Keep sizes that the example happens to have out of conditions within a `with` statement.

    Otherwise a map that is contiguous after a crop, or a side of 1, would make the image's width a constant.
    PyTorch's ONNX exporter sets the same flag.
    """
    flag = {'backed_size_oblivious': True} if hasattr(shapes, 'backed_size_oblivious') else {}
    context: AbstractContextManager[Any] = shapes.patch(**flag)  # type: ignore[attr-defined]
    return context


def check_compiler() -> None:
    """Refuse to compile without a compiler.

    Raises:
        UserError: there is none.
    """
    compiler = os.environ.get('CXX', 'g++')
    if shutil.which(compiler) is None:
        raise UserError(
            f'AOTInductor compiles C++ and there is no {compiler}; install g++, or name a compiler with CXX'
        )


EXPORTERS: dict[str, Callable[[ImageToImage, Interface, str], None]] = {'torch.export': by_torch_export}
"""Exporters of programs by name."""

AOT_EXPORTERS: dict[str, Callable[[ImageToImage, Interface, str], None]] = {'aotinductor': by_aotinductor}
"""Exporters of compiled packages by name."""


def runtime(path: str) -> Run:
    """The program in PyTorch, without guards on the batch size for which its convolutions were chosen."""
    loaded: Any = torch.export.load(path)
    # PyTorch before 2.9 checks nothing and has no such argument.
    checks = inspect.signature(loaded.module).parameters
    module = loaded.module(check_guards=False) if 'check_guards' in checks else loaded.module()

    def run(image: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            restored: np.ndarray = module(torch.from_numpy(image)).numpy()
        return restored

    return run


def aot_runtime(path: str) -> Run:
    """The compiled package in PyTorch, in a process of its own: a fault of compiled code ends the process."""

    def run(image: np.ndarray) -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            given, restored = os.path.join(folder, 'image.npy'), os.path.join(folder, 'restored.npy')
            np.save(given, image)
            done = subprocess.run(
                [sys.executable, '-c', CALL, path, given, restored],
                capture_output=True, text=True, encoding='utf-8', errors='replace', check=False,
            )  # fmt: skip
            if done.returncode < 0:
                raise RuntimeError(f'the compiled code ends with {signal.Signals(-done.returncode).name}')
            if done.returncode:
                raise RuntimeError(done.stderr.strip().splitlines()[-1])
            return cast(np.ndarray, np.load(restored))

    return run


CALL = """
import sys, numpy, torch
model = torch._inductor.aoti_load_package(sys.argv[1])
with torch.no_grad():
    numpy.save(sys.argv[3], model(torch.from_numpy(numpy.load(sys.argv[2]))).numpy())
"""
"""Run the package of the first argument on the array of the second; the third is written."""
