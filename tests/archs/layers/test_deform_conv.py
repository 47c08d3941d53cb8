"""Deformable convolution in plain PyTorch against a loop over its definition, and against torchvision."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dsgformer_arch.archs.layers import deform_conv
from dsgformer_arch.archs.layers.deform_conv import deform_conv2d, deform_conv2d_gathered


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sample(image: Tensor, y: float, x: float) -> float:
    """Bilinear value of (H, W) at (y, x); zero outside."""
    total = 0.0
    for row, column in itertools.product(
        (math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)
    ):
        if 0 <= row < image.shape[0] and 0 <= column < image.shape[1]:
            total += (1 - abs(y - row)) * (1 - abs(x - column)) * image[row, column].item()
    return total


def reference(
    image: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    mask: Any,
) -> Tensor:
    """The definition, output by output."""
    n, channels, _, _ = image.shape
    out_channels, per_group, kh, kw = weight.shape
    oh, ow = offset.shape[-2:]
    offset_groups = offset.shape[1] // (2 * kh * kw)
    out = torch.zeros(n, out_channels, oh, ow, dtype=torch.float64)
    for b, o, i, j in itertools.product(range(n), range(out_channels), range(oh), range(ow)):
        value = 0.0 if bias is None else bias[o].item()
        group = o // (out_channels // (channels // per_group))
        for c, u, v in itertools.product(range(per_group), range(kh), range(kw)):
            channel = group * per_group + c
            which = (channel // (channels // offset_groups)) * kh * kw + u * kw + v
            y = i * stride[0] - padding[0] + u * dilation[0] + offset[b, 2 * which, i, j].item()
            x = j * stride[1] - padding[1] + v * dilation[1] + offset[b, 2 * which + 1, i, j].item()
            share = 1.0 if mask is None else mask[b, which, i, j].item()
            value += weight[o, c, u, v].item() * share * sample(image[b, channel], y, x)
        out[b, o, i, j] = value
    return out


CASES = [
    {},
    {'groups': 4},
    {'groups': 2, 'offset_groups': 2},
    {'stride': (2, 1), 'padding': (0, 2)},
    {'dilation': (2, 1), 'masked': True},
    {'groups': 4, 'offset_groups': 4, 'masked': True, 'biased': False},
]


def arguments(
    groups: int = 1,
    offset_groups: int = 1,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    masked: bool = False,
    biased: bool = True,
) -> tuple[Any, ...]:
    height, width, kernel = 6, 5, (3, 3)
    size = [
        (side + 2 * p - d * (k - 1) - 1) // s + 1
        for side, k, s, p, d in zip((height, width), kernel, stride, padding, dilation, strict=True)
    ]
    offset = 2.5 * random(2, 2 * 9 * offset_groups, *size, seed=1)
    offset[0, :, 0, 0] = torch.tensor([-1.0, 1.0, 0.0]).repeat(6 * offset_groups)  # whole pixels, and borders
    mask = random(2, 9 * offset_groups, *size, seed=2).sigmoid() if masked else None
    bias = random(4, seed=3) if biased else None
    return (
        random(2, 4, height, width),
        offset,
        random(4, 4 // groups, 3, 3, seed=4),
        bias,
        stride,
        padding,
        dilation,
        mask,
    )


@pytest.mark.parametrize('case', CASES, ids=str)
def test_equals_the_definition(case: dict[str, Any]) -> None:
    values = arguments(**case)
    torch.testing.assert_close(deform_conv2d_gathered(*values), reference(*values), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(deform_conv2d(*values), reference(*values), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize('case', [{'groups': 2, 'masked': True}, {'groups': 4}], ids=str)
def test_gradients(case: dict[str, Any]) -> None:
    """Of image, offset, weight, bias and mask against finite differences, away from the kinks."""
    image, offset, weight, bias, *geometry, mask = arguments(**case)
    offset = offset + 0.013  # off whole pixels, where the derivative jumps
    inputs = [t[:1].clone() if i < 2 else t for i, t in enumerate((image, offset, weight, bias))]
    inputs += [] if mask is None else [mask[:1].clone()]
    inputs = [t.requires_grad_() for t in inputs]

    def run(*tensors: Any) -> Tensor:
        return deform_conv2d_gathered(*tensors[:4], *geometry, *tensors[4:])

    assert torch.autograd.gradcheck(run, inputs, eps=1e-6, atol=1e-5, fast_mode=True)


def test_zero_offsets_are_an_ordinary_convolution() -> None:
    image, weight = random(2, 6, 9, 8), random(6, 1, 3, 3, seed=1)
    offset = torch.zeros(2, 18, 9, 8, dtype=torch.float64)
    expected = torch.nn.functional.conv2d(image, weight, padding=1, groups=6)
    torch.testing.assert_close(deform_conv2d(image, offset, weight, padding=1), expected)


def test_far_offsets_read_zeros() -> None:
    image, weight = random(1, 2, 5, 5), random(2, 1, 3, 3, seed=1)
    offset = torch.full((1, 18, 5, 5), 1e6, dtype=torch.float64)
    assert deform_conv2d(image, offset, weight, padding=1).abs().max() == 0


@pytest.mark.parametrize('case', CASES, ids=str)
def test_equals_torchvision(case: dict[str, Any]) -> None:
    if not deform_conv.TORCHVISION_LOADS:
        pytest.skip("torchvision's compiled operators do not load beside this build of torch")
    values: list[Any] = [v.requires_grad_() if isinstance(v, Tensor) else v for v in arguments(**case)]
    results, gradients = [], []
    for form in (deform_conv2d_gathered, deform_conv.torchvision_deform_conv2d):
        y = form(*values)
        results.append(y)
        gradients.append(torch.autograd.grad(y.square().sum(), [v for v in values if isinstance(v, Tensor)]))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ('name', 'shape'),
    [
        ('offset', (2, 18, 6, 4)),  # not the size of the output
        ('offset', (2, 16, 6, 5)),  # not two numbers a tap
        ('offset', (2, 54, 6, 5)),  # three offset groups of four channels
        ('weight', (4, 3, 3, 3)),  # three channels a group of four
        ('weight', (3, 2, 3, 3)),  # three outputs of two groups
        ('bias', (3,)),
        ('mask', (2, 8, 6, 5)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(name: str, shape: tuple[int, ...]) -> None:
    shapes = {'input': (2, 4, 6, 5), 'offset': (2, 18, 6, 5), 'weight': (4, 4, 3, 3)}
    tensors: dict[str, Any] = {key: random(*size) for key, size in shapes.items()}
    assert deform_conv2d(**tensors, padding=1).shape == (2, 4, 6, 5)
    with pytest.raises(ValueError, match=name if name != 'weight' else 'kernel'):
        deform_conv2d(**{**tensors, name: random(*shape)}, padding=1)


def test_a_nan_offset_spoils_its_own_pixel_only() -> None:
    image, weight = random(1, 2, 5, 5), random(2, 1, 3, 3, seed=1)
    offset = random(1, 18, 5, 5, seed=2)
    offset[0, 7, 2, 3] = math.nan
    y = deform_conv2d_gathered(image, offset, weight, padding=(1, 1))
    expected = torch.zeros(1, 2, 5, 5, dtype=torch.bool)
    expected[..., 2, 3] = True
    assert torch.equal(y.isnan(), expected)


def test_keeps_the_memory_format() -> None:
    image, offset, weight, *_ = arguments(groups=4)
    last = image.contiguous(memory_format=torch.channels_last)
    y, y_last = (deform_conv2d(x, offset, weight, padding=1) for x in (image, last))
    assert y.is_contiguous()
    assert y_last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, y_last)


def test_exports_for_any_size() -> None:
    class Layer(torch.nn.Module):
        def forward(self, image: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
            return deform_conv2d(image, offset, weight, padding=1)

    side = torch.export.Dim('side', min=4, max=64)
    sizes = {2: side, 3: side}
    small = (random(1, 4, 6, 6), random(1, 18, 6, 6, seed=1), random(4, 1, 3, 3, seed=2))
    exported = torch.export.export(Layer(), small, dynamic_shapes=(sizes, sizes, None)).module()
    large = (random(1, 4, 9, 9), random(1, 18, 9, 9, seed=1), small[2])
    torch.testing.assert_close(exported(*large), Layer()(*large))


def test_bfloat16_keeps_exact_coordinates() -> None:
    """Offsets are not rounded to bfloat16's 8 bits where autocast is on."""
    image, offset, weight, bias, *_ = arguments()
    a, b, c, d = (t.float() for t in (image, offset, weight, bias))
    with torch.autocast('cpu', torch.bfloat16):
        y = deform_conv2d(a, b, c, d, padding=1)
    expected = deform_conv2d(image, offset, weight, bias, padding=1)
    assert (y.double() - expected).abs().max() < 0.05 * expected.abs().max()
