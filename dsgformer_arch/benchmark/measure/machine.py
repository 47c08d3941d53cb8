"""Devices of the machine, and a memory limit under which a system fails without ending the process."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import torch

from dsgformer_arch.utils.errors import UserError

OUT_OF_MEMORY = 'does not fit in memory'
"""The error of a system that ran out of memory."""

OUT_OF_MEMORY_SIGNS = ("can't allocate", 'cannot allocate', 'bad_alloc', 'out of memory')
CGROUP = Path('/sys/fs/cgroup')


def device(text: str) -> torch.device:
    """The device of that name.

    Raises:
        UserError: there is none.
    """
    try:
        found = torch.device(text)
    except RuntimeError:
        raise UserError(f'--device {text} is not a device; write cpu, cuda or cuda:N') from None
    if found.type == 'cuda' and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(f'--device {text}: this machine has {torch.cuda.device_count()} GPUs for PyTorch')
    return found


def release(device: torch.device) -> None:
    """Free unused memory."""
    gc.collect()
    if device.type == 'cuda':
        torch.cuda.empty_cache()


def wait(device: torch.device) -> None:
    """Wait until the device has finished all work."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def reason(error: BaseException) -> str:
    """Why a system failed, in one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    said = lines[0].lower()
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        sign in said for sign in OUT_OF_MEMORY_SIGNS
    ):
        return OUT_OF_MEMORY
    return lines[0][:160]


@contextlib.contextmanager
def bounded(device: torch.device, free: int | None = None) -> Iterator[None]:
    """Make allocations inside that exceed the memory raise, where Linux would kill the process.

    Linux overcommits memory and kills the process that uses too much of it, so one large system would end
    the run for all.  A limit on the data of the process turns that into an error of this system.

    Args:
        device: of the work; on a GPU nothing is limited, as its allocator raises when memory runs out.
        free: bytes that may be allocated; by default what is available now.
    """
    free = available() if free is None else free
    in_use = _in_use()
    if device.type != 'cpu' or free is None or in_use is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = in_use + free
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def available() -> int | None:
    """Bytes that can be allocated without swapping, within a container's limit; None if unknown."""
    free = _field(Path('/proc/meminfo'), 'MemAvailable')
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ('memory.max', 'memory.current'))
        cached = dict(line.split() for line in (CGROUP / 'memory.stat').read_text().splitlines())
        if limit != 'max':
            within = int(limit) - int(used) + int(cached['inactive_file'])
            free = within if free is None else min(free, within)
    except (OSError, ValueError, KeyError):
        pass
    return free


def _in_use() -> int | None:
    """Bytes that count against this process's limit already."""
    return _field(Path(f'/proc/{os.getpid()}/status'), 'VmData')


def _field(path: Path, name: str) -> int | None:
    """A size that a file of /proc gives in kB, in bytes."""
    try:
        lines = path.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f'{name}:'))
    except (OSError, StopIteration, ValueError):
        return None
