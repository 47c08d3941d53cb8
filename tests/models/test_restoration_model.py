"""The training model: other networks than DSGformer, several outputs, precision, EMA, progressive sizes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

from dsgformer_arch.archs.layers.network import RestorationNetwork
from dsgformer_arch.models.restoration_model import Interrupted, RestorationModel
from dsgformer_arch.utils.errors import UserError
from tests.trees import tiny_options


class Pyramid(RestorationNetwork):
    """Two outputs, the second one full size; its sides must be multiples of 6."""

    pad_multiple = 6
    min_size = 12
    final_output = 1

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)

    def forward_padded(self, x: Tensor) -> list[Tensor]:
        assert x.shape[-1] % 6 == 0
        assert x.shape[-2] % 6 == 0
        y = self.norm(self.layer(x))
        return [y[..., ::2, ::2], y]


@pytest.fixture
def _pyramid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCH_REGISTRY._obj_map, 'Pyramid', Pyramid)


def build(tmp_path: Path, **changes: Any) -> RestorationModel:
    options = tiny_options() | {'is_train': True, 'dist': False, 'rank': 0, 'world_size': 1}
    options['path'] |= {'models': str(tmp_path), 'training_states': str(tmp_path), 'log': str(tmp_path)}
    options['path'] |= {'experiments_root': str(tmp_path), 'visualization': str(tmp_path)}
    options['train'] |= changes.pop('train', {})
    options |= changes
    return RestorationModel(copy.deepcopy(options))


def batch(count: int = 2, size: int = 24) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    gt = torch.rand(count, 3, size, size, generator=generator)
    return {'gt': gt, 'lq': nn.functional.avg_pool2d(gt, 3, 1, 1)}


def step(model: RestorationModel, data: dict[str, Tensor], iteration: int = 1) -> None:
    model.feed_data(data)
    model.optimize_parameters(iteration)


@pytest.mark.usefixtures('_pyramid')
def test_several_outputs_are_judged_on_the_final_one(tmp_path: Path) -> None:
    model = build(tmp_path, network_g={'type': 'Pyramid'})
    data = batch()
    step(model, data)
    assert model.output.shape == data['gt'].shape
    expected = nn.functional.l1_loss(model.output, data['gt'])
    assert model.log_dict['l_pixel'] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.usefixtures('_pyramid')
def test_images_are_padded_to_what_a_network_needs(tmp_path: Path) -> None:
    model = build(tmp_path, network_g={'type': 'Pyramid'})
    model.feed_data({'lq': torch.rand(1, 3, 7, 17)})
    model.test()
    assert model.output.shape == (1, 3, 7, 17)


@pytest.mark.usefixtures('_pyramid')
def test_averages_follow_parameters_and_buffers(tmp_path: Path) -> None:
    model = build(tmp_path, network_g={'type': 'Pyramid'}, train={'ema_decay': 0.75})
    before = [p.clone() for p in model.net_g_ema.parameters()]
    step(model, batch())
    for old, average, new in zip(before, model.net_g_ema.parameters(), model.net_g.parameters(), strict=True):
        torch.testing.assert_close(average, 0.75 * old + 0.25 * new)
    torch.testing.assert_close(model.net_g_ema.norm.running_mean, model.net_g.norm.running_mean)


def test_gradients_are_clipped(tmp_path: Path) -> None:
    model = build(tmp_path, train={'grad_clip': 1e-3})
    step(model, batch())
    norm = torch.stack([p.grad.norm() for p in model.net_g.parameters()]).norm()
    assert norm <= 1e-3 * (1 + 1e-4)


def test_bf16_trains_close_to_float32(tmp_path: Path) -> None:
    losses = []
    for amp in (None, 'bf16'):
        torch.manual_seed(0)
        model = build(tmp_path, train={'amp': amp, 'channels_last': True})
        step(model, batch())
        losses.append(model.log_dict['l_pixel'])
        assert all(p.dtype == torch.float32 for p in model.net_g.parameters())
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    assert losses[1] != losses[0]


def test_loss_falls(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build(tmp_path, train={'ema_decay': 0})
    data = batch()
    values = []
    for iteration in range(1, 31):
        step(model, data, iteration)
        values.append(model.log_dict['l_pixel'])
    assert values[-1] < 0.92 * values[0]


def test_several_losses_are_summed(tmp_path: Path) -> None:
    second = {'edge_opt': {'type': 'CharbonnierLoss', 'loss_weight': 0.5}}
    model = build(tmp_path, train=second)
    step(model, batch())
    assert set(model.log_dict) == {'l_pixel', 'l_edge'}


def test_progressive_sizes(tmp_path: Path) -> None:
    stages = {'iters': [2, 3], 'batch_sizes': [2, 1], 'gt_sizes': [8, 16]}
    model = build(tmp_path, train={'progressive': stages})
    shapes = []
    for iteration in range(1, 5):
        step(model, batch(2, 24), iteration)
        shapes.append(tuple(model.lq.shape))
        assert model.gt.shape == model.lq.shape
    assert shapes == [(2, 3, 8, 8), (2, 3, 8, 8), (1, 3, 16, 16), (1, 3, 16, 16)]


def test_progressive_crops_stay_paired(tmp_path: Path) -> None:
    model = build(tmp_path, train={'progressive': {'iters': [1], 'batch_sizes': [1], 'gt_sizes': [8]}})
    data = batch(3, 24)
    model.feed_data({'gt': data['gt'], 'lq': data['gt'] + 1})
    model.shrink_batch(1)
    torch.testing.assert_close(model.lq, model.gt + 1)


@pytest.mark.parametrize('optimiser', ['AdamW', 'Adam', 'SGD', 'RAdam'])
def test_any_optimiser_of_torch(optimiser: str, tmp_path: Path) -> None:
    model = build(tmp_path, train={'optim_g': {'type': optimiser, 'lr': 1e-3}})
    assert type(model.optimizers[0]).__name__ == optimiser
    step(model, batch())


def test_unknown_optimiser_scheduler_and_settings(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='Adamm'):
        build(tmp_path, train={'optim_g': {'type': 'Adamm', 'lr': 1e-3}})
    with pytest.raises(UserError, match='momentun'):
        build(tmp_path, train={'optim_g': {'type': 'SGD', 'lr': 1e-3, 'momentun': 0.9}})
    with pytest.raises(UserError, match='CosineLR'):
        build(tmp_path, train={'scheduler': {'type': 'CosineLR'}})


def test_schedulers_of_basicsr_and_torch(tmp_path: Path) -> None:
    for settings in (
        {'type': 'MultiStepLR', 'milestones': [2], 'gamma': 0.5},
        {'type': 'CosineAnnealingRestartLR', 'periods': [4], 'restart_weights': [1]},
        {'type': 'CosineAnnealingLR', 'T_max': 4},
    ):
        model = build(tmp_path, train={'scheduler': settings})
        step(model, batch())
        model.update_learning_rate(2)
        assert model.get_current_learning_rate()[0] > 0


def test_saved_state_holds_what_resuming_needs(tmp_path: Path) -> None:
    model = build(tmp_path)
    step(model, batch())
    model.save(epoch=3, current_iter=1)
    state = torch.load(tmp_path / '1.state', weights_only=True)
    assert (state['epoch'], state['iter']) == (3, 1)
    seconds = model.trained_seconds
    other = build(tmp_path)
    other.resume_training(state)
    assert other.trained_seconds == pytest.approx(seconds)
    assert not list(tmp_path.glob('*.part*'))
    # What is drawn in an iteration follows from the seed and the iteration, whatever was drawn before.
    step(model, batch(), 2)
    draws = torch.rand(3)
    torch.rand(7)
    step(other, batch(), 2)
    assert torch.equal(torch.rand(3), draws)


def named(data: dict[str, Tensor], *names: str) -> dict[str, Any]:
    return {**data, 'lq_path': list(names)}


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_a_step_that_is_not_finite_is_skipped(value: float, tmp_path: Path, run_log: list[str]) -> None:
    model = build(tmp_path, train={'max_skipped_steps': 3})
    step(model, batch(), 1)
    before = copy.deepcopy([model.net_g.state_dict(), model.net_g_ema.state_dict()])
    moments = copy.deepcopy(model.optimizers[0].state_dict()['state'])
    bad = named(batch() | {'lq': torch.full((2, 3, 24, 24), value)}, 'cellar', 'roof')
    for iteration in (2, 3):
        step(model, bad, iteration)
        assert f'iteration {iteration}: the loss is not finite' in '\n'.join(run_log)
    for old, new in zip(before, [model.net_g, model.net_g_ema], strict=True):
        assert all(torch.equal(tensor, new.state_dict()[name]) for name, tensor in old.items())
    assert str(moments) == str(model.optimizers[0].state_dict()['state'])
    step(model, batch(), 4)  # a good one in between: the count in a row begins anew
    assert (model.skipped, model.skipped_in_a_row) == (2, 0)
    step(model, bad, 5)
    step(model, named(bad, 'garden', 'roof'), 6)
    with pytest.raises(
        UserError, match=r'3 iterations in a row.* images were cellar, roof, garden'
    ) as caught:
        step(model, bad, 7)
    assert '--auto_resume' in str(caught.value)


def test_a_gradient_that_is_not_finite_is_skipped(tmp_path: Path, run_log: list[str]) -> None:
    """The loss is finite: its derivative is not."""

    class Root(nn.Module):
        def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
            return (prediction * 0).sqrt().sum()

    model = build(tmp_path)
    model.losses = {'l_root': Root()}
    before = copy.deepcopy(model.net_g.state_dict())
    step(model, batch())
    assert 'the gradient is not finite' in '\n'.join(run_log)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.net_g.state_dict().items())


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    model = build(tmp_path)
    model.save(0, 1)
    with torch.no_grad():
        next(model.net_g.parameters()).fill_(float('nan'))
    with pytest.raises(UserError, match='not finite'):
        model.save(0, 2)
    assert sorted(path.name for path in tmp_path.glob('*.[ps]t*')) == ['1.state', 'net_g_1.pth']


@pytest.mark.parametrize(('count', 'parts'), [(4, 2), (4, 4), (3, 2), (2, 8)])
@pytest.mark.parametrize('reduction', ['mean', 'sum'])
def test_accumulated_parts_are_the_whole_batch(
    count: int, parts: int, reduction: str, tmp_path: Path
) -> None:
    gradients, losses = [], []
    for accumulate in (1, parts):
        torch.manual_seed(0)
        loss = {'type': 'L1Loss', 'loss_weight': 1.0, 'reduction': reduction}
        model = build(tmp_path, train={'accumulate': accumulate, 'pixel_opt': loss, 'grad_clip': None})
        step(model, batch(count))
        assert model.output.shape[0] == count
        gradients.append([p.grad for p in model.net_g.parameters()])
        losses.append(model.log_dict['l_pixel'])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for whole, parted in zip(*gradients, strict=True):
        torch.testing.assert_close(parted, whole, rtol=1e-4, atol=1e-5 * whole.abs().max().item() + 1e-9)


class Images(list[dict[str, Any]]):
    """Pairs of which the second one makes the network below return NaN."""

    opt: dict[str, Any]

    def __init__(self) -> None:
        super().__init__(
            {'lq': torch.full((3, 24, 24), value), 'gt': torch.full((3, 24, 24), 0.5), 'lq_path': f'{value}'}
            for value in (0.5, 0.0)
        )
        self.opt = {'name': 'pairs'}


class Inverse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x / x - 0.5 * self.scale


@pytest.mark.parametrize('is_train', [True, False])
def test_an_image_of_nan_is_not_measured(
    is_train: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_log: list[str]
) -> None:
    """A test stops; a training run continues, and such a validation is never its best one."""
    monkeypatch.setitem(ARCH_REGISTRY._obj_map, 'Inverse', Inverse)
    model = build(tmp_path, network_g={'type': 'Inverse'})
    model.opt['is_train'] = is_train
    loader = type('Loader', (), {'dataset': Images()})()
    if not is_train:
        with pytest.raises(UserError, match=r'not finite for the image 0'):
            model.validation(loader, 1, None)
        return
    model.validation(loader, 1, None)
    assert 'not finite for the image 0' in '\n'.join(run_log)
    assert model.best_metric_results['pairs']['psnr']['iter'] == -1
    record = json.loads((tmp_path / 'metrics_pairs.json').read_text())
    assert record['means']['psnr'] is None


def test_a_validation_stops_when_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(tmp_path)
    monkeypatch.setattr(RestorationModel, 'stop_requested', True)
    with pytest.raises(Interrupted):
        model.validation(type('Loader', (), {'dataset': Images()})(), 1, None)
    assert not (tmp_path / 'metrics_pairs.json').exists()
