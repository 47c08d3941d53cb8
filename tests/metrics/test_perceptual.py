"""pyiqa's metrics: what they are given, and what is said where pyiqa is missing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from basicsr.metrics import calculate_metric

from dsgformer_arch.metrics import perceptual
from dsgformer_arch.utils.errors import UserError

GENERATOR = np.random.default_rng(1)
RESTORED, SHARP = (GENERATOR.integers(0, 256, (16, 20, 3), np.uint8) for _ in range(2))
WEIGHTS = np.array([0.5, 0.3, 0.2])  # red, green, blue


class Weighted:
    """Stands for a metric of pyiqa: the weighted difference of two images, or one image's own mean."""

    lower_better = True

    def __init__(self, mode: str) -> None:
        self.metric_mode = mode

    def __call__(self, image: torch.Tensor, reference: torch.Tensor | None = None) -> torch.Tensor:
        assert image.shape == (1, 3, 16, 20)
        difference = image if reference is None else image - 2 * reference
        weights = torch.tensor(WEIGHTS, dtype=torch.float32).view(1, 3, 1, 1)
        return (difference * weights).mean().reshape(1)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    perceptual.create.cache_clear()
    yield
    perceptual.create.cache_clear()


@pytest.fixture
def fake_pyiqa(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    created: list[str] = []

    def create_metric(name: str, device: torch.device) -> Any:
        created.append(name)
        if name == 'dists':
            raise ConnectionError('no route to the weights')
        return Weighted('FR' if name == 'lpips' else 'NR')

    module = SimpleNamespace(list_models=lambda: ['lpips', 'niqe', 'dists'], create_metric=create_metric)
    monkeypatch.setitem(sys.modules, 'pyiqa', module)
    return created


def expected(image: np.ndarray) -> float:
    return float((image[..., ::-1] / 255 * WEIGHTS).mean())


def test_with_a_reference(fake_pyiqa: list[str]) -> None:
    options = {'type': 'pyiqa_metric', 'name': 'lpips', 'better': 'lower'}
    for _ in range(2):
        value = calculate_metric({'img': RESTORED, 'img2': SHARP}, options)
        assert value == pytest.approx(expected(RESTORED) - 2 * expected(SHARP), abs=1e-6)
    assert fake_pyiqa == ['lpips']


def test_without_a_reference(fake_pyiqa: list[str]) -> None:
    assert perceptual.pyiqa_metric(RESTORED, SHARP, name='niqe') == pytest.approx(
        expected(RESTORED), abs=1e-6
    )
    assert perceptual.lower_better('niqe')


def test_unknown_metric(fake_pyiqa: list[str]) -> None:
    with pytest.raises(UserError, match='pyiqa has no metric lpisp'):
        perceptual.pyiqa_metric(RESTORED, SHARP, name='lpisp')
    assert not fake_pyiqa


def test_weights_out_of_reach(fake_pyiqa: list[str]) -> None:
    with pytest.raises(UserError, match=r'weights of dists \(no route to the weights\)'):
        perceptual.pyiqa_metric(RESTORED, SHARP, name='dists')


def test_pyiqa_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'pyiqa', None)
    with pytest.raises(UserError, match=r'metric lpips needs pyiqa.*extra `metrics`'):
        perceptual.pyiqa_metric(RESTORED, SHARP, name='lpips')


def test_the_metric_must_be_named() -> None:
    with pytest.raises(UserError, match=r"pyiqa_metric.*'name'"):
        perceptual.pyiqa_metric(RESTORED, SHARP)


@pytest.mark.long
def test_the_real_pyiqa() -> None:
    """pyiqa's own PSNR needs no weights and equals the one here."""
    pytest.importorskip('pyiqa', reason='pyiqa is not installed')
    from dsgformer_arch.metrics.psnr_ssim import psnr_rgb

    assert perceptual.pyiqa_metric(RESTORED, SHARP, name='psnr') == pytest.approx(
        psnr_rgb(RESTORED, SHARP), abs=1e-3
    )
    assert not perceptual.lower_better('psnr')
