"""Tests that need the compiled kernel fail, not skip, on a machine that should have it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from dsgformer_arch.ops.cpu import binding, build


def expected() -> bool:
    """Whether this machine must run the kernel: it has AVX2 or AVX-512 and a compiler, or is named `CI`.

    Continuous integration sets `CI`: without a compiler its tests fail instead of being skipped.
    """
    try:
        flags = Path('/proc/cpuinfo').read_text(encoding='utf-8', errors='replace')
    except OSError:
        return False
    compiles = bool(build.compilers()) or os.environ.get('CI', '') not in ('', '0', 'false')
    return compiles and ('avx2' in flags or 'avx512f' in flags)


def require(dtype: torch.dtype = torch.float32) -> None:
    """Skip the test without the kernel for `dtype`, or fail it where the kernel should be there."""
    verdict = binding.works(dtype)
    if not verdict.passed:
        (pytest.fail if expected() and dtype == torch.float32 else pytest.skip)(verdict.reason)
