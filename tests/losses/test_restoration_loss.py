"""The losses against the formulas of their releases, written out in NumPy's float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.models._api
from basicsr.losses import build_loss
from basicsr.utils.registry import LOSS_REGISTRY
from scipy.ndimage import correlate
from torch import Tensor

from dsgformer_arch.losses.restoration_loss import (
    CharbonnierRootLoss,
    ContrastLoss,
    EdgeLoss,
    FFTLoss,
    MultiScaleLoss,
    PSNRLoss,
)
from dsgformer_arch.utils.errors import UserError

Array: TypeAlias = 'np.ndarray[Any, np.dtype[np.float64]]'
Loss: TypeAlias = Callable[..., Tensor]


def images(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    sharp = rng.random(shape)
    restored = sharp + 0.05 * rng.standard_normal(shape)
    return torch.from_numpy(restored), torch.from_numpy(sharp)


def charbonnier(d: Array, eps: float = 1e-3) -> Array:
    return np.sqrt(d * d + eps * eps)


def laplacian(plane: Array) -> Array:
    taps = np.array([0.05, 0.25, 0.4, 0.25, 0.05])
    kernel = np.outer(taps, taps)
    spread = np.zeros_like(plane)
    spread[::2, ::2] = 4 * correlate(plane, kernel, mode='nearest')[::2, ::2]
    return plane - correlate(spread, kernel, mode='nearest')


def edges(batch: Tensor) -> Array:
    return np.stack([[laplacian(plane) for plane in image] for image in batch.numpy()])


def luma(batch: Tensor) -> Array:
    r, g, b = np.moveaxis(batch.numpy(), 1, 0)
    return (16 + 65.481 * r + 128.553 * g + 24.966 * b) / 255


def spectrum(batch: Tensor) -> Array:
    transform = np.fft.fft2(batch.numpy())
    return np.stack([transform.real, transform.imag], axis=-1)


def negative_psnr(d: Array) -> float:
    return float(np.mean([10 * np.log10((image**2).mean() + 1e-8) for image in d]))


CASES: dict[str, tuple[Loss, Callable[[Tensor, Tensor], float]]] = {
    'charbonnier': (CharbonnierRootLoss(), lambda x, y: float(charbonnier((x - y).numpy()).mean())),
    'charbonnier, eps': (
        CharbonnierRootLoss(eps=0.1),
        lambda x, y: float(charbonnier((x - y).numpy(), 0.1).mean()),
    ),
    'edge': (EdgeLoss(), lambda x, y: float(charbonnier(edges(x) - edges(y)).mean())),
    'edge, l1': (EdgeLoss(penalty='l1'), lambda x, y: float(np.abs(edges(x) - edges(y)).mean())),
    'fft': (FFTLoss(), lambda x, y: float(np.abs(spectrum(x) - spectrum(y)).mean())),
    'psnr': (PSNRLoss(), lambda x, y: negative_psnr((x - y).numpy())),
    'psnr, luma': (PSNRLoss(toY=True), lambda x, y: negative_psnr(luma(x) - luma(y))),
    'sum': (FFTLoss(reduction='sum'), lambda x, y: float(np.abs(spectrum(x) - spectrum(y)).sum())),
    'weight': (
        CharbonnierRootLoss(loss_weight=0.05),
        lambda x, y: 0.05 * float(charbonnier((x - y).numpy()).mean()),
    ),
}
case = pytest.mark.parametrize('name', CASES)


@case
@pytest.mark.parametrize('shape', [(2, 3, 12, 16), (1, 3, 7, 9)])
def test_equals_its_formula(name: str, shape: tuple[int, ...]) -> None:
    loss, formula = CASES[name]
    pred, target = images(*shape)
    assert loss(pred, target).item() == pytest.approx(formula(pred, target), rel=1e-12)


@case
def test_gradients_are_those_of_the_formula(name: str) -> None:
    loss, _ = CASES[name]
    pred, target = images(1, 3, 5, 6)
    assert torch.autograd.gradcheck(lambda x: loss(x, target), pred.requires_grad_())


@case
def test_gradient_is_finite_without_any_difference(name: str) -> None:
    loss, _ = CASES[name]
    target = images(1, 3, 8, 8)[1].float()
    pred = target.clone().requires_grad_()
    loss(pred, target).backward()
    assert pred.grad is not None
    assert torch.isfinite(pred.grad).all()


@case
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_compared_in_float32(name: str, dtype: torch.dtype) -> None:
    loss, _ = CASES[name]
    pred, target = (image.to(dtype) for image in images(1, 3, 16, 16))
    want = loss(pred.float(), target.float())
    assert loss(pred, target).dtype == torch.float32
    assert loss(pred, target) == want
    with torch.autocast('cpu', torch.bfloat16):
        assert loss(pred, target) == want


def test_charbonnier_is_basicsrs_at_the_squared_eps() -> None:
    pred, target = images(2, 3, 8, 8)
    theirs = build_loss({'type': 'CharbonnierLoss', 'eps': 1e-6})
    torch.testing.assert_close(CharbonnierRootLoss(eps=1e-3)(pred, target), theirs(pred, target))
    as_if_equal = build_loss({'type': 'CharbonnierLoss', 'eps': 1e-3})
    assert as_if_equal(pred, target) > 1.1 * theirs(pred, target)


def test_every_loss_is_registered() -> None:
    names = {'CharbonnierRootLoss', 'EdgeLoss', 'FFTLoss', 'PSNRLoss', 'ContrastLoss', 'MultiScaleLoss'}
    assert names <= set(LOSS_REGISTRY.keys())


@pytest.mark.parametrize('make', [lambda: FFTLoss(reduction='none'), lambda: EdgeLoss(penalty='l2')])
def test_unknown_choices_are_a_user_error(make: Callable[[], object]) -> None:
    with pytest.raises(UserError, match="is '"):
        make()


def reduced(target: Array, factor: int) -> Array:
    """Bilinear reduction by an even factor: the mean of the four pixels around each block's centre."""
    near, far = factor // 2 - 1, factor // 2
    rows = target[:, :, near::factor] + target[:, :, far::factor]
    return (rows[..., near::factor] + rows[..., far::factor]) / 4


