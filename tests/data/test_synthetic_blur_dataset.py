"""Crops follow from (seed, epoch, index) alone; sources are balanced; option files are checked."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from basicsr.data import build_dataset
from basicsr.data.data_sampler import EnlargedSampler
from torch.utils.data import DataLoader

from dsgformer_arch.data.mixed_dataset import KINDS, MixedDataset
from dsgformer_arch.data.synthetic_blur_dataset import SyntheticBlurDataset
from dsgformer_arch.models import options as options_module
from dsgformer_arch.utils.errors import UserError
from tests.trees import ROOT, SHARED, random_image, tiny_options, write_pairs, write_project

SIDE = 32
NOTHING = {'saturation': 0, 'noise': 0, 'isp': 0, 'demosaic': 0, 'jpeg': 0}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Photographs, frames of a moving camera, pairs in folders and in LMDBs."""
    for number in range(3):
        save(tmp_path / 'photographs' / f'{number}.png', random_image(number, 160, 200))
    scene = random_image(7, 80, 160)
    for number in range(9):
        save(tmp_path / 'frames' / 'run' / f'{number:03d}.png', scene[:, 3 * number : 3 * number + 90])
    for number in range(2):
        sharp = random_image(20 + number, 64, 70)
        save(tmp_path / 'pairs' / 'sharp' / f'{number}.png', sharp)
        save(tmp_path / 'pairs' / 'blur' / f'{number}.png', cv2.blur(sharp, (9, 1)))
    write_pairs(tmp_path / 'lmdb', 'train', 2, height=48, width=48)
    return tmp_path


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


def sources(tree: Path) -> dict[str, Any]:
    photographs = str(tree / 'photographs')
    return {
        'folders': {
            'kind': 'pairs',
            'weight': 1,
            'dataroot_lq': str(tree / 'pairs' / 'blur'),
            'dataroot_gt': str(tree / 'pairs' / 'sharp'),
        },
        'lmdbs': {
            'kind': 'pairs',
            'weight': 1,
            'dataroot_lq': str(tree / 'lmdb' / 'train_lq.lmdb'),
            'dataroot_gt': str(tree / 'lmdb' / 'train_gt.lmdb'),
        },
        'frames': {'kind': 'video', 'weight': 1, 'root': str(tree / 'frames'), 'frames': [3, 9]},
        'shake': {'kind': 'shake', 'weight': 2, 'root': photographs, 'strength': {'length': [1, 8]}},
        'objects': {'kind': 'objects', 'weight': 2, 'root': photographs, 'strength': {'length': [1, 8]}},
        'sharp': {'kind': 'identity', 'weight': 1, 'root': photographs},
    }


def options(tree: Path, **changes: Any) -> dict[str, Any]:
    return {
        'name': 'mix', 'type': 'MixedDataset', 'phase': 'train', 'scale': 1, 'gt_size': SIDE, 'length': 40,
        'seed': 5, 'use_hflip': True, 'use_rot': True, 'sources': sources(tree), **changes,
    }  # fmt: skip


def only(tree: Path, name: str, **changes: Any) -> MixedDataset:
    """The data set of one source."""
    return MixedDataset(options(tree, sources={name: {**sources(tree)[name], **changes}}, length=200))


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return torch.equal(a['lq'], b['lq']) and torch.equal(a['gt'], b['gt']) and a['lq_path'] == b['lq_path']


def test_items_are_what_basicsr_trains_on(tree: Path) -> None:
    data = build_dataset(options(tree))
    assert len(data) == 40
    for index in range(40):
        item = data[index]
        assert set(item) == {'lq', 'gt', 'lq_path', 'gt_path'}
        for side in ('lq', 'gt'):
            assert item[side].shape == (3, SIDE, SIDE)
            assert item[side].dtype == torch.float32
            assert item[side].is_contiguous()
            assert 0 <= item[side].min() <= item[side].max() <= 1
            levels = item[side] * 255
            assert torch.allclose(levels, levels.round(), atol=1e-4), 'not of 8 bits'


def test_an_item_follows_from_seed_epoch_and_index(tree: Path) -> None:
    a, b = MixedDataset(options(tree)), MixedDataset(options(tree))
    forwards = [a[index] for index in range(20)]
    np.random.seed(1)  # what other code does to global streams does not matter
    backwards = [b[index] for index in reversed(range(20))][::-1]
    assert all(map(equal, forwards, backwards))
    b.set_epoch(1)
    assert not any(equal(x, b[index]) for index, x in enumerate(forwards))
    b.set_epoch(0)
    assert all(equal(x, b[index]) for index, x in enumerate(forwards))
    other = MixedDataset(options(tree, seed=6))
    assert not any(equal(x, other[index]) for index, x in enumerate(forwards))


