"""Every training option file trains: 20 iterations on one small pair, and its loss falls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dsgformer_arch import options
from dsgformer_arch.models.dsgformer_model import DSGformerModel
from tests.trees import ROOT, photograph

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


@pytest.mark.long
@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_loss_falls_in_20_iterations(file: Path, tmp_path: Path, vgg_weights: Path) -> None:
    torch.manual_seed(0)
    model = DSGformerModel(shortened(file, tmp_path, vgg_weights))
    sharp = torch.from_numpy(photograph(3, SIDE, SIDE)).permute(2, 0, 1)[None].float() / 255
    kernel = torch.full((3, 1, 1, 9), 1 / 9)
    blurred = torch.nn.functional.conv2d(
        torch.nn.functional.pad(sharp, (4, 4, 0, 0), 'replicate'), kernel, groups=3
    )
    totals = []
    for iteration in range(1, 21):
        model.update_learning_rate(iteration)
        model.feed_data({'lq': blurred, 'gt': sharp})
        model.optimize_parameters(iteration)
        totals.append(sum(model.log_dict.values()))
    assert all(torch.isfinite(torch.tensor(totals)))
    assert sum(totals[-3:]) < sum(totals[:3]), totals
