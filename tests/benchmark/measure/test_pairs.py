from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from dsgformer_arch.benchmark.measure import pairs
from dsgformer_arch.data.prepare.layouts import read_pairs
from dsgformer_arch.data.prepare.lmdb_writer import create_lmdbs
from dsgformer_arch.utils.errors import UserError
from tests.trees import random_image, write_lmdb, write_pairs


def save(path: Path, seed: int = 0, height: int = 20, width: int = 24) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), random_image(seed, height, width))


@pytest.mark.parametrize(('lq', 'gt'), [('blur', 'sharp'), ('input', 'target'), ('lq', 'gt')])
def test_the_usual_folders(tmp_path: Path, lq: str, gt: str) -> None:
    for seed, name in enumerate(('b', 'a')):
        save(tmp_path / lq / f'{name}.png', 10 + seed)
        save(tmp_path / gt / f'{name}.png', seed)
    found = pairs.find(str(tmp_path), 'rsblur')
    assert found.keys == ('a', 'b')
    blurred, sharp = found.images('b')
    np.testing.assert_array_equal(blurred, random_image(10, 20, 24)[..., ::-1])
    np.testing.assert_array_equal(sharp, random_image(0, 20, 24)[..., ::-1])


def test_lmdbs_give_the_same_as_folders(tmp_path: Path) -> None:
    write_pairs(tmp_path, 'test', 2)
    found = pairs.find(str(tmp_path / 'test'), 'gopro')
    assert found.keys == ('test-0', 'test-1')
    blurred, sharp = found.images('test-1')
    np.testing.assert_array_equal(sharp, random_image(1, 40, 48)[..., ::-1])
    np.testing.assert_array_equal(blurred, cv2.blur(random_image(1, 40, 48), (7, 1))[..., ::-1])
    assert found.first(1).keys == ('test-0',)
    assert found.first(None).keys == found.keys


@pytest.mark.parametrize('given', ['GOPRO_Large', 'GOPRO_Large/test', 'GOPRO_Large/train'])
def test_gopro_in_its_own_layout(tmp_path: Path, given: str) -> None:
    for split in ('train', 'test'):
        for kind in ('blur', 'blur_gamma', 'sharp'):
            save(tmp_path / 'GOPRO_Large' / split / f'{split}seq' / kind / '000001.png')
    found = pairs.find(str(tmp_path / given), 'gopro')
    assert found.keys == (('trainseq-000001',) if given.endswith('train') else ('testseq-000001',))


def test_the_test_split_of_realblur(tmp_path: Path) -> None:
    scene = 'RealBlur-J_ECC_IMCORR_centroid_itensity_ref/scene001'
    for side in ('gt', 'blur'):
        save(tmp_path / scene / side / f'{side}_1.png')
    (tmp_path / 'RealBlur_J_test_list.txt').write_text(f'{scene}/gt/gt_1.png {scene}/blur/blur_1.png \n')
    assert pairs.find(str(tmp_path), 'realblur').keys == ('scene001-1',)


def test_equal_data_have_equal_digests(tmp_path: Path) -> None:
    for folder, seed in (('a', 0), ('b', 0), ('c', 1)):
        write_pairs(tmp_path / folder, 'test', 2, seed=seed)
    a, b, c = (pairs.find(str(tmp_path / f / 'test'), 'gopro').check() for f in 'abc')
    assert a == b
    assert a != c
    assert pairs.find(str(tmp_path / 'a' / 'test'), 'gopro').first(1).check() != a


def test_an_image_without_counterpart_in_a_folder(tmp_path: Path) -> None:
    save(tmp_path / 'blur' / 'x.png')
    save(tmp_path / 'blur' / 'y.png')
    save(tmp_path / 'sharp' / 'x.png')
    with pytest.raises(UserError, match=r'y\.png: has no partner'):
        pairs.find(str(tmp_path), 'gopro')


