"""What every test needs: repaired imports, and one thread a process."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

import dsgformer_arch  # noqa: F401  (repairs BasicSR before any test imports it)

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh_logger() -> Iterator[None]:
    """BasicSR keeps one logger a process, writing to the first run's file; each test gets its own."""
    yield
    from basicsr.utils.logger import initialized_logger

    logger = logging.getLogger('basicsr')
    for handler in logger.handlers[:]:
        handler.close()
        logger.removeHandler(handler)
    initialized_logger.clear()