def test_workers_know_the_epoch_from_basicsrs_sampler(tree: Path) -> None:
    data = MixedDataset(options(tree, length=6))
    expected = {}
    for epoch in (0, 3):
        data.set_epoch(epoch)
        expected[epoch] = {index: data[index] for index in range(6)}
    data.set_epoch(0)
    sampler = EnlargedSampler(data, 1, 0)
    loader = DataLoader(data, batch_size=1, sampler=sampler, num_workers=2, persistent_workers=True)
    for epoch in (0, 3):
        sampler.set_epoch(epoch)
        for index, batch in zip(sampler, loader, strict=True):
            assert torch.equal(batch['lq'][0], expected[epoch][index]['lq'])
            assert torch.equal(batch['gt'][0], expected[epoch][index]['gt'])


def test_workers_may_be_started_in_any_way(tree: Path) -> None:
    """Where workers are not forked, the data set is sent to them."""
    data = MixedDataset(options(tree, length=6))
    data.set_epoch(2)
    expected = [data[index] for index in range(6)]
    context = 'forkserver'
    loader = DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context=context)
    assert all(equal(item, expected[index]) for index, item in enumerate(loader))


def test_sources_of_the_same_photographs_share_them(tree: Path) -> None:
    mix = sources(tree)
    data = MixedDataset(options(tree, sources={name: mix[name] for name in ('shake', 'objects', 'sharp')}))
    shake, objects, sharp = data.sources
    assert shake.photographs is objects.photographs
    assert shake.photographs is not sharp.photographs, 'these are not reduced'


def test_sources_come_as_often_as_their_weights_say(tree: Path) -> None:
    mix = sources(tree)
    weights = {'folders': 1, 'sharp': 3, 'frames': 0}
    chosen = {name: {**mix[name], 'weight': weight} for name, weight in weights.items()}
    data = MixedDataset(options(tree, sources=chosen, length=600))
    counts = Counter(data[index]['lq_path'].split('/')[0] for index in range(600))
    assert set(counts) == {'folders', 'sharp'}
    # Four standard deviations of a binomial draw.
    assert abs(counts['sharp'] - 450) < 4 * np.sqrt(600 * 0.25 * 0.75)


def test_real_pairs_are_cut_alike(tree: Path) -> None:
    """The blur is along x (or y, turned) only: taking it again of the sharp crop gives the blurred one."""
    data = only(tree, 'folders')
    for index in range(30):
        lq, gt = (data[index][side].numpy().transpose(1, 2, 0) for side in ('lq', 'gt'))
        again = [cv2.blur(gt, size) for size in ((9, 1), (1, 9))]
        inner = slice(4, -4)
        assert min(np.abs(lq - b)[inner, inner].max() for b in again) < 1.5 / 255


def test_all_eight_orientations_occur(tree: Path) -> None:
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    image[0, 1] = 255
    save(tree / 'one' / 'dot.png', image)
    source = {'kind': 'identity', 'weight': 1, 'root': str(tree / 'one')}
    data = MixedDataset(options(tree, sources={'x': source}))
    dots = {tuple(np.argwhere(data[index]['lq'][0].numpy())[0]) for index in range(100)}
    last = SIDE - 1
    assert dots == {(a, b) for a, b in ((0, 1), (0, last - 1), (last, 1), (last, last - 1))} | {
        (b, a) for a, b in ((0, 1), (0, last - 1), (last, 1), (last, last - 1))
    }
    plain = MixedDataset({**data.opt, 'use_hflip': False, 'use_rot': False})
    assert {tuple(np.argwhere(plain[i]['lq'][0].numpy())[0]) for i in range(10)} == {(0, 1)}


def test_identity_is_the_image_itself(tree: Path) -> None:
    data = only(tree, 'sharp')
    assert all(torch.equal(data[index]['lq'], data[index]['gt']) for index in range(20))


