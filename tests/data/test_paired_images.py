"""Whole pairs: BasicSR's tensors bit for bit, and a sentence with the image's name where one is damaged."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import cv2
import lmdb
import numpy as np
import pytest
import torch
from basicsr.data.paired_image_dataset import PairedImageDataset

from dsgformer_arch import compat
from dsgformer_arch.data.image_files import raw_image
from dsgformer_arch.data.paired_crop_dataset import PairedCropDataset
from dsgformer_arch.data.paired_images import read_image_file
from dsgformer_arch.utils.errors import UserError
from tests.data.test_image_files import png_of_size
from tests.trees import random_image, write_pairs


def settings(folder: Path, backend: str = 'lmdb', **other: Any) -> dict[str, Any]:
    suffix = '.lmdb' if backend == 'lmdb' else ''
    roots = {f'dataroot_{side}': str(folder / f'train_{side}{suffix}') for side in ('gt', 'lq')}
    common = {'phase': 'val', 'scale': 1, 'gt_size': 16, 'use_hflip': True, 'use_rot': True}
    return {**common, **roots, 'io_backend': {'type': backend}, **other}


def write_folders(folder: Path) -> None:
    for side in ('gt', 'lq'):
        (folder / f'train_{side}').mkdir()
        for number in range(3):
            image = random_image(number + 9 * (side == 'lq'), 40, 48)
            cv2.imwrite(str(folder / f'train_{side}' / f'{number}.{"png" if number else "jpg"}'), image)


@pytest.mark.parametrize(
    'other',
    [{}, {'phase': 'train'}, {'color': 'y'}, {'mean': [0.5, 0.4, 0.3], 'std': [0.2, 0.2, 0.2]}],
    ids=['val', 'train', 'y', 'mean'],
)
@pytest.mark.parametrize('backend', ['lmdb', 'disk'])
def test_tensors_are_basicsrs(backend: str, other: dict[str, Any], tmp_path: Path) -> None:
    upstream = compat.UPSTREAM['get_pair']
    if backend == 'lmdb':
        write_pairs(tmp_path, 'train', 3)
    else:
        write_folders(tmp_path)
    theirs = PairedImageDataset(settings(tmp_path, backend, **other))
    random.seed(5)
    expected = [upstream(theirs, index) for index in range(3)]
    del theirs  # LMDB opens a folder once
    ours = PairedImageDataset(settings(tmp_path, backend, **other))
    random.seed(5)
    for index, their in enumerate(expected):
        our = ours[index]
        assert our.keys() == their.keys()
        assert (our['lq_path'], our['gt_path']) == (their['lq_path'], their['gt_path'])
        assert torch.equal(our['lq'], their['lq'])
        assert torch.equal(our['gt'], their['gt'])


def put(folder: Path, side: str, value: bytes) -> None:
    path = str(folder / f'train_{side}.lmdb')
    with lmdb.open(path, map_size=1 << 26) as opened, opened.begin(write=True) as transaction:
        transaction.put(b'train-0', value)


PNG = cv2.imencode('.png', random_image(0, 40, 48))[1].tobytes()
WIDE = cv2.imencode('.png', random_image(0, 40, 50))[1].tobytes()


@pytest.mark.parametrize('phase', ['train', 'val'])
@pytest.mark.parametrize('kind', [PairedImageDataset, PairedCropDataset])
@pytest.mark.parametrize(
    ('value', 'words'),
    [
        (b'', 'is empty'),
        (b'garbage', 'neither PNG nor JPEG'),
        (PNG[:20], 'truncated'),
        (PNG[:-30], 'truncated|cannot be decoded'),
        (png_of_size(30_000), '30000x30000'),
        (WIDE, '50×40'),
        (raw_image(random_image(0, 40, 48))[:-1], 'truncated|decoded'),
    ],
    ids=['empty', 'garbage', 'header', 'half', 'bomb', 'wide', 'raw'],
)
def test_damaged_values_are_named(value: bytes, words: str, kind: Any, phase: str, tmp_path: Path) -> None:
    write_pairs(tmp_path, 'train', 2)
    put(tmp_path, 'lq', value)
    dataset = kind(settings(tmp_path, phase=phase, gt_size=40))
    with pytest.raises(UserError, match=words) as caught:
        dataset[0]
    assert 'train-0' in str(caught.value)
    assert 'train_lq.lmdb' in str(caught.value)
    assert '\n' not in str(caught.value)
    assert dataset[1]['lq'].shape[0] == 3


def test_damaged_files_are_named(tmp_path: Path) -> None:
    write_folders(tmp_path)
    path = tmp_path / 'train_gt' / '1.png'
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match=r'1\.png is truncated'):
        [PairedImageDataset(settings(tmp_path, 'disk'))[index] for index in range(3)]
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=r'1\.png is not an ordinary file'):
        read_image_file(str(path))


def test_one_sentence_from_a_loader_worker(tmp_path: Path) -> None:
    write_pairs(tmp_path, 'train', 2)
    put(tmp_path, 'lq', b'garbage')
    loader = torch.utils.data.DataLoader(PairedImageDataset(settings(tmp_path)), num_workers=1)
    with pytest.raises(UserError) as caught:
        list(loader)
    assert '\n' not in str(caught.value)
    assert 'train-0 is neither PNG nor JPEG' in str(caught.value)


def test_small_images_are_reflected(tmp_path: Path) -> None:
    """Rain13K has images smaller than the crops that it is trained with."""
    write_pairs(tmp_path, 'train', 1, height=12, width=30)
    dataset = PairedCropDataset(
        settings(tmp_path, phase='train', pad_to_gt_size=True, use_hflip=False, use_rot=False)
    )
    image = random_image(0, 12, 30)[..., ::-1]
    padded = np.pad(image, ((0, 4), (0, 0), (0, 0)), mode='reflect')
    windows = [padded[:, left : left + 16] for left in range(15)]
    for _ in range(20):
        crop = (dataset[0]['gt'].permute(1, 2, 0) * 255).round().byte().numpy()
        assert any(np.array_equal(crop, window) for window in windows)
    with pytest.raises(UserError, match='smaller than gt_size'):
        PairedCropDataset(settings(tmp_path, phase='train'))[0]
