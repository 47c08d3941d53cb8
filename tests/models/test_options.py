"""Option files: every one that ships is sound, and every fault is one sentence that names it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from dsgformer_arch.models import options
from dsgformer_arch.utils.errors import UserError
from tests.trees import ROOT, tiny_options, write_lmdb, write_pairs

FILES = sorted((ROOT / 'options').glob('*.yml'))
SMALL_ENOUGH = 40e6
"""Networks of more parameters are only described, not built, to keep the tests quick."""


@pytest.fixture(scope='session')
def one_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An LMDB of one 1280×720 image."""
    folder = tmp_path_factory.mktemp('one') / 'a.lmdb'
    write_lmdb(folder, {'a': np.zeros((720, 1280, 3), np.uint8)})
    return folder


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_option_file_is_sound(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vgg_weights: Path, one_image: Path
) -> None:
    """It passes the check, with the data that it names in place, and builds what it names."""
    from basicsr.archs import build_network
    from basicsr.data import build_dataset

    from dsgformer_arch.models.restoration_model import RestorationModel

    monkeypatch.chdir(tmp_path)
    settings = options.read(str(file))
    is_train = 'train' in settings
    for phase, dataset in settings['datasets'].items():
        dataset['phase'] = phase.split('_')[0]
        for key in ('dataroot_gt', 'dataroot_lq'):
            shutil.copytree(one_image, tmp_path / dataset[key], dirs_exist_ok=True)
    if settings['path'].get('pretrain_network_g'):
        weights = tmp_path / settings['path']['pretrain_network_g']
        weights.parent.mkdir(parents=True)
        torch.save({'params_ema': build_network(settings['network_g']).state_dict()}, weights)
        settings['path']['pretrain_network_g'] = str(weights)
    checked = yaml.safe_load(yaml.safe_dump(settings))
    for dataset in checked['datasets'].values():
        del dataset['phase']
    options.check(checked, str(file), is_train)

    for dataset in settings['datasets'].values():
        assert len(build_dataset(dataset)) == 1
    settings |= {'num_gpu': 0, 'is_train': is_train, 'dist': False, 'rank': 0, 'world_size': 1}
    settings['path']['pretrain_network_g'] = None
    if is_train:
        settings['train']['compile'] = False
        if 'contrast_opt' in settings['train']:
            settings['train']['contrast_opt']['vgg_weights'] = str(vgg_weights)
    network = build_network(settings['network_g'])
    if sum(parameter.numel() for parameter in network.parameters()) > SMALL_ENOUGH:
        return
    model = RestorationModel(settings)
    assert {p.shape for p in model.net_g.parameters()} == {p.shape for p in network.parameters()}
    if is_train:
        assert model.optimizers[0].param_groups[0]['lr'] <= settings['train']['optim_g']['lr']
        assert model.losses


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_every_key_carries_a_comment(file: Path) -> None:
    """A key is explained where it stands or above, where it stood first; a section by its entries."""
    explained: set[str] = set()
    for number, line in enumerate(file.read_text().splitlines(), 1):
        found = re.match(r'\s*(?:- )?([\w]+):\s*(.*)$', line)
        if not found:
            continue
        key, rest = found.groups()
        if '#' in rest:
            explained.add(key)
        assert not rest or key in explained, f'{file.name}:{number}: {key} is not explained'


