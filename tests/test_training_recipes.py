"""Every training option file trains: 20 iterations on a crop of the sample set, and its loss falls."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from dsgformer_arch.data.paired_crop_dataset import PairedCropDataset
from dsgformer_arch.data.prepare.sample_set import create_sample_set
from dsgformer_arch.models import options
from dsgformer_arch.models.restoration_model import RestorationModel
from tests.trees import ROOT

FILES = sorted((ROOT / 'options').glob('train_*.yml'))
SIDE = 64


def shortened(file: Path, folder: Path, vgg: Path) -> dict[str, Any]:
    """The file's options for 20 iterations on a CPU; network, losses, optimiser and rates stay."""
    settings = options.read(str(file))
    settings |= {'num_gpu': 0, 'is_train': True, 'dist': False, 'rank': 0, 'world_size': 1}
    settings['path'] |= {'models': str(folder), 'training_states': str(folder), 'log': str(folder)}
    settings['logger']['print_freq'] = 1
    train = settings['train']
    train['total_iter'] = 20
    scheduler = train['scheduler']
    for key in ('total_iter', 'T_max'):
        if key in scheduler:
            scheduler[key] = 20
    if 'warmup_iter' in scheduler:
        scheduler['warmup_iter'] = 2
    if 'progressive' in train:
        stages = train['progressive']
        stages['batch_sizes'] = [1] * len(stages['iters'])
        stages['gt_sizes'] = [SIDE] * len(stages['iters'])
    if settings['network_g']['type'] == 'ConvIR':
        settings['network_g']['dilations'] = [1, 2, 3]  # the release's need images of 256
    if 'contrast_opt' in train:
        train['contrast_opt']['vgg_weights'] = str(vgg)
    return settings


@pytest.fixture(scope='module')
def sample_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('sample')
    create_sample_set(folder)
    return folder


def crop_of(sample_set: Path) -> dict[str, torch.Tensor]:
    """A batch of one crop.  The same one in every step, as 20 of them differ by more than 20 steps gain."""
    random.seed(0)
    dataset = PairedCropDataset(
        {
            'scale': 1,
            'phase': 'train',
            'dataroot_gt': str(sample_set / 'train_gt.lmdb'),
            'dataroot_lq': str(sample_set / 'train_lq.lmdb'),
            'io_backend': {'type': 'lmdb'},
            'gt_size': SIDE,
            'use_hflip': False,
            'use_rot': False,
        }
    )
    return {side: dataset[0][side][None] for side in ('lq', 'gt')}


@pytest.mark.long
@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_loss_falls_in_20_iterations(file: Path, sample_set: Path, tmp_path: Path, vgg_weights: Path) -> None:
    torch.manual_seed(0)
    model = RestorationModel(shortened(file, tmp_path, vgg_weights))
    batch = crop_of(sample_set)
    totals = []
    for iteration in range(1, 21):
        model.update_learning_rate(iteration)
        model.feed_data(batch)
        model.optimize_parameters(iteration)
        totals.append(sum(model.log_dict.values()))
    assert all(torch.isfinite(torch.tensor(totals)))
    assert sum(totals[-3:]) < sum(totals[:3]), totals
    # Several processes wait for every gradient, unless they are told that some never come.
    without = [name for name, p in model.net_g.named_parameters() if p.requires_grad and p.grad is None]
    assert bool(without) == model.opt.get('find_unused_parameters', False), without
