"""Small data sets and option files that tests make for themselves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import cv2
import lmdb
import numpy as np
import yaml

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / 'shared'
"""Real images and fixtures that lie beside some checkouts; tests skip where they are absent."""


def random_image(seed: int, height: int, width: int) -> np.ndarray:
    """A smooth colour image with edges, uint8 (height, width, 3)."""
    rng = np.random.RandomState(seed)
    image = cv2.resize(rng.uniform(0, 255, (5, 5, 3)), (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(6):
        centre = (int(rng.randint(width)), int(rng.randint(height)))
        cv2.circle(image, centre, int(rng.randint(2, 9)), rng.uniform(0, 255, 3).tolist(), -1)
    return image.clip(0, 255).astype(np.uint8)


def write_lmdb(path: Path, images: dict[str, np.ndarray]) -> None:
    """An LMDB as BasicSR's `PairedImageDataset` reads it."""
    path.mkdir(parents=True)
    with lmdb.open(str(path), map_size=1 << 26) as environment, environment.begin(write=True) as transaction:
        for key, image in images.items():
            transaction.put(key.encode(), cv2.imencode('.png', image)[1].tobytes())
    lines = [f'{key}.png ({image.shape[0]},{image.shape[1]},3) 1\n' for key, image in images.items()]
    (path / 'meta_info.txt').write_text(''.join(lines))


def write_pairs(
    folder: Path, split: str, count: int, height: int = 40, width: int = 48, seed: int = 0
) -> None:
    """`<split>_gt.lmdb` and `<split>_lq.lmdb` of `count` pairs, the second ones blurred."""
    sharp = {f'{split}-{i}': random_image(seed + i, height, width) for i in range(count)}
    write_lmdb(folder / f'{split}_gt.lmdb', sharp)
    write_lmdb(folder / f'{split}_lq.lmdb', {key: cv2.blur(image, (7, 1)) for key, image in sharp.items()})


def tiny_options(name: str = 'tiny', iterations: int = 4) -> dict[str, Any]:
    """Options that train a DSGformer of a few thousand parameters in seconds."""
    options = yaml.safe_load((ROOT / 'options' / 'train_sample.yml').read_text())
    options |= {'name': name, 'num_gpu': 0}
    options['network_g'] |= {'width': 4, 'num_blocks': [1, 1, 1, 1], 'heads': [1, 1, 1, 1]}
    train = options['datasets']['train']
    train |= {'gt_size': 16, 'batch_size_per_gpu': 2, 'num_worker_per_gpu': 0, 'dataset_enlarge_ratio': 3}
    train |= {'persistent_workers': False, 'pin_memory': False}
    options['train'] |= {'total_iter': iterations}
    options['train']['scheduler'] |= {'total_iter': iterations, 'warmup_iter': 1}
    options['logger'] |= {'print_freq': 1, 'save_checkpoint_freq': 2, 'use_tb_logger': False}
    options['val'] |= {'val_freq': iterations}
    return options


def write_project(folder: Path, options: dict[str, Any], file: str = 'options/train.yml') -> Path:
    """A project folder with sample LMDBs and an option file; returns the file."""
    data = folder / 'datasets' / 'sample'
    if not data.exists():
        write_pairs(data, 'train', 3)
        write_pairs(data, 'test', 2, height=33, width=21, seed=50)
    path = folder / file
    os.makedirs(path.parent, exist_ok=True)
    path.write_text(yaml.safe_dump(options))
    return path
