"""Tests of the operators, whatever tests of commands have set in this process."""

from __future__ import annotations

import pytest

from dsgformer_arch.utils import allocator


@pytest.fixture(autouse=True)
def _freed_memory_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command run in this process lets the allocator keep freed memory, where `ops.memory` steps aside."""
    monkeypatch.setattr(allocator, '_keeps', False)