def test_frames_are_averaged_around_the_sharp_one(tree: Path) -> None:
    """Nine frames of a scene that moves by 3 pixels each: the mean in linear light, aligned on the fifth."""
    data = only(tree, 'frames', frames=[9, 9], camera='linear', realism=NOTHING)
    files = sorted((tree / 'frames' / 'run').iterdir())
    frames = [cv2.imread(str(path))[..., ::-1].astype(np.float64) for path in files]
    mean, middle = np.mean(frames, 0), frames[4]
    plain = MixedDataset({**data.opt, 'use_hflip': False, 'use_rot': False})
    for index in range(5):
        item = plain[index]
        lq, gt = ((item[side].numpy() * 255).round().transpose(1, 2, 0) for side in ('lq', 'gt'))
        windows = np.lib.stride_tricks.sliding_window_view(middle, (SIDE, SIDE), axis=(0, 1)).transpose(
            0, 1, 3, 4, 2
        )
        places = np.argwhere((windows == gt).all(axis=(2, 3, 4)))
        assert len(places) >= 1
        errors = [np.abs(mean[y : y + SIDE, x : x + SIDE] - lq).max() for y, x in places]
        assert min(errors) <= 0.5 + 1e-6


@pytest.mark.parametrize('name', ['shake', 'objects'])
def test_blur_comes_in_the_share_that_is_asked_for(tree: Path, name: str) -> None:
    settings = {'realism': NOTHING, 'strength': {'none': 0.5, 'length': [6, 8]}}
    data = only(tree, name, **settings)
    unblurred = sum(torch.equal(item['lq'], item['gt']) for item in (data[index] for index in range(100)))
    if name == 'shake':
        assert abs(unblurred - 50) < 4 * 5
    else:
        assert 0 < unblurred < 70, 'an object and its background are rarely both still'


def test_noise_differs_but_the_sharp_side_has_none(tree: Path) -> None:
    realism = {**NOTHING, 'noise': 1, 'shot': [1e-3, 1e-3]}
    data = only(tree, 'shake', realism=realism, strength={'none': 1})
    for index in range(5):
        item = data[index]
        difference = (item['lq'] - item['gt'])[(item['gt'] > 0.2) & (item['gt'] < 0.8)]
        assert 0.002 < difference.std() < 0.1
        assert abs(difference.mean()) < 0.01


def test_synthetic_blur_data_set_is_a_mixture_of_one(tree: Path) -> None:
    shake = {key: value for key, value in sources(tree)['shake'].items() if key != 'weight'}
    opt = {key: value for key, value in options(tree).items() if key != 'sources'}
    data = build_dataset({**opt, 'type': 'SyntheticBlurDataset', 'synthesis': shake})
    assert isinstance(data, SyntheticBlurDataset)
    same = MixedDataset(options(tree, sources={'synthesis': {**shake, 'weight': 1}}))
    assert all(equal(data[index], same[index]) for index in range(5))


def test_validation_is_the_same_in_every_epoch_and_upright(tree: Path) -> None:
    data = MixedDataset(options(tree, phase='val'))
    before = [data[index] for index in range(8)]
    data.set_epoch(9)
    assert all(equal(item, data[index]) for index, item in enumerate(before))


def test_the_most_detailed_candidate_is_taken(tree: Path) -> None:
    image = np.full((64, 512, 3), 90, np.uint8)
    image[:, :128] = np.random.RandomState(0).randint(0, 256, (64, 128, 3))
    save(tree / 'half' / 'x.png', image)
    source = {'kind': 'identity', 'weight': 1, 'root': str(tree / 'half')}
    flat = []
    for candidates in (1, 8):
        data = MixedDataset(options(tree, sources={'x': {**source, 'candidates': candidates}}, length=60))
        flat.append(sum(float(data[index]['gt'].std()) < 0.01 for index in range(60)))
    assert flat[0] > 30
    assert flat[1] < 10


