"""Compiles the kernels for a CPU with the user's C++ compiler, and keeps them in the user's cache folder.

Compilers: GCC 9 to 14, or clang; `$CXX`, then `c++`, `g++` and `clang++`, the first that builds the kernel.
Compiling takes about 10 seconds, once for each combination of sources, compiler, PyTorch and processor.

Cache: `$XDG_CACHE_HOME/dsgformer_arch`, by default `~/.cache/dsgformer_arch`.  A compiled file is loaded only
if its SHA-256 is the one noted beside it; otherwise it is compiled again.  A folder that belongs to someone
else, or that others can write to, is not used: its files would run in this process.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import filelock
import torch

FOLDER = Path(__file__).parent

SOURCES = sorted([*FOLDER.glob('*.cpp'), *FOLDER.glob('*.h')])

COMPILERS = ('c++', 'g++', 'clang++')
"""Tried in this order where `$CXX` names none."""

TIMEOUT = 900
"""Seconds that a compiler may take, and that a process waits for another that compiles."""


class BuildError(RuntimeError):
    """The kernel cannot be compiled or loaded; the message says why."""


@cache
def library(source: str = 'kernel.cpp') -> ctypes.CDLL:
    """The library compiled from `source`, a file of this folder.

    Raises:
        BuildError: there is no compiler that builds it, or it cannot be loaded.
    """
    reasons = []
    for compiler in compilers():
        try:
            return _loaded(source, compiler)
        except (BuildError, OSError, subprocess.SubprocessError) as reason:  # noqa: PERF203
            reasons.append(str(reason))
    raise BuildError('; '.join(reasons) or f'no C++ compiler found ({", ".join(_wanted_compilers())})')


def compilers() -> list[list[str]]:
    """The compilers of this machine as commands, in the order in which they are tried."""
    found: dict[str, list[str]] = {}
    for command in map(shlex.split, _wanted_compilers()):
        path = shutil.which(command[0])
        if path is not None:
            found.setdefault(os.path.realpath(path), command)
    return list(found.values())


def _wanted_compilers() -> list[str]:
    chosen = os.environ.get('CXX', '').strip()
    return [chosen] if chosen else list(COMPILERS)


def version(compiler: list[str]) -> str:
    """The version text of a compiler.

    Raises:
        BuildError: it does not run.
    """
    return _run([*compiler, '--version'])


def _loaded(source: str, compiler: list[str]) -> ctypes.CDLL:
    key = _key(source, compiler)
    try:
        folder = cache_folder()
        with _lock(folder):
            return _from_cache(folder / f'{Path(source).stem}-{key}.so', source, compiler)
    except BuildError:
        raise
    except (OSError, filelock.Timeout) as reason:
        warnings.warn(
            f'The compiled kernel of DSGformer is not kept, and compiled again in each process: {reason}',
            stacklevel=2,
        )
        return _from_cache(_private_folder() / f'{Path(source).stem}-{key}.so', source, compiler)


def _from_cache(path: Path, source: str, compiler: list[str]) -> ctypes.CDLL:
    """The library at `path`, compiled unless what is there is intact."""
    if _intact(path):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(path))
    _compile(source, compiler, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as reason:
        raise BuildError(f'the compiled kernel cannot be loaded: {reason}') from reason


def _compile(source: str, compiler: list[str], target: Path) -> None:
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        compiled, linked = Path(scratch, 'kernel.o'), Path(scratch, 'kernel.so')
        _run([*compiler, *_flags(), '-c', str(FOLDER / source), '-o', str(compiled)])
        # OpenMP is not linked: its symbols come from torch, so there is one pool of threads.
        libraries = [f'-L{torch_folder / "lib"}', '-ltorch_cpu', '-lc10']
        _run([*compiler, '-shared', str(compiled), '-o', str(linked), *libraries])
        digest = Path(scratch, 'digest')
        digest.write_text(_digest(linked), encoding='ascii')
        for written, place in ((linked, target), (digest, _sidecar(target))):
            _sync(written)
            os.replace(written, place)
    _sync(target.parent)


def _flags() -> list[str]:
    return ['-std=c++17', '-O3', '-march=native', '-fno-math-errno', '-fPIC']


def _key(source: str, compiler: list[str]) -> str:
    """A hash of everything that a compiled file depends on."""
    texts = [path.read_text(encoding='utf-8') for path in SOURCES]
    identity = [source, *texts, *compiler, *_flags(), version(compiler), torch.__version__, _processor()]
    return hashlib.sha256('\0'.join(identity).encode()).hexdigest()[:16]


def _sidecar(library: Path) -> Path:
    return library.with_name(library.name + '.sha256')


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _intact(library: Path) -> bool:
    """Whether a compiled file is as it was written, and its owner the only one who can change it."""
    try:
        _check_owner(library)
        return _sidecar(library).read_text(encoding='ascii', errors='replace').strip() == _digest(library)
    except OSError:
        return False


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder() -> Path:
    """The folder for compiled kernels, made where it is missing.

    Raises:
        OSError: it cannot be made, belongs to someone else, or others can write to it.
    """
    base = os.environ.get('XDG_CACHE_HOME', '')
    try:
        folder = (Path(base) if os.path.isabs(base) else Path.home() / '.cache') / 'dsgformer_arch'
    except RuntimeError as reason:  # there is no home folder
        raise OSError(str(reason)) from reason
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    _check_owner(folder)
    return folder


def _check_owner(path: Path) -> None:
    """Raise OSError unless `path` belongs to this user and no other user can write to it."""
    if not hasattr(os, 'getuid'):  # Windows
        return
    status = path.stat()
    if status.st_uid != os.getuid():
        raise PermissionError(f'{path} belongs to another user')
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f'others can write to {path} (chmod go-w {path} allows its use)')


@cache
def _private_folder() -> Path:
    folder = tempfile.mkdtemp(prefix='dsgformer_arch-')
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One process compiles, and the others wait."""
    lock = filelock.FileLock(folder / 'lock', timeout=TIMEOUT)
    try:
        lock.acquire()
    except NotImplementedError:  # a file system without locks; the files are still written atomically
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _run(command: list[str]) -> str:
    """What `command` prints, in English: the key must not depend on the language."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            encoding='utf-8',
            errors='replace',
            env={**os.environ, 'LC_ALL': 'C'},
            timeout=TIMEOUT,
            check=False,
        )
    except OSError as reason:
        raise BuildError(f'{command[0]} does not run: {reason}') from reason
    if done.returncode:
        raise BuildError(f'{command[0]} failed: {done.stderr.strip()[-2000:]}')
    return done.stdout


_PROCESSOR_FIELDS = (
    *('vendor_id', 'cpu family', 'model', 'model name', 'stepping', 'microcode', 'flags'),
    *('Features', 'CPU implementer', 'CPU architecture', 'CPU variant', 'CPU part', 'CPU revision'),
)


def _processor() -> str:
    """What `-march=native` depends on, as several machines may share a cache folder."""
    try:
        text = Path('/proc/cpuinfo').read_text(encoding='utf-8', errors='replace')
    except OSError:
        return platform.processor()
    first = text.strip().split('\n\n')[0].splitlines()
    fields = [line for line in first if line.split(':')[0].strip() in _PROCESSOR_FIELDS]
    return '\n'.join([platform.machine(), *fields])
