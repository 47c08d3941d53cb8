"""The checks of `dsgformer doctor`: versions, fixes of BasicSR, kernels, devices."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata

import torch

import dsgformer_arch
from dsgformer_arch import compat, zoo
from dsgformer_arch.inference import weights
from dsgformer_arch.inference.deblurrer import has_bf16
from dsgformer_arch.ops.status import status
from dsgformer_arch.restore import restore
from dsgformer_arch.utils.machine import processor
from dsgformer_arch.utils.memory import free_memory
from dsgformer_arch.utils.text import one_line

PACKAGES = (
    *('torch', 'torchvision', 'triton', 'basicsr', 'spandrel', 'spandrel-extra-arches', 'numpy', 'pillow'),
    *('pyvips', 'pyvips-binary', 'tifffile', 'opencv-python', 'av', 'gradio'),
)
"""Packages whose versions a bug report needs."""

GOOD, WARNING, FAULT = 'ok', 'warning', 'fault'


def examine() -> list[tuple[str, str, str]]:
    """All findings, as (subject, `'ok'`, `'warning'` or `'fault'`, what was found)."""
    return [
        ('dsgformer', GOOD, dsgformer_arch.__version__),
        ('Python', GOOD, f'{platform.python_version()} ({sys.executable})'),
        ('system', GOOD, f'{platform.platform()}, {_cores()} cores'),
        ('processor', GOOD, f'{processor()} ({torch.backends.cpu.get_cpu_capability()})'),
        ('memory', GOOD, f'{free_memory(torch.device("cpu")) / 2**30:.1f} GiB free'),
        *((name, *_version(name)) for name in PACKAGES),
        *_fixes(),
        ('compiler', *_compiler()),
        *_kernels(),
        (
            'bfloat16 on the CPU',
            GOOD,
            'has instructions' if has_bf16(torch.device('cpu')) else 'no instructions',
        ),
        *_gpus(),
        ('libvips', *_libvips()),
        ('weights in the package', *_shipped()),
        ('restoring a test image', *_test_image()),
    ]


def as_text(findings: list[tuple[str, str, str]]) -> str:
    """The findings as Markdown for a bug report."""
    width = max(len(subject) for subject, _, _ in findings)
    lines = [
        f'{"" if state == GOOD else state + ": ":<9}{subject:<{width}}  {found}'
        for subject, state, found in findings
    ]
    return '\n'.join(['Paste this into a bug report:', '', '```', *lines, '```'])


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 0


def _version(name: str) -> tuple[str, str]:
    try:
        return GOOD, metadata.version(name)
    except metadata.PackageNotFoundError:
        return GOOD, 'not installed'


def _fixes() -> list[tuple[str, str, str]]:
    """Whether every fix of BasicSR can be applied; importing the package has applied them."""
    found = []
    for fix in compat.FIXES:
        error = _error_of(fix)
        found.append((f'fix {fix.__name__}', FAULT if error else GOOD, error or 'applied or not needed'))
    try:
        importlib.import_module('basicsr')
        found.append(('import basicsr', GOOD, 'works'))
    except Exception as error:
        found.append(('import basicsr', FAULT, _line(error)))
    return found


def _error_of(call: Callable[[], None]) -> str:
    """The exception of a call, in one line; empty where it raises none."""
    try:
        call()
    except Exception as error:
        return _line(error)
    return ''


def _compiler() -> tuple[str, str]:
    for command in filter(None, (os.environ.get('CXX'), 'c++', 'g++', 'clang++')):
        path = shutil.which(command.split()[0])
        if path:
            done = subprocess.run([path, '--version'], capture_output=True, check=False, timeout=30)
            first = done.stdout.decode('utf-8', 'replace').splitlines()
            return GOOD, f'{path}: {first[0] if first else "version unknown"}'
    return WARNING, 'no C++ compiler: the CPU runs the eager form, 4 to 5 times slower; install g++'


def _kernels() -> list[tuple[str, str, str]]:
    """Whether the compiled kernels are built and passed their self-test."""
    found = status()
    return [
        *(_kernel(kind, verdict) for kind, verdict in found.self_tests.items()),
        ('cache of kernels', GOOD, str(found.cache_folder or 'none: each process compiles its own')),
        ('Triton', GOOD, 'installed' if found.triton else 'not installed'),
    ]


def _kernel(kind: str, verdict: str) -> tuple[str, str, str]:
    # Many CPUs lack bfloat16: the eager form is right there.
    needed = kind == 'float32' or has_bf16(torch.device('cpu'))
    return f'CPU kernel, {kind}', GOOD if verdict == 'passed' or not needed else WARNING, verdict


def _gpus() -> list[tuple[str, str, str]]:
    if torch.backends.mps.is_available():
        return [('GPU', GOOD, 'Metal (mps)')]
    if not torch.cuda.is_available():
        built = (
            f'PyTorch is built for CUDA {torch.version.cuda}'
            if torch.version.cuda
            else 'PyTorch is built without CUDA'
        )
        return [('GPU', GOOD, f'none that PyTorch can use; {built}')]
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        bf16 = 'bfloat16' if has_bf16(torch.device('cuda', index)) else 'no bfloat16'
        found.append(
            (
                f'GPU {index}',
                GOOD,
                f'{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability '
                f'{properties.major}.{properties.minor}, {bf16}, CUDA {torch.version.cuda}',
            )
        )
    return found


def _libvips() -> tuple[str, str]:
    try:
        import pyvips
    except (ImportError, OSError) as error:
        return FAULT, f'{_line(error)}; TIFF and 16-bit PNG cannot be read'
    return GOOD, '.'.join(str(pyvips.version(i)) for i in range(3))


def _shipped() -> tuple[str, str]:
    names = zoo.shipped()
    return (GOOD, ', '.join(names)) if names else (WARNING, 'none; `dsgformer deblur` needs --weights FILE')


def _test_image() -> tuple[str, str]:
    """Restore a small image with the default system and random weights."""
    name = weights.DEFAULT_MODEL
    try:
        network = zoo.create(name).eval()
        image = torch.rand(1, 3, 128, 128)
        restore(network, image)
        begun = time.perf_counter()
        restored = restore(network, image)
        seconds = time.perf_counter() - begun
    except Exception as error:
        return FAULT, f'{name}: {_line(error)}'
    if not torch.isfinite(restored).all():
        return FAULT, f'{name} returns values that are not finite'
    return GOOD, f'{name}, 128×128 in {1000 * seconds:.0f} ms on {torch.get_num_threads()} threads'


def _line(error: BaseException) -> str:
    return f'{type(error).__name__}: {one_line(error, 160)}'
