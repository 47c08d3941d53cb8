"""Which compiled implementations work on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dsgformer_arch.ops import library
from dsgformer_arch.ops.cpu import binding, build


@dataclass(frozen=True)
class Status:
    """The state of the compiled kernels."""

    compiler: str | None
    """Version text of the C++ compiler; None without a compiler."""
    built: bool
    """Whether the kernel for CPUs is compiled and loaded."""
    self_tests: dict[str, str]
    """By type, `'passed'` or why the kernel for CPUs is not used."""
    cache_folder: Path | None
    """Cache folder of compiled kernels; None if each process compiles its own."""
    triton: bool
    """Whether Triton, which the kernels for GPUs need, is installed."""
    reason: str
    """Why the kernel for float32 is not used; empty if it is."""


def status() -> Status:
    """Compile and test the kernels if necessary, and report which work.

    Takes about 10 seconds the first time on a machine.
    """
    verdicts = {dtype: binding.works(dtype) for dtype in binding.TYPES}
    tests = {
        str(dtype).removeprefix('torch.'): 'passed' if verdict.passed else verdict.reason
        for dtype, verdict in verdicts.items()
    }
    compiler = None
    for command in build.compilers():
        try:
            compiler = build.version(command).splitlines()[0]
            break
        except (build.BuildError, IndexError):
            continue
    try:
        build.library()
        built = True
    except build.BuildError:
        built = False
    try:
        folder: Path | None = build.cache_folder()
    except OSError:
        folder = None
    reason = verdicts[binding.TYPES[0]].reason
    return Status(compiler, built, tests, folder, library.triton_kernels() is not None, reason)