def test_multi_scale_sums_over_scales_and_weights() -> None:
    pred, target = images(2, 3, 16, 24)
    outputs = [0.9 * pred[..., ::4, ::4], 0.8 * pred[..., ::2, ::2], pred]
    targets = [reduced(target.numpy(), 4), reduced(target.numpy(), 2), target.numpy()]
    l1 = [float(np.abs(o.numpy() - t).mean()) for o, t in zip(outputs, targets, strict=True)]
    base = {'type': 'L1Loss', 'loss_weight': 0.5}
    assert MultiScaleLoss(base)(outputs, target).item() == pytest.approx(0.5 * sum(l1), rel=1e-12)
    weighted = MultiScaleLoss(base, weights=[1, 2, 3], loss_weight=10)
    assert weighted(outputs, target).item() == pytest.approx(5 * (l1[0] + 2 * l1[1] + 3 * l1[2]), rel=1e-12)
    assert base == {'type': 'L1Loss', 'loss_weight': 0.5}


def test_multi_scale_reduces_an_odd_factor_to_the_centre() -> None:
    target = images(1, 3, 9, 15)[1]
    output = target[..., 1::3, 1::3].clone()
    assert MultiScaleLoss({'type': 'L1Loss'})([output], target).item() == pytest.approx(0, abs=1e-15)


def test_multi_scale_over_outputs_of_one_size_and_over_one_output() -> None:
    pred, target = images(2, 3, 8, 12)
    loss = MultiScaleLoss({'type': 'EdgeLoss'})
    single = EdgeLoss()
    torch.testing.assert_close(loss(pred, target), single(pred, target))
    both = single(pred, target) + single(pred / 2, target)
    torch.testing.assert_close(loss((pred, pred / 2), target), both)


def test_multi_scale_compares_half_precision_in_float32() -> None:
    pred, target = images(1, 3, 8, 8)
    outputs = [pred.bfloat16()[..., ::2, ::2], pred.bfloat16()]
    got = MultiScaleLoss({'type': 'L1Loss'})(outputs, target.float())
    want = MultiScaleLoss({'type': 'L1Loss'})([output.float() for output in outputs], target.float())
    assert got.dtype == torch.float32
    assert got == want