@pytest.mark.parametrize(
    ('change', 'sentence'),
    [
        ({'sources': {}}, 'sources: should hold one section a source'),
        ({'gt_size': 0}, 'gt_size is 0'),
        ({'length': None}, 'length is None'),
        ({'seed': -1}, 'seed is -1'),
        ({'scale': 2}, 'scale is 2'),
        ({'dataset_enlarge_ratio': 2}, 'dataset_enlarge_ratio would repeat crops; raise length'),
    ],
)
def test_wrong_options_are_reported(tree: Path, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        MixedDataset(options(tree, **change))


@pytest.mark.parametrize(
    ('name', 'change', 'sentence'),
    [
        ('shake', {'kind': 'shaek'}, "sources: shake: kind is 'shaek'; choose from pairs, video"),
        ('shake', {'weight': -1}, 'weight is -1'),
        ('shake', {'weight': 0}, 'every weight is 0'),
        ('shake', {'rot': 1}, "unknown key 'rot'; did you mean root"),
        ('shake', {'strength': {'none': 2}}, 'shake: strength: none is 2, but should be a probability'),
        ('shake', {'strength': {'length': [9, 1]}}, r'length is \[9, 1\], but should rise'),
        ('shake', {'realism': {'jpg': 1}}, "realism: unknown key 'jpg'; did you mean jpeg"),
        ('shake', {'camera': 'kodak'}, "'kodak' is not a camera response"),
        ('shake', {'root': 'nowhere'}, 'nowhere is not a folder'),
        ('shake', {'match': '*.gif'}, r"holds no image that matches '\*.gif'"),
        ('frames', {'frames': [4, 4]}, 'should hold an odd number'),
        ('frames', {'frames': [11, 13]}, 'with at least 11 frames'),
        ('folders', {'match': 'x*'}, "holds no image that matches 'x"),
        ('folders', {'dataroot_lq': 'nowhere'}, 'nowhere is not a folder'),
        ('sharp', {'root': 'frames'}, 'frames is not a folder'),
    ],
)
def test_wrong_sources_are_reported(tree: Path, name: str, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        only(tree, name, **change)


def option_file(tree: Path, **changes: Any) -> dict[str, Any]:
    """A training option file with the mixture in the place of its pairs."""
    file = tiny_options()
    train = file['datasets']['train']
    for key in ('dataroot_gt', 'dataroot_lq', 'io_backend', 'dataset_enlarge_ratio'):
        train.pop(key)
    train |= {'type': 'MixedDataset', 'sources': sources(tree), 'length': 40, 'seed': 5, **changes}
    write_project(tree, file)
    return file


def test_option_files_are_checked_before_data_is_read(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    options_module.check(option_file(tree), 'train.yml', is_train=True)
    for change, sentence in (
        ({'lenght': 3}, "unknown key 'lenght'; did you mean length"),
        ({'sources': {'x': {'kind': 'shake'}}}, '^train.yml: datasets: train: sources: x: weight is None'),
        ({'sources': {'x': {'kind': 'pairs', 'weight': 1}}}, "sources: x: the key 'dataroot_lq' is missing"),
    ):
        with pytest.raises(UserError, match=sentence):
            options_module.check(option_file(tree, **change), 'train.yml', is_train=True)


def test_the_documented_example_is_valid() -> None:
    text = (ROOT / 'docs' / 'blur.md').read_text('utf-8').split('```yaml\n')[1].split('```')[0]
    example = yaml.safe_load(text)
    assert {section['kind'] for section in example['sources'].values()} == set(KINDS)
    example['sources']['frames'].pop('camera')  # a file of one's own
    MixedDataset.check_options(example, 'docs/blur.md')


def test_a_source_without_its_root_is_reported(tree: Path) -> None:
    with pytest.raises(UserError, match="sources: x: the key 'root' is missing"):
        MixedDataset(options(tree, sources={'x': {'kind': 'shake', 'weight': 1}}))


def test_an_image_smaller_than_a_crop_is_reported(tree: Path) -> None:
    data = only(tree, 'shake', reduction={'least': 6})
    with pytest.raises(UserError, match=r'is 33×26, smaller than crops of 32; lower gt_size'):
        data[0]


def test_all_kinds_work_on_the_shared_images() -> None:
    root = SHARED / 'data' / 'train'
    if not root.is_dir():
        pytest.skip(f'the shared training images are not at {root}')
    photographs = str(root / 'photographs' / 'nextcloud')
    gopro = {'match': 'gopro_*0384*', 'dataroot_lq': str(root / 'pairs' / 'blur')}
    mix = {
        'gopro': {'kind': 'pairs', 'weight': 1, 'dataroot_gt': str(root / 'pairs' / 'sharp'), **gopro},
        'frames': {
            'kind': 'video',
            'weight': 1,
            'root': str(root / 'frames'),
            'match': '*_205',
            'camera': str(root / 'gopro6_inverse_crf.npy'),
        },
        'shake': {'kind': 'shake', 'weight': 1, 'root': photographs, 'match': 'Steps*'},
        'objects': {'kind': 'objects', 'weight': 1, 'root': photographs, 'match': 'Birdie*'},
    }
    data = MixedDataset(options(Path(), sources=mix, gt_size=128))
    names = set()
    for index in range(24):
        item = data[index]
        names.add(item['lq_path'].split('/')[0])
        # Blurred and sharp show the same thing in the same colours.
        assert (item['lq'] - item['gt']).mean().abs() < 0.03
        assert (item['lq'] - item['gt']).abs().mean() < 0.15
    assert names == set(mix)
