"""The faster data set returns what BasicSR's returns, bit for bit."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import cv2
import lmdb
import numpy as np
import pytest
import torch
from basicsr.data.paired_image_dataset import PairedImageDataset
from basicsr.utils import imfrombytes

from dsgformer_arch.data.image_files import raw_image
from dsgformer_arch.data.paired_crop_dataset import PairedCropDataset
from dsgformer_arch.data.prepare.layouts import read_pairs
from dsgformer_arch.data.prepare.lmdb_writer import CropGrid, create_lmdbs
from dsgformer_arch.utils.errors import UserError
from tests.trees import random_image, write_pairs


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        'name': 'x', 'phase': 'train', 'scale': 1, 'gt_size': 16, 'use_hflip': True, 'use_rot': True,
        'dataroot_gt': str(folder / 'train_gt.lmdb'), 'dataroot_lq': str(folder / 'train_lq.lmdb'),
        'io_backend': {'type': 'lmdb'}, **changes,
    }  # fmt: skip


def store_raw(folder: Path) -> None:
    """Replace every image of the LMDBs by its uncompressed form."""
    for kind in ('gt', 'lq'):
        with lmdb.open(str(folder / f'train_{kind}.lmdb'), map_size=1 << 26) as environment:
            with environment.begin() as transaction:
                images = {key: imfrombytes(value) for key, value in transaction.cursor()}
            with environment.begin(write=True) as transaction:
                for key, image in images.items():
                    transaction.put(key, raw_image(image))


@pytest.mark.parametrize('raw', [False, True])
@pytest.mark.parametrize('augment', [False, True])
def test_equals_basicsr(raw: bool, augment: bool, tmp_path: Path) -> None:
    write_pairs(tmp_path, 'train', 3)
    if raw:
        store_raw(tmp_path)
    settings = {'use_hflip': augment, 'use_rot': augment}
    ours = PairedCropDataset(options(tmp_path, **settings))
    # LMDB opens a folder once in a process, so BasicSR gets a copy.
    shutil.copytree(tmp_path, tmp_path / 'copy')
    theirs = PairedImageDataset(options(tmp_path / 'copy', **settings))
    assert len(ours) == len(theirs) == 3
    for draw in range(24):
        random.seed(draw)
        a = ours[draw % 3]
        random.seed(draw)
        b = theirs[draw % 3]
        assert a['lq_path'] == b['lq_path']
        for key in ('gt', 'lq'):
            assert a[key].is_contiguous()
            assert torch.equal(a[key], b[key])


def test_validation_is_basicsrs_own(tmp_path: Path) -> None:
    write_pairs(tmp_path, 'train', 1)
    settings = options(tmp_path, phase='val')
    a, b = PairedCropDataset(dict(settings))[0], PairedImageDataset(options(tmp_path, phase='val'))[0]
    assert torch.equal(a['gt'], b['gt'])
    assert a['gt'].shape == (3, 40, 48)


def test_raw_images_are_read_by_opencv() -> None:
    image = random_image(0, 9, 7)
    np.testing.assert_array_equal(imfrombytes(raw_image(image)), image)


def test_workers_and_several_data_sets_read_one_lmdb(tmp_path: Path) -> None:
    write_pairs(tmp_path, 'train', 4)
    first, second = PairedCropDataset(options(tmp_path)), PairedCropDataset(options(tmp_path))
    first[0], second[0]
    loader = torch.utils.data.DataLoader(first, batch_size=2, num_workers=2)
    assert [batch['gt'].shape for batch in loader] == [(2, 3, 16, 16)] * 2


def test_what_it_cannot_do_is_refused(tmp_path: Path) -> None:
    write_pairs(tmp_path, 'train', 1)
    with pytest.raises(UserError, match='color'):
        PairedCropDataset(options(tmp_path, color='y'))
    with pytest.raises(UserError, match='smaller than gt_size'):
        PairedCropDataset(options(tmp_path, gt_size=64))[0]


@pytest.mark.parametrize('crop', [None, CropGrid(16, 16)])
def test_raw_lmdbs_of_the_tool(crop: CropGrid | None, tmp_path: Path) -> None:
    """What `--raw` writes is read by BasicSR and here alike, and holds the files' pixels."""
    for kind in ('lq', 'gt'):
        (tmp_path / kind).mkdir()
        for i in range(2):
            cv2.imwrite(str(tmp_path / kind / f'{i}.png'), random_image(i + 5 * (kind == 'lq'), 32, 48))
    for out in ('ours', 'theirs'):
        splits = [read_pairs(tmp_path, 'train', None, None)]
        create_lmdbs(splits, tmp_path / out, 'pairs', crop, raw=True, verify=True, say=lambda line: None)
    ours = PairedCropDataset(options(tmp_path / 'ours'))
    theirs = PairedImageDataset(options(tmp_path / 'theirs'))
    assert len(ours) == (2 if crop is None else 12)
    for index in range(len(ours)):
        random.seed(index)
        a = ours[index]
        random.seed(index)
        b = theirs[index]
        assert torch.equal(a['lq'], b['lq'])
        assert torch.equal(a['gt'], b['gt'])


def test_raw_refuses_what_is_not_8_bit_rgb(tmp_path: Path) -> None:
    for kind in ('lq', 'gt'):
        (tmp_path / kind).mkdir()
        cv2.imwrite(str(tmp_path / kind / 'grey.png'), random_image(0, 32, 32)[..., 0])
    with pytest.raises(UserError, match=r'grey\.png: is not an 8-bit RGB'):
        create_lmdbs([read_pairs(tmp_path, 'train', None, None)], tmp_path / 'out', 'pairs', raw=True)
    assert not (tmp_path / 'out').exists()