@pytest.mark.parametrize(
    ('options', 'sizes', 'message'),
    [
        ({'base': {'type': 'L2Loss'}}, [(8, 8)], 'EdgeLoss'),
        ({'base': {}}, [(8, 8)], 'type None'),
        ({'base': {'type': 'ContrastLoss'}}, [(8, 8)], 'degraded'),
        ({'base': {'type': 'L1Loss'}, 'weights': [1, 2]}, [(8, 8)], '2 weights for 1 outputs'),
        ({'base': {'type': 'L1Loss'}}, [(3, 8)], '3×8'),
        ({'base': {'type': 'L1Loss'}}, [(4, 8)], '4×8'),
    ],
)
def test_multi_scale_mistakes_are_user_errors(
    options: dict[str, Any], sizes: list[tuple[int, int]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        MultiScaleLoss(**options)([torch.zeros(1, 3, *size) for size in sizes], torch.zeros(1, 3, 8, 8))


@pytest.fixture(scope='module')
def vgg_state() -> dict[str, Tensor]:
    """Random weights under torchvision's names, of VGG-19's first convolutions and one beyond."""
    generator = torch.manual_seed(0)
    shapes = {0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128), 10: (256, 128), 12: (256, 256)}
    state = {}
    for index, shape in shapes.items():
        fan_in = 9 * shape[1]
        state[f'features.{index}.weight'] = (
            torch.randn(*shape, 3, 3, generator=generator) * (2 / fan_in) ** 0.5
        )
        state[f'features.{index}.bias'] = 0.1 * torch.randn(shape[0], generator=generator)
    return state


@pytest.fixture(scope='module')
def vgg_file(vgg_state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp('weights') / 'vgg19.pth'
    torch.save(vgg_state, path)
    return str(path)


def reference_features(state: dict[str, Tensor], x: Tensor) -> Tensor:
    for index in (0, 2, 5, 7, 10):
        x = F.max_pool2d(x, 2) if index in (5, 10) else x
        weight, bias = state[f'features.{index}.weight'], state[f'features.{index}.bias']
        x = F.relu(F.conv2d(x, weight.double(), bias.double(), padding=1))
    return x


def test_contrast_equals_its_formula(vgg_state: dict[str, Tensor], vgg_file: str) -> None:
    pred, sharp = images(2, 3, 16, 24)
    blurred = sharp.clone()
    blurred[:, :, :, 10:] += 0.2
    blurred[:, :, :, 2:5] += 0.005
    f, g, h = (reference_features(vgg_state, image - 0.5) for image in (pred, sharp, blurred))
    mask = reduced(((sharp - blurred).abs().mean(1, keepdim=True) > 0.01).double().numpy(), 4)
    ratio = (f - g).abs().mean(1, keepdim=True) / ((f - h).abs().mean(1, keepdim=True) + 1e-7)
    want = 0.5 * (ratio.numpy() * mask).sum() / mask.sum()
    loss = ContrastLoss(loss_weight=0.5, vgg_weights=vgg_file).double()
    assert loss(pred, sharp, blurred).item() == pytest.approx(want, rel=1e-12)
    pred.requires_grad_()
    loss(pred, sharp, blurred).backward()
    assert pred.grad is not None
    assert pred.grad.any()
    assert not any(p.requires_grad for p in loss.parameters())


def test_contrast_in_half_precision_and_at_its_edges(vgg_file: str) -> None:
    loss = ContrastLoss(vgg_weights=vgg_file)
    pred, sharp = images(1, 3, 16, 16)
    blurred = sharp + 0.1
    with torch.autocast('cpu', torch.bfloat16):
        low = loss(pred.bfloat16(), sharp.bfloat16(), blurred.bfloat16())
    assert low.dtype == torch.float32
    assert low == loss(*(image.bfloat16().float() for image in (pred, sharp, blurred)))
    assert loss(pred, sharp, sharp).item() == 0
    for start in (sharp, blurred):
        restored = start.clone().requires_grad_()
        loss(restored, sharp, blurred).backward()
        assert restored.grad is not None
        assert torch.isfinite(restored.grad).all()


def test_contrast_asks_torchvision_for_the_weights(
    vgg_state: dict[str, Tensor], vgg_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchvision.models._api, 'load_state_dict_from_url', lambda url, **_: vgg_state)
    pred, sharp = images(1, 3, 8, 8)
    want = ContrastLoss(vgg_weights=vgg_file)(pred, sharp, sharp + 0.1)
    assert ContrastLoss()(pred, sharp, sharp + 0.1) == want


def test_contrast_without_weights_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(url: str, **_: object) -> None:
        raise URLError('no route to host')

    monkeypatch.setattr(torchvision.models._api, 'load_state_dict_from_url', offline)
    with pytest.raises(UserError, match=r'no route to host.*vgg_weights'):
        ContrastLoss()
    for name, content in {
        'absent.pth': None,
        'text.pth': b'not weights',
        'other.pth': {'a': torch.zeros(1)},
    }.items():
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        with pytest.raises(UserError, match=name):
            ContrastLoss(vgg_weights=str(path))
