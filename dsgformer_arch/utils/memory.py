"""How much memory is free."""

from __future__ import annotations

import math
from pathlib import Path

import psutil
import torch


def free_memory(device: torch.device) -> float:
    """Bytes that this process can still take on a device.

    On the CPU: what the system has available, or less where a control group (a container) or a limit of the
    address space (`ulimit -v`) allows less.
    """
    if device.type == 'cuda':
        # Memory that PyTorch has reserved but does not use is free too.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused)
    return min(float(psutil.virtual_memory().available), _control_group(), _address_space())


def _control_group(folder: Path = Path('/sys/fs/cgroup')) -> float:
    """Bytes left in the control group, version 2 or 1; infinity where nothing limits it."""
    for limit, used in (
        ('memory.max', 'memory.current'),
        ('memory/memory.limit_in_bytes', 'memory/memory.usage_in_bytes'),
    ):
        try:
            most, now = (int((folder / name).read_text(encoding='ascii')) for name in (limit, used))
            statistics = (folder / limit).with_name('memory.stat').read_text(encoding='ascii')
        except (OSError, ValueError):  # no such group, or the limit is the word 'max'
            continue
        # Pages of files that were read count as used but are given back on demand.
        cached = [line.split()[1] for line in statistics.splitlines() if line.startswith('inactive_file ')]
        return max(0.0, most - now + int(cached[0] if cached else 0))
    return math.inf


def _address_space() -> float:
    try:
        import resource
    except ImportError:  # Windows
        return math.inf
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return math.inf
    return float(max(0, limit - psutil.Process().memory_info().vms))
