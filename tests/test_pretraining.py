"""Recipes of the weights in the package: option files fit their data, their network and each other."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from basicsr.archs import build_network
from basicsr.data import build_dataset

from dsgformer_arch import zoo
from dsgformer_arch.data.prepare.blur.settings import from_options
from dsgformer_arch.data.prepare.blur.sources import ShakeSource
from dsgformer_arch.models import options
from dsgformer_arch.models.restoration_model import RestorationModel
from tests.trees import ROOT, random_image, write_lmdb

HELD_OUT = ('reds_001', 'GOPR0374', 'Library')
SIDE = 48


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small images under the names of those that the recipes are made for."""
    names = [
        'reds020_000', 'reds_000_00000003', 'reds_001_00000000', 'reds_001_00000004', 'reds_001_00000008',
        *('gopro_GOPR0477_11_00_frame-165_n_avg-8', 'gopro_GOPR0384_11_02_frame-698_n_avg-8'),
        *(f'gopro_GOPR0374_11_00_frame-{n}' for n in ('1195_n_avg-8', '614_n_avg-8')),
        *(f'gopro_GOPR0374_11_00_frame-{n}' for n in ('802_n_avg-10', '815_n_avg-10')),
    ]  # fmt: skip
    pretrain, own = tmp_path / 'datasets' / 'pretrain', tmp_path / 'datasets' / 'finetune'
    for number, name in enumerate(names):
        sharp = random_image(number, 260, 270)
        for pairs in (pretrain / 'pairs', own / 'val'):
            save(pairs / 'sharp' / f'{name}.png', sharp)
            save(pairs / 'blur' / f'{name}.png', cv2.blur(sharp, (9, 1)))
    save(pretrain / 'photographs' / 'set' / 'bird.jpg', random_image(5, 300, 320))
    save(pretrain / 'photographs' / 'set' / 'Library.jpg', random_image(6, 300, 320))
    for number in range(15):
        save(pretrain / 'frames' / 'run' / f'{200 + number:06d}.png', random_image(number, 260, 270))
        save(own / 'sharp' / f'{number}.png', random_image(number, 260, 270))
    sources = recipe('pretrain')['datasets']['train']['sources'].values()
    blurred = [Path(source['dataroot_lq']) for source in sources if source['kind'] == 'pairs']
    for kind in [path.stem.removesuffix('_lq') for path in blurred if path.suffix == '.lmdb']:
        for part in ('lq', 'gt'):
            write_lmdb(
                tmp_path / 'datasets/pretrain_blur' / f'{kind}_{part}.lmdb',
                {'a': random_image(1, 260, 270)},
            )
    shutil.copytree(ROOT / 'options' / 'meta_info', tmp_path / 'options' / 'meta_info')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(name: str) -> dict[str, Any]:
    """An option file; its weights to start from are left out."""
    settings = options.read(str(ROOT / 'options' / f'{name}.yml'))
    settings['path']['pretrain_network_g'] = None
    return settings


@pytest.mark.parametrize('name', ['pretrain', 'finetune'])
def test_the_recipe_trains_the_preset_on_its_data(project: Path, name: str) -> None:
    """The options pass the check, every source gives crops, and three iterations give a finite loss."""
    settings = recipe(name)
    settings['datasets']['train']['gt_size'] = SIDE
    if 'progressive' in settings['train']:
        settings['train']['progressive']['gt_sizes'] = [SIDE // 2, SIDE]
    options.check(settings, name, is_train=True)
    dataset = {**settings['datasets']['train'], 'phase': 'train', 'scale': 1, 'length': 150}
    crops = build_dataset(dataset)
    found = [crops[index] for index in range(150)]
    sources = {key for key, source in dataset['sources'].items() if source['weight']}
    assert {item['lq_path'].split('/')[0] for item in found} == sources
    settings |= {'num_gpu': 0, 'is_train': True, 'dist': False, 'rank': 0, 'world_size': 1}
    model = RestorationModel(settings)
    preset: Any = zoo.create('dsgformer_h')
    assert model.get_bare_model(model.net_g).settings == preset.settings
    random.seed(0)
    batch = {key: torch.stack([item[key] for item in found[:2]]) for key in ('lq', 'gt')}
    for iteration in range(1, 4):
        model.feed_data(batch)
        model.optimize_parameters(iteration)
    assert all(parameter.isfinite().all() for parameter in model.net_g.parameters())


def test_no_held_out_scene_is_trained_on(project: Path) -> None:
    """What is validated on is in no source: REDS clip 001, GoPro sequence GOPR0374, some photographs."""
    settings = recipe('pretrain')
    crops = build_dataset(
        {**settings['datasets']['train'], 'gt_size': SIDE, 'phase': 'train', 'scale': 1, 'length': 600}
    )
    trained = {crops[index]['lq_path'] for index in range(600)}
    assert any('reds020' in path for path in trained)
    assert not [path for path in trained if any(scene in path for scene in HELD_OUT)]
    for phase, names in (('val', 'reds_001'), ('val_1', 'GOPR0374')):
        images = build_dataset({**settings['datasets'][phase], 'phase': 'val', 'scale': 1})
        assert len(images) >= 3
        assert all(names in images[index]['lq_path'] for index in range(len(images)))


@pytest.mark.parametrize(('name', 'scenes'), [('street', ['reds']), ('court', ['GOPR0384', 'GOPR0477'])])
def test_the_settings_of_the_synthetic_blur_leave_the_held_out_images_alone(
    project: Path, name: str, scenes: list[str]
) -> None:
    settings = options.read(str(ROOT / f'options/blur/{name}.yml'))
    source = from_options(ShakeSource, {**settings, 'root': 'datasets/pretrain/pairs/sharp'}, name)
    source.prepare()
    names = [file.stem for file in source.photographs.files]
    assert not [found for found in names if any(scene in found for scene in HELD_OUT)]
    assert all(any(scene in found for found in names) for scene in scenes)
    assert all(any(scene in found for scene in scenes) for found in names)


def test_make_pretrained_makes_the_crops_that_the_recipe_reads() -> None:
    makefile = (ROOT / 'Makefile').read_text(encoding='utf-8')
    sources = recipe('pretrain')['datasets']['train']['sources'].values()
    read = {Path(source['dataroot_lq']).stem for source in sources if source['kind'] == 'pairs'} - {'blur'}
    assert {f'{name}_lq' for name in re.findall(r'--name (\w+)', makefile)} == read


def test_fine_tuning_starts_from_weights_that_ship() -> None:
    settings = options.read(str(ROOT / 'options/finetune.yml'))
    path = Path(settings['path']['pretrain_network_g'])
    assert path.name == zoo.get('dsgformer_h').weights.file
    assert (ROOT / path).is_file()
    network: Any = build_network(settings['network_g'])
    shipped: Any = zoo.create('dsgformer_h', pretrained=True)
    assert network.settings == shipped.settings
