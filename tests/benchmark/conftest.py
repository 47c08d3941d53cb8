"""Systems of a few thousand parameters under names of their own, and synthetic records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsgformer_arch import zoo
from dsgformer_arch.benchmark import record as records
from dsgformer_arch.zoo import registry
from dsgformer_arch.zoo.systems import DSGFORMER, NAFNET64
from tests.trees import write_pairs

TINY = replace(
    DSGFORMER,
    name='tiny',
    settings={'width': 4, 'num_blocks': (1, 1, 1, 1), 'heads': (1, 1, 1, 1)},
    parameters=0,
    reported=(),
)
TINY_NAFNET = replace(
    NAFNET64,
    name='tiny_nafnet',
    settings={'width': 4, 'enc_blk_nums': (1, 1), 'dec_blk_nums': (1, 1)},
    parameters=0,
    reported=(),
)


@pytest.fixture(autouse=True)
def tiny_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tiny` and `tiny_nafnet` join the zoo; nothing is compiled."""
    monkeypatch.setenv('DSGFORMER_EAGER', '1')
    for system in (TINY, TINY_NAFNET):
        network = zoo.network_class(system.architecture)(**system.settings)
        count = sum(parameter.numel() for parameter in network.parameters())
        monkeypatch.setitem(registry._BY_NAME, system.name, replace(system, parameters=count))


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """A folder of train and test LMDBs: three and two pairs of 40×48 pixels."""
    folder = tmp_path / 'sample'
    write_pairs(folder, 'train', 3)
    write_pairs(folder, 'test', 2, seed=50)
    return folder


def weights(folder: Path, *names: str) -> list[tuple[str, Path]]:
    """A checkpoint of random weights for each system."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for name in names:
        torch.manual_seed(1)
        path = folder / f'{name}.pth'
        state = zoo.create(name).state_dict()
        # Whole branches of fresh networks are multiplied by 0.
        torch.save({'params': {key: t + 0.05 * torch.randn_like(t) for key, t in state.items()}}, path)
        found.append((name, path))
    return found


class Greedy(nn.Module):
    """Asks for more memory than any machine has."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.empty(2**46, dtype=torch.uint8)[0] * self.scale


class Hollow(nn.Module):
    """Fills with NaN what is dark in its upper left corner, and returns all else as it is."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * float('nan') if x[0, 0, 0, 0] < 0.5 else x * self.scale


def make(kind: str, **changes: Any) -> records.Record:
    """A record of a few synthetic rows, as the subcommand `kind` writes them."""
    parts = {'speed': _speed, 'quality': _quality, 'training': _training, 'ablation': _ablation}
    settings, rows, extra = parts[kind]()
    environment = {
        'date': '2026-01-02', 'processor': 'Imaginary <9000>', 'cores': 2, 'threads': 1, 'memory_gib': 4.0,
        'instructions': ['avx2'], 'gpus': [], 'system': 'Linux', 'python': '3.11', 'commit': 'abc',
        'packages': {'torch': '2.9'},
    }  # fmt: skip
    command = f'python tools/benchmark.py {kind} --x'
    record = records.Record(kind, command, settings, f'protocol of {kind}', environment, rows, extra)
    for key, value in changes.items():
        setattr(record, key, value)
    return record


def speed_row(model: str, latency: float | None, size: str = '256x256', **more: Any) -> dict[str, Any]:
    """A row of `speed`."""
    row: dict[str, Any] = {
        'model': model, 'size': size, 'precision': 'fp32', 'channels_last': False, 'compile': False,
        'parameters': 2_000_000, 'multiply_adds': 3_000_000_000, **more,
    }  # fmt: skip
    if latency is not None:
        row |= {'latency_ms': latency, 'spread': 0.1, 'megapixels_per_second': 1.0, 'first_call_ms': 9.0}
    return row


def _speed() -> tuple[Any, Any, Any]:
    settings = {
        'models': ['dsgformer', 'restormer'], 'sizes': [[256, 256]], 'device': 'cpu', 'precision': 'fp32',
        'compile': False, 'channels_last': False, 'batch': 1, 'train': False, 'best': False, 'rounds': 3,
        'threads': 1,
    }  # fmt: skip
    return settings, [speed_row('dsgformer', 200.0), speed_row('restormer', 500.0)], {}


def quality_row(model: str, psnr: float | None, images: int = 2, **more: Any) -> dict[str, Any]:
    """A row of `quality` under `gopro`."""
    scores = dict.fromkeys(('ssim', 'ssim_skimage', 'ssim_basicsr'), 0.9)
    row: dict[str, Any] = {
        'model': model, 'images': images, 'failed': 0, 'identical': 0, 'in_tiles': 0, 'error': None,
        'psnr': psnr, **scores,
    }  # fmt: skip
    if model != 'blurred':
        row |= {'gain': 1.0, 'gain_p10': 0.5, 'gain_p90': 2.0, 'tlc': None}
    return row | more


def _quality() -> tuple[Any, Any, Any]:
    settings = {
        'models': ['restormer'], 'data': 'x/test', 'protocol': 'gopro', 'precision': 'fp32', 'metrics': [],
        'weights': {'restormer': 'r.pth (sha256 0)'}, 'images': 2, 'tile': None, 'tlc': None,
    }  # fmt: skip
    return settings, [quality_row('blurred', 25.0), quality_row('restormer', 26.0)], {'lower_better': []}


def _training() -> tuple[Any, Any, Any]:
    settings = {'models': ['tiny'], 'data': 'x', 'seeds': 2, 'iterations': 8, 'seconds': None}
    rows: list[dict[str, Any]] = [
        {
            'model': 'tiny', 'seed': seed, 'lr': 0.001, 'scaled': {}, 'parameters': 5000,
            'multiply_adds': 10**8,
            'psnr': 26.0 + seed, 'ssim': 0.8, 'iterations': 8, 'seconds': 2.0,
            'curve': [
                {'iteration': i, 'seconds': i / 4, 'psnr': 25 + seed + i / 8, 'ssim': 0.8, 'loss': 0.1}
                for i in (4, 8)
            ],
        }
        for seed in (0, 1)
    ]  # fmt: skip
    return settings, rows, {'blurred': {'psnr': 25.0, 'ssim': 0.7}}


def _ablation() -> tuple[Any, Any, Any]:
    settings = {'model': 'tiny', 'data': 'x', 'seeds': 2, 'iterations': 8}
    rows = [
        {'seed': seed, 'attention': 'dtsas', 'gate': 'dfgb', 'score': 'relu2', 'psnr': 26.5 + seed}
        for seed in (0, 1)
    ]
    return settings, rows, {'blurred': {'psnr': 25.0, 'ssim': 0.7}}
