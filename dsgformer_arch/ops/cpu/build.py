"""Compiles `kernel.cpp`, which restores, and `backward.cpp`, which trains.

The user's C++ compiler builds each the first time that it is needed (a few
seconds), into the user's cache folder; later runs load what is there.  Without
a compiler, on a processor for which oneDNN has no small matrix products, or if
the kernel fails a comparison with the eager form, the eager form runs.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

FOLDER = Path(__file__).parent

SOURCES = sorted([*FOLDER.glob('*.cpp'), *FOLDER.glob('*.h')])


@cache
def library(source: str = 'kernel.cpp') -> ctypes.CDLL:
    """The library compiled from `source`, a file of this folder.

    Raises:
        OSError, RuntimeError, subprocess.SubprocessError: if it cannot be built or loaded here.
    """
    return ctypes.CDLL(str(_built(source)))


def _built(source: str) -> Path:
    compiler = shlex.split(os.environ.get('CXX', '')) or ['c++']
    if shutil.which(compiler[0]) is None:
        raise RuntimeError(f'there is no compiler {compiler[0]!r}')
    torch_folder = Path(torch.__file__).parent
    command = [
        *compiler,
        *(
            '-O3',
            '-march=native',
            '-fno-math-errno',
            '-std=c++20',
            '-fopenmp',
            '-fPIC',
            '-DAT_PARALLEL_OPENMP=1',
        ),
        f'-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}',
        f'-I{torch_folder / "include"}',
    ]
    version = _run([*compiler, '--version'])
    identity = '\0'.join(
        [source, *(path.read_text() for path in SOURCES), *command, version, torch.__version__, _processor()]
    )
    name = hashlib.sha256(identity.encode()).hexdigest()[:16]
    folder = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'dsgformer_arch'
    target = folder / f'dsga-{name}.so'
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            compiled, linked = Path(scratch, 'dsga.o'), Path(scratch, 'dsga.so')
            _run([*command, '-c', str(FOLDER / source), '-o', str(compiled)])
            # OpenMP is not linked: its symbols come with torch, whose threads are then the only ones.
            libraries = [f'-L{torch_folder / "lib"}', '-ltorch_cpu', '-lc10']
            _run([*compiler, '-shared', str(compiled), '-o', str(linked), *libraries])
            os.replace(linked, target)
    return target


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError(f'{command[0]} failed: {done.stderr.strip()[-2000:]}')
    return done.stdout


def _processor() -> str:
    """What `-march=native` depends on: a cache folder may be shared by several machines."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(('flags', 'Features'))), platform.processor())