def test_a_gopro_sequence_without_its_sharp_images(tmp_path: Path) -> None:
    save(tmp_path / 'test' / 'GOPR1' / 'blur' / '1.png')
    with pytest.raises(UserError, match='GOPR1: has no folder sharp'):
        pairs.find(str(tmp_path / 'test'), 'gopro')


def test_an_image_without_counterpart_in_an_lmdb(tmp_path: Path) -> None:
    write_lmdb(tmp_path / 'test_lq.lmdb', {'a': random_image(0, 20, 20), 'b': random_image(1, 20, 20)})
    write_lmdb(tmp_path / 'test_gt.lmdb', {'a': random_image(0, 20, 20)})
    with pytest.raises(UserError, match=r'test_lq\.lmdb: the image b has no partner in .*test_gt\.lmdb'):
        pairs.find(str(tmp_path / 'test'), 'gopro')


def test_sizes_that_differ(tmp_path: Path) -> None:
    save(tmp_path / 'blur' / 'x.png', height=20, width=24)
    save(tmp_path / 'sharp' / 'x.png', height=20, width=25)
    with pytest.raises(UserError, match='image x has 24×20 pixels and its sharp partner 25×20'):
        pairs.find(str(tmp_path), 'gopro').check()


def test_a_truncated_image(tmp_path: Path) -> None:
    for side in ('blur', 'sharp'):
        save(tmp_path / side / 'x.png')
    path = tmp_path / 'sharp' / 'x.png'
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match='the sharp image x is truncated'):
        pairs.find(str(tmp_path), 'gopro').check()


def test_places_without_pairs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'there is no folder .*nothing_lq\.lmdb'):
        pairs.find(str(tmp_path / 'nothing'), 'gopro')
    with pytest.raises(
        UserError, match=r'holds no pairs in a known layout: expected blur/ and sharp/.*or gopro'
    ):
        pairs.find(str(tmp_path), 'gopro')
    write_lmdb(tmp_path / 'half_lq.lmdb', {'a': random_image(0, 20, 20)})
    with pytest.raises(UserError, match=r'no finished LMDB .*half_gt'):
        pairs.find(str(tmp_path / 'half'), 'gopro')
    for side in ('blur', 'sharp', 'lq', 'gt'):
        save(tmp_path / 'both' / side / 'x.png')
    with pytest.raises(UserError, match='holds both blur/sharp and lq/gt'):
        pairs.find(str(tmp_path / 'both'), 'gopro')


def test_raw_lmdbs(tmp_path: Path) -> None:
    """What `tools/create_lmdb.py --raw` writes could not be scored (issue 10, item 15)."""
    for seed, side in enumerate(('lq', 'gt')):
        save(tmp_path / side / 'a.png', seed)
    create_lmdbs([read_pairs(tmp_path, 'test')], tmp_path / 'out', 'pairs', raw=True, say=lambda line: None)
    found = pairs.find(str(tmp_path / 'out' / 'test'), 'gopro')
    assert len(found.check()) == 16
    blurred, sharp = found.images('a')
    np.testing.assert_array_equal(blurred, random_image(0, 20, 24)[..., ::-1])
    np.testing.assert_array_equal(sharp, random_image(1, 20, 24)[..., ::-1])


@pytest.mark.parametrize('key', ['/tmp/elsewhere', '../elsewhere', 'a/../../b'])
def test_keys_that_lead_out_of_the_folder(key: str, tmp_path: Path) -> None:
    """Restored images are saved under their keys."""
    for side in ('lq', 'gt'):
        write_lmdb(tmp_path / f'test_{side}.lmdb', {key: random_image(0, 20, 24)})
    with pytest.raises(UserError, match='not a relative path'):
        pairs.find(str(tmp_path / 'test'), 'gopro')


def test_truncated_lmdb(tmp_path: Path) -> None:
    write_pairs(tmp_path, 'test', 2)
    data = tmp_path / 'test_lq.lmdb' / 'data.mdb'
    data.write_bytes(data.read_bytes()[:-4096])
    with pytest.raises(UserError, match='truncated'):
        pairs.find(str(tmp_path / 'test'), 'gopro')