def test_paper_recipe_is_written_down() -> None:
    """Section 3.1 of the paper: every number of it."""
    settings = options.read(str(ROOT / 'options' / 'train_gopro.yml'))
    train, data = settings['train'], settings['datasets']['train']
    iterations_an_epoch = -(-2103 // 8)
    assert data['batch_size_per_gpu'] == 8
    assert data['gt_size'] == 256
    assert data['use_hflip'] is True
    assert data['use_rot'] is True
    assert train['total_iter'] == train['scheduler']['total_iter'] == 3000 * iterations_an_epoch
    assert train['scheduler']['warmup_iter'] == 10 * iterations_an_epoch
    assert (train['optim_g']['type'], train['optim_g']['lr']) == ('AdamW', 2e-4)
    assert train['scheduler']['eta_min'] == 1e-6
    assert train['pixel_opt']['type'] == 'L1Loss'
    assert settings['network_g']['width'] == 48


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_pairs(tmp_path / 'datasets' / 'sample', 'train', 2)
    write_pairs(tmp_path / 'datasets' / 'sample', 'test', 1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fault(settings: dict[str, Any], is_train: bool = True) -> str:
    with pytest.raises(UserError) as caught:
        options.check(settings, 'train.yml', is_train)
    message = str(caught.value)
    assert message.startswith('train.yml: ')
    assert '\n' not in message
    return message


def test_sound_options_pass(project: Path) -> None:
    options.check(tiny_options(), 'train.yml', is_train=True)


def change(path: str, value: Any) -> Any:
    """A function that sets, or with None removes, one option."""

    def apply(settings: dict[str, Any]) -> None:
        *sections, key = path.split('/')
        for section in sections:
            settings = settings[section]
        if value is None:
            del settings[key]
        else:
            settings[key] = value

    return apply


@pytest.mark.parametrize(
    ('edit', 'words'),
    [
        (change('network_g', None), ["'network_g' is missing"]),
        (change('trian', {}), ["'trian'", 'did you mean train']),
        (change('train/ema_deacy', 0.9), ['train:', "'ema_deacy'", 'ema_decay']),
        (change('network_g/type', 'DSGFormr'), ['network_g: type', 'DSGFormr', 'did you mean DSGformer']),
        (change('network_g/widht', 4), ['network_g', "'widht'", 'did you mean width']),
        (change('model_type', 'Restoration'), ['model_type', 'RestorationModel']),
        (change('datasets/train/type', 'PairedDataset'), ['datasets: train: type', 'PairedDataset']),
        (change('datasets/train/dataroot_lq', 'no/where.lmdb'), ['no/where.lmdb', 'datasets/README.md']),
        (change('datasets/train/gt_size', 64), ['gt_size is 64', '48×40', 'lower gt_size']),
        (change('datasets/train/batch_size_per_gpu', 0), ['batch_size_per_gpu is 0', 'at least 1']),
        (change('datasets/train', None), ['no section train']),
        (change('datasets/test', {}), ['datasets: test']),
        (change('train/pixel_opt', None), ['no loss']),
        (change('train/pixel_opt/type', 'L1'), ['train: pixel_opt: type', 'L1Loss']),
        (change('train/amp', 'half'), ['amp', 'bf16']),
        (change('path/pretrain_network_g', 'x.pth'), ['pretrain_network_g', 'no file x.pth']),
        (change('val/metrics/psnr/crop_broder', 0), ["'crop_broder'", 'crop_border']),
        (change('num_gpu', 'all'), ['num_gpu', "'all'"]),
        (change('name', '../up'), ['name', 'folder']),
    ],
)
def test_fault_is_named_with_its_mend(edit: Any, words: list[str], project: Path) -> None:
    settings = tiny_options()
    edit(settings)
    message = fault(settings)
    for word in words:
        assert word in message


def test_empty_and_unfinished_lmdbs(project: Path) -> None:
    settings = tiny_options()
    write_lmdb(project / 'empty.lmdb', {})
    settings['datasets']['train']['dataroot_gt'] = 'empty.lmdb'
    assert 'empty' in fault(settings)
    (project / 'half.lmdb').mkdir()
    settings['datasets']['train']['dataroot_gt'] = 'half.lmdb'
    assert 'no finished LMDB' in fault(settings)


def test_images_without_partner(project: Path) -> None:
    settings = tiny_options()
    settings['datasets']['train']['dataroot_gt'] = 'datasets/sample/test_gt.lmdb'
    assert 'only one of' in fault(settings)


def test_option_files_run_no_code(tmp_path: Path) -> None:
    file = tmp_path / 'evil.yml'
    file.write_text('name: !!python/object/apply:os.mkdir [' + str(tmp_path / 'made') + ']\n')
    with pytest.raises(UserError, match=r'evil\.yml, line 1'):
        options.read(str(file))
    assert not (tmp_path / 'made').exists()


@pytest.mark.parametrize('text', ['a: [1', '- 1\n- 2\n', ''])
def test_unreadable_option_files(text: str, tmp_path: Path) -> None:
    file = tmp_path / 'x.yml'
    file.write_text(text)
    with pytest.raises(UserError, match=r'x\.yml'):
        options.read(str(file))


def test_force_yml_changes_options_and_nothing_else() -> None:
    settings = tiny_options()
    options.force(settings, ['train:total_iter=9', 'network_g:num_blocks=[1, 2, 1, 1]', 'name=other'])
    assert settings['train']['total_iter'] == 9
    assert settings['network_g']['num_blocks'] == [1, 2, 1, 1]
    assert settings['name'] == 'other'
    for entry in ['train', 'nosuch:key=1', 'a"];import os;x["b=1']:
        with pytest.raises(UserError, match='--force_yml'):
            options.force(settings, [entry])
