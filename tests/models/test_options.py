"""Option files: every one that ships is sound, and every fault is one sentence that names it."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
import yaml

from dsgformer_arch import zoo
from dsgformer_arch.cli import basicsr
from dsgformer_arch.models import options, pipelines
from dsgformer_arch.models.option_schema import schema_text
from dsgformer_arch.utils.errors import UserError
from tests.trees import ROOT, tiny_options, write_lmdb, write_pairs, write_project

FILES = sorted((ROOT / 'options').glob('*.yml'))
PAIRS = [file for file in FILES if 'MixedDataset' not in file.read_text(encoding='utf-8')]
"""Those that train on one set of pairs; the others are tested in test_pretraining.py."""
SMALL_ENOUGH = 40e6
"""Networks of more parameters are only described, not built, to keep the tests quick."""


@pytest.fixture(scope='session')
def one_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An LMDB of one 1920×1200 image, as RSBlur's are."""
    folder = tmp_path_factory.mktemp('one') / 'a.lmdb'
    write_lmdb(folder, {'a': np.zeros((1200, 1920, 3), np.uint8)})
    return folder


@pytest.mark.parametrize('file', PAIRS, ids=lambda file: file.stem)
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


@pytest.mark.parametrize('file', PAIRS, ids=lambda file: file.stem)
def test_every_key_carries_a_comment(file: Path) -> None:
    """A key is explained where it occurs or above, at its first occurrence; a section by its entries."""
    explained: set[str] = set()
    for number, line in enumerate(file.read_text(encoding='utf-8').splitlines(), 1):
        found = re.match(r'\s*(?:- )?([\w]+):\s*(.*)$', line)
        if not found:
            continue
        key, rest = found.groups()
        if '#' in rest:
            explained.add(key)
        assert not rest or key in explained, f'{file.name}:{number}: {key} is not explained'


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_editors_find_the_schema(file: Path) -> None:
    """The first line names it, and the file is valid by it."""
    assert file.read_text(encoding='utf-8').startswith('# yaml-language-server: $schema=schema.json\n')
    schema = json.loads((file.parent / 'schema.json').read_text(encoding='utf-8'))
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.validate(options.read(str(file)), schema, jsonschema.Draft7Validator)


def test_schema_is_current() -> None:
    """`python tools/make_option_schema.py` writes it anew."""
    assert (ROOT / 'options' / 'schema.json').read_text(encoding='utf-8') == schema_text()


@pytest.mark.parametrize(
    ('place', 'value'),
    [
        ('train/total_iter', '9'),
        ('train/amp', 'half'),
        ('train/optim_g/lr', '2.0e-4'),
        ('train/pixel_opt/type', 'L1'),
        ('train/ema_deacy', 0.9),
        ('network_g/widht', 4),
        ('network_g/score', 'sigmoid'),
        ('datasets/tarin', {}),
        ('val/metrics/psnr/test_y_channel', 'x'),
        ('logger/print_freq', 0),
        ('save', {'keep_last': 0}),
    ],
)
def test_schema_refuses_what_the_check_refuses(place: str, value: Any) -> None:
    settings = tiny_options()
    change(place, value)(settings)
    schema = json.loads((ROOT / 'options' / 'schema.json').read_text(encoding='utf-8'))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(settings, schema, jsonschema.Draft7Validator)


def test_one_ssim_for_all_systems() -> None:
    """MATLAB's, which the published tables have, on every set of deblurring."""
    for file in FILES:
        if re.search('gopro|hide|realblur|rsblur', file.stem):
            metrics = options.read(str(file))['val']['metrics']
            assert metrics == {'psnr': {'type': 'psnr_rgb'}, 'ssim': {'type': 'ssim_matlab_rgb'}}, file


def test_all_option_files_of_one_data_set_measure_the_same() -> None:
    """So that the numbers of peers and of DSGformer can be compared."""
    used: dict[str, dict[str, Any]] = {}
    for file in FILES:
        settings = options.read(str(file))
        for phase, dataset in settings['datasets'].items():
            if phase != 'train':
                data_set = Path(dataset['dataroot_gt']).parts[1]
                used.setdefault(data_set, {})[file.stem] = settings['val']['metrics']
    assert {'gopro', 'hide', 'realblur_j', 'realblur_r', 'rsblur', 'rain13k', 'sample'} <= used.keys()
    for data_set, metrics in used.items():
        first = next(iter(metrics.values()))
        others = [name for name, other in metrics.items() if other != first]
        assert others == [], f'{data_set}: not as in {next(iter(metrics))}'


