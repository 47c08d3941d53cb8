"""What every test needs: fixed imports, and one thread a process."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Triton decides when it is imported whether kernels are interpreted, and what follows may import it.
if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')

import dsgformer_arch  # noqa: F401  (fixes BasicSR before any test imports it)

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


@pytest.fixture
def vgg_weights(tmp_path: Path) -> Path:
    """A VGG-19 file of random weights: the real one takes a download."""
    from torchvision.models import vgg19

    torch.manual_seed(0)
    path = tmp_path / 'vgg19.pth'
    torch.save(vgg19(weights=None).features[:12].state_dict(), path)
    state = torch.load(path, weights_only=True)
    torch.save({f'features.{name}': tensor for name, tensor in state.items()}, path)
    return path


settings.register_profile('suite', max_examples=100, deadline=None, derandomize=True, database=None)
settings.register_profile('long', max_examples=20_000, deadline=None, database=None)
settings.load_profile(os.environ.get('HYPOTHESIS_PROFILE', 'suite'))
