"""Streams that tests make for themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2

from dsgformer_arch.data.prepare.layouts import read_pairs
from dsgformer_arch.data.prepare.lmdb_writer import create_lmdbs
from dsgformer_arch.data.prepare.stream_writer import create_streams
from tests.trees import random_image

SHARD_BYTES = 18_000
"""Two to three of the pairs below."""


def write_images(folder: Path, count: int, height: int = 40, width: int = 48) -> Path:
    """`lq/` and `gt/` with pairs of images; every third blurred image is a JPEG."""
    for number in range(count):
        sharp = random_image(number, height, width)
        for side, image in (('gt', sharp), ('lq', cv2.blur(sharp, (7, 1)))):
            (folder / side).mkdir(parents=True, exist_ok=True)
            suffix = 'jpg' if side == 'lq' and number % 3 == 0 else 'png'
            assert cv2.imwrite(str(folder / side / f'{number:03d}.{suffix}'), image)
    return folder


def write_stream(images: Path, out: str | Path, **settings: Any) -> str:
    """The address of a stream `train` of these images below `out`."""
    settings = {'shard_bytes': SHARD_BYTES, 'say': lambda line: None, **settings}
    create_streams([read_pairs(images, 'train')], str(out), 'pairs', **settings)
    return f'{out}/train'


def write_lmdbs(images: Path, out: Path) -> None:
    """`train_gt.lmdb` and `train_lq.lmdb` of these images in `out`."""
    create_lmdbs([read_pairs(images, 'train')], out, 'pairs', say=lambda line: None)


def options(address: str | Path, cache: Path | None = None, **changes: Any) -> dict[str, Any]:
    """Options of a `StreamingPairedDataset` for training."""
    return {
        'name': 'x', 'type': 'StreamingPairedDataset', 'phase': 'train', 'scale': 1, 'gt_size': 16,
        'use_hflip': True, 'use_rot': True, 'dataroot': str(address), 'shuffle_shards': 2,
        **({'cache_dir': str(cache)} if cache else {}), **changes,
    }  # fmt: skip
