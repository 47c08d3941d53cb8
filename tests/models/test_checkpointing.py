"""Checkpoints: complete pairs only, damage found, tensors checked against the network."""

from __future__ import annotations

import copy
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dsgformer_arch.models import checkpointing
from dsgformer_arch.models.checkpointing import DamagedError
from dsgformer_arch.models.restoration_model import RestorationModel
from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.files import sha256
from tests.models.test_restoration_model import batch, build, step


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run with checkpoints of iterations 2, 9 and 10."""
    for folder in ('models', 'training_states'):
        (tmp_path / folder).mkdir()
    for iteration in (2, 9, 10):
        network = tmp_path / 'models' / f'net_g_{iteration}.pth'
        torch.save({'params': {'weight': torch.rand(50)}}, network)
        state = {'epoch': 0, 'iter': iteration, 'optimizers': [], 'schedulers': []}
        state['files'] = {'network': sha256(network)}
        torch.save(state, tmp_path / 'training_states' / f'{iteration}.state')
    return tmp_path


def flip_a_bit(path: Path) -> None:
    """In the middle of the data of the largest record."""
    with zipfile.ZipFile(path) as archive:
        record = max(archive.infolist(), key=lambda entry: entry.file_size)
    content = bytearray(path.read_bytes())
    content[record.header_offset + 64 + record.file_size // 2] ^= 1
    path.write_bytes(content)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def found(run: Path) -> str | None:
    path = checkpointing.find_state(str(run / 'training_states'))
    return None if path is None else Path(path).name


def test_the_newest_checkpoint_counts_by_number(run: Path) -> None:
    assert found(run) == '10.state'
    assert found(run / 'nowhere') is None


@pytest.mark.parametrize('file', ['models/net_g_10.pth', 'training_states/10.state'])
@pytest.mark.parametrize('damage', [flip_a_bit, cut_off, Path.unlink, lambda path: path.write_bytes(b'')])
def test_a_damaged_one_is_skipped_with_one_sentence(
    file: str, damage: Callable[[Path], Any], run: Path, run_log: list[str]
) -> None:
    damage(run / file)
    assert found(run) == '9.state'
    if (run / 'training_states' / '10.state').exists():  # without its state there is no checkpoint to skip
        assert len(run_log) == 1
        assert 'skipping a checkpoint' in run_log[0]
        assert '10' in run_log[0]


def test_a_network_of_another_checkpoint_is_not_a_pair(run: Path) -> None:
    shutil.copy(run / 'models' / 'net_g_9.pth', run / 'models' / 'net_g_10.pth')
    with pytest.raises(DamagedError, match='not the network that was saved with'):
        checkpointing.read_checkpoint(str(run / 'training_states' / '10.state'))


def test_states_without_a_digest_can_be_read(run: Path) -> None:
    """BasicSR writes them so."""
    state = {'epoch': 0, 'iter': 10, 'optimizers': [], 'schedulers': []}
    torch.save(state, run / 'training_states' / '10.state')
    assert found(run) == '10.state'
    flip_a_bit(run / 'models' / 'net_g_10.pth')
    assert found(run) == '9.state'


def test_a_compressed_file_is_not_unpacked(run: Path) -> None:
    path = run / 'training_states' / '10.state'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('archive/data.pkl', bytes(10**6))
    with pytest.raises(DamagedError, match='compressed'):
        checkpointing.read_state(str(path))


def test_anything_but_a_state_is_refused(run: Path) -> None:
    path = run / 'training_states' / '10.state'
    for content in ([], {'iter': 1}, {'epoch': 0, 'iter': 'one'}, {'epoch': 0, 'iter': 1, 'optimizers': 3}):
        torch.save(content, path)
        with pytest.raises(DamagedError, match='not a training state'):
            checkpointing.read_state(str(path))


def test_old_checkpoints_are_pruned(run: Path) -> None:
    for name in ('net_g_latest.pth', 'net_g_best.pth'):
        (run / 'models' / name).write_bytes(b'x')
    checkpointing.prune(str(run / 'training_states'), str(run / 'models'), 2)
    assert {path.name for path in (run / 'training_states').iterdir()} == {'9.state', '10.state'}
    assert {path.name for path in (run / 'models').iterdir()} == {
        'net_g_9.pth', 'net_g_10.pth', 'net_g_latest.pth', 'net_g_best.pth',
    }  # fmt: skip


def test_leftovers_are_removed_and_nothing_else(run: Path) -> None:
    (run / 'models' / 'net_g_11.pth.part4711').write_bytes(b'half')
    (run / 'models' / 'mine.partial').write_bytes(b'mine')
    checkpointing.remove_leftovers([str(run / 'models'), str(run / 'nowhere')])
    names = {path.name for path in (run / 'models').iterdir()}
    assert 'mine.partial' in names
    assert not any('part4711' in name for name in names)


# States against networks.


@pytest.fixture
def saved(tmp_path: Path) -> tuple[RestorationModel, dict[str, Any]]:
    """A model after a step, and the state that it saved."""
    model = build(tmp_path, train={'channels_last': True})
    step(model, batch())
    model.save(0, 1)
    return model, checkpointing.read_state(str(tmp_path / '1.state'))


def entry(state: dict[str, Any]) -> dict[str, Any]:
    """Of the first parameter, a kernel of 3 × 3."""
    return state['optimizers'][0]['state'][0]


def damaged(change: Callable[[dict[str, Any]], Any], state: dict[str, Any]) -> dict[str, Any]:
    state = copy.deepcopy(state)
    change(state)
    return state


DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    'smaller': lambda state: entry(state).update(exp_avg=torch.zeros(1)),
    'other shape': lambda state: entry(state).update(exp_avg_sq=torch.zeros(3, 3, 3, 4)),
    'whole numbers': lambda state: entry(state).update(exp_avg=entry(state)['exp_avg'].int()),
    'complex': lambda state: entry(state).update(exp_avg=entry(state)['exp_avg'] * 1j),
    'NaN': lambda state: entry(state).update(exp_avg=entry(state)['exp_avg'] * float('nan')),
    'sparse': lambda state: entry(state).update(exp_avg=entry(state)['exp_avg'].to_sparse()),
    'step of many': lambda state: entry(state).update(step=torch.zeros(5)),
    'missing parameter': lambda state: state['optimizers'][0]['param_groups'][0]['params'].pop(),
    'unknown parameter': lambda state: state['optimizers'][0]['state'].update({999: entry(state)}),
    'text for a number': lambda state: state['optimizers'][0]['param_groups'][0].update(lr='1e-3'),
    'no groups': lambda state: state['optimizers'][0].pop('param_groups'),
    'no optimizer': lambda state: state['optimizers'].clear(),
    'other schedule': lambda state: state['schedulers'][0].update(milestones=[3]),
    'no schedule': lambda state: state['schedulers'].__setitem__(0, 7),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_state_that_does_not_fit_is_refused(
    damage: str, saved: tuple[RestorationModel, dict[str, Any]], tmp_path: Path
) -> None:
    """PyTorch's fused optimizers would read beyond the tensor's end."""
    model = build(tmp_path)
    before = copy.deepcopy(model.optimizers[0].state_dict())
    with pytest.raises(UserError):
        model.resume_training(damaged(DAMAGES[damage], saved[1]))
    assert str(model.optimizers[0].state_dict()) == str(before)
    model.resume_training(saved[1])
    step(model, batch(), 2)


def test_a_state_of_another_network_is_refused(
    saved: tuple[RestorationModel, dict[str, Any]], tmp_path: Path
) -> None:
    network = saved[0].opt['network_g'] | {'width': 8}
    with pytest.raises(UserError, match='belongs to another network'):
        build(tmp_path, network_g=network).resume_training(saved[1])


@pytest.mark.parametrize('channels_last', [False, True])
def test_the_memory_format_may_change(
    channels_last: bool, saved: tuple[RestorationModel, dict[str, Any]], tmp_path: Path
) -> None:
    """Fused optimizers go through memory, whatever the strides."""
    path = str(tmp_path / 'net_g_1.pth')
    model = build(tmp_path, train={'channels_last': channels_last})
    model.load_network(model.net_g, path)
    model.resume_training(saved[1])
    for each in (model, saved[0]):
        step(each, batch(), 2)
    for name, value in saved[0].net_g.state_dict().items():
        torch.testing.assert_close(model.net_g.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize('schedule', [
    {'type': 'MultiStepLR', 'milestones': [2], 'gamma': 0.5},
    {'type': 'CosineAnnealingLR', 'T_max': 4},
    {'type': 'WarmupCosineLR', 'total_iter': 4, 'warmup_iter': 1},
])  # fmt: skip
@pytest.mark.parametrize('optimizer', ['AdamW', 'SGD', 'NAdam', 'ASGD', 'Adafactor', 'Adagrad'])
def test_any_optimizer_and_schedule_resumes(schedule: dict[str, Any], optimizer: str, tmp_path: Path) -> None:
    settings = {'optim_g': {'type': optimizer, 'lr': 1e-3}, 'scheduler': schedule}
    model = build(tmp_path, train=settings)
    for iteration in (1, 2):
        model.update_learning_rate(iteration)
        step(model, batch(), iteration)
    model.save(0, 2)
    other = build(tmp_path, train=settings)
    other.load_network(other.net_g, str(tmp_path / 'net_g_2.pth'))
    other.resume_training(checkpointing.read_state(str(tmp_path / '2.state')))
    for each in (model, other):
        each.update_learning_rate(3)
        step(each, batch(), 3)
    assert model.get_current_learning_rate() == other.get_current_learning_rate()
    for name, value in model.net_g.state_dict().items():
        assert torch.equal(other.net_g.state_dict()[name], value), name


def test_changed_settings_hold_and_are_logged(
    saved: tuple[RestorationModel, dict[str, Any]], tmp_path: Path, run_log: list[str]
) -> None:
    optim = {'type': 'AdamW', 'lr': 1e-3, 'weight_decay': 0.5, 'betas': [0.9, 0.999]}
    schedule = {'type': 'WarmupCosineLR', 'total_iter': 4, 'warmup_iter': 1, 'eta_min': 1e-4}
    model = build(tmp_path, train={'optim_g': optim, 'scheduler': schedule})
    model.resume_training(saved[1])
    assert 'train: optim_g: lr was 0.002 and is 0.001 from now on' in '\n'.join(run_log)
    assert 'weight_decay was 0.0001 and is 0.5' in '\n'.join(run_log)
    assert 'eta_min was 1e-06 and is 0.0001' in '\n'.join(run_log)
    assert len(run_log) == 3
    model.update_learning_rate(2)
    assert model.optimizers[0].param_groups[0]['weight_decay'] == 0.5
    assert model.get_current_learning_rate() == [pytest.approx(1e-3)]  # the peak follows the warm-up
    model.update_learning_rate(4)
    model.update_learning_rate(4)
    assert model.get_current_learning_rate() == [pytest.approx(1e-4)]