def test_rain_is_measured_as_others_and_as_mhnet_do() -> None:
    for file in (ROOT / 'options').glob('train_rain13k_*.yml'):
        metrics = options.read(str(file))['val']['metrics']
        assert {name: metric['type'] for name, metric in metrics.items()} == {
            'psnr': 'psnr_rain', 'ssim': 'ssim_rain', 'psnr_mhnet': 'psnr_mhnet', 'ssim_mhnet': 'ssim_mhnet',
        }, file  # fmt: skip


def test_rain_recipes_are_the_official_ones() -> None:
    """Rain13K as MPRNet's, MHNet's and Restormer's authors train on it, and NAFNet as on GoPro."""
    pairs = 13711
    for name, epochs, batch in (('mprnet', 250, 16), ('mhnet', 10000, 16)):
        settings = options.read(str(ROOT / 'options' / f'train_rain13k_{name}.yml'))
        train, data = settings['train'], settings['datasets']['train']
        an_epoch = -(-pairs // batch)
        assert (data['batch_size_per_gpu'], data['gt_size']) == (batch, 256)
        assert train['total_iter'] == train['scheduler']['total_iter'] == epochs * an_epoch
        assert train['scheduler']['warmup_iter'] == 3 * an_epoch
        assert (train['optim_g']['type'], train['optim_g']['lr']) == ('Adam', 2e-4)
        assert (train['scheduler']['eta_min'], train['grad_clip']) == (1e-6, None)
    settings = options.read(str(ROOT / 'options' / 'train_rain13k_restormer.yml'))
    assert settings['train']['progressive'] == {
        'iters': [92000, 64000, 48000, 36000, 36000, 24000],
        'batch_sizes': [8, 5, 4, 2, 1, 1],
        'gt_sizes': [128, 160, 192, 256, 320, 384],
    }
    rain, gopro = (
        options.read(str(ROOT / 'options' / f'train_{data_set}_nafnet64.yml'))
        for data_set in ('rain13k', 'gopro')
    )
    assert rain['train'] == gopro['train']
    assert rain['network_g'] == gopro['network_g']


@pytest.mark.parametrize('name', ['dsgformer_s', 'dsgformer_h'])
def test_recipe_of_the_efficient_track(name: str) -> None:
    """Crops of 512 and then 1024, Charbonnier, averaged weights; the preset; the training split alone."""
    settings = options.read(str(ROOT / 'options' / f'train_rsblur_{name}.yml'))
    train, data = settings['train'], settings['datasets']
    stages = train['progressive']
    assert stages['gt_sizes'] == [512, 1024]
    assert sum(stages['iters']) == train['total_iter'] == train['scheduler']['total_iter']
    assert train['pixel_opt']['type'] == 'CharbonnierLoss'
    assert train['ema_decay'] == 0.999
    assert data['train']['dataroot_gt'] == 'datasets/rsblur/train_gt.lmdb'
    assert data['val']['dataroot_gt'] == 'datasets/rsblur/val_gt.lmdb'
    kind = zoo.network_class('DSGformer')
    network = {key: value for key, value in settings['network_g'].items() if key not in ('type', 'recompute')}
    preset = {**kind.default_settings(), **zoo.get(name).settings}
    assert {key: plain(preset[key]) for key in network} == network
    assert {key for key in preset if preset[key] != kind.default_settings()[key]} <= network.keys()


def plain(value: Any) -> Any:
    """A setting as YAML has it."""
    return list(value) if isinstance(value, tuple) else value


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
def test_fault_is_named_with_its_fix(edit: Any, words: list[str], project: Path) -> None:
    settings = tiny_options()
    edit(settings)
    message = fault(settings)
    for word in words:
        assert word in message


def test_all_faults_at_once(project: Path) -> None:
    settings = tiny_options()
    for place, value in [
        ('train/ema_deacy', 0.9),
        ('val/tile', -1),
        ('network_g/widht', 4),
        ('num_gpu', 'all'),
    ]:
        change(place, value)(settings)
    with pytest.raises(UserError) as caught:
        options.check(settings, 'train.yml', is_train=True)
    head, *lines = str(caught.value).splitlines()
    assert head == 'train.yml has 4 faults:'
    assert len(lines) == 4
    assert "unknown key 'ema_deacy'; did you mean ema_decay?" in str(caught.value)


def test_checkpoint_of_another_network(project: Path) -> None:
    settings = tiny_options()
    torch.save({'params': {'conv.weight': torch.ones(3, 3)}}, project / 'other.pth')
    settings['path']['pretrain_network_g'] = 'other.pth'
    assert 'does not fit DSGformer' in fault(settings)
    settings['path'] |= {'strict_load_g': False, 'param_key_g': 'params_emma'}
    assert 'params_emma' in fault(settings)


def test_truncated_and_damaged_lmdbs(project: Path) -> None:
    settings = tiny_options()
    data = project / 'datasets' / 'sample' / 'train_gt.lmdb' / 'data.mdb'
    whole = data.read_bytes()
    for damaged, word in [
        (whole[:-4096], 'truncated'),
        (whole[:100], 'not an LMDB'),
        (b'x' * 9000, 'not an LMDB'),
    ]:
        data.write_bytes(damaged)
        assert word in fault(settings)


def test_pairs_of_different_sizes(project: Path) -> None:
    settings = tiny_options()
    write_lmdb(project / 'wide.lmdb', {f'train-{i}': np.zeros((40, 49, 3), np.uint8) for i in range(2)})
    settings['datasets']['train']['dataroot_lq'] = 'wide.lmdb'
    assert 'is 49×40 in dataroot_lq and 48×40 in dataroot_gt' in fault(settings)


def test_nothing_is_archived_for_a_run_that_cannot_start(project: Path, tmp_path: Path) -> None:
    """Issue 15, item 14: these failed after the earlier run's folder had been renamed."""
    earlier = project / 'experiments' / 'tiny'
    earlier.mkdir(parents=True)
    torch.save({'params': {'conv.weight': torch.ones(3, 3)}}, project / 'other.pth')
    before = sorted(os.listdir(project))
    for forced in [
        'train:optim_g:lr="2e-4"',
        'train:optim_g:type=Adamm',
        'path:pretrain_network_g=other.pth',
    ]:
        file = write_project(project, tiny_options())
        with pytest.raises(SystemExit) as caught:
            basicsr.main(['train', '-opt', str(file), '--force_yml', forced])
        assert caught.value.code == 2
    assert sorted(os.listdir(project)) == sorted([*before, 'options'])
    assert os.listdir(project / 'experiments') == ['tiny']


def test_empty_and_unfinished_lmdbs(project: Path) -> None:
    settings = tiny_options()
    write_lmdb(project / 'empty.lmdb', {})
    settings['datasets']['train']['dataroot_gt'] = 'empty.lmdb'
    assert 'empty' in fault(settings)
    (project / 'half.lmdb').mkdir()
    settings['datasets']['train']['dataroot_gt'] = 'half.lmdb'
    assert 'not a finished LMDB' in fault(settings)


def test_images_without_counterpart(project: Path) -> None:
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


@pytest.mark.parametrize(
    ('text', 'value'),
    [
        ('no', False),
        ('on', True),
        ('2.0e-4', 2e-4),
        ('2e-4', 2e-4),
        ('null', None),
        ('~', None),
        ('', None),
        ('-1', -1),
        ('{a: 1, b: [x, 2.5]}', {'a': 1, 'b': ['x', 2.5]}),
        ('a=b=c', 'a=b=c'),
        ('"1"', '1'),
        ('2020-01-01', '2020-01-01'),
    ],
)
def test_forced_values_are_read_as_the_file_is(text: str, value: Any, tmp_path: Path) -> None:
    settings = tiny_options()
    options.force(settings, [f'train:key={text}'])
    (tmp_path / 'x.yml').write_text(f'key: {text}\n')
    assert settings['train']['key'] == value
    assert type(settings['train']['key']) is type(value)
    assert options.read(str(tmp_path / 'x.yml')) == {'key': value}


@pytest.mark.parametrize(
    'entry', ['a=[1', 'a=!!python/name:os', 'a=x\nb: 1', 'a=b: c', 'a={<<: 1}', 'a=.inf', '=1']
)
def test_forced_values_that_are_refused(entry: str) -> None:
    with pytest.raises(UserError, match='--force_yml'):
        options.force(tiny_options(), [entry])


def test_forced_values_reach_the_run_as_they_were_read(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 15, item 6: `use_hflip=no` trained as true, and a rate arrived as text."""
    handed = {}
    monkeypatch.setattr(pipelines, 'train', lambda opt, file: handed.update(opt) or 0)
    file = write_project(project, tiny_options())
    forced = ['datasets:train:use_hflip=no', 'train:optim_g:lr=2e-4', 'path:pretrain_network_g=null']
    assert basicsr.main(['train', '-opt', str(file), '--force_yml', *forced]) == 0
    assert handed['datasets']['train']['use_hflip'] is False
    assert handed['train']['optim_g']['lr'] == 2e-4
    assert handed['path']['pretrain_network_g'] is None
