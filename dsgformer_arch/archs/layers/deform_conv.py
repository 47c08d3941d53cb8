"""Deformable convolution (Dai et al., ICCV 2017; with masks: Zhu et al., CVPR 2019).

    y(p) = b + Σ_k W_k · m_k(p) · x( p·stride − padding + k·dilation + Δ_k(p) )

over the taps k of the kernel, with x read bilinearly and 0 outside the image.
torchvision's operator computes it where the installed wheel's library loads;
elsewhere `deform_conv2d_gathered` does, in plain PyTorch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.extension import _has_ops
from torchvision.ops import deform_conv2d as torchvision_deform_conv2d

Pair = int | tuple[int, int]

TORCHVISION_LOADS: bool = _has_ops()
"""Whether torchvision's compiled operators can be called in this process."""


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """Deformable convolution with the semantics of `torchvision.ops.deform_conv2d`.

    Half-precision tensors (autocast's too) are computed with in float32: a
    bf16 coordinate beyond 128 has no fraction left to interpolate with.

    Args:
        input: (B, C_in, H, W).
        offset: displacement Δ of every tap at every output pixel, in input
            pixels, (B, 2·G·kh·kw, H_out, W_out) for G offset groups; channel
            2·(g·kh·kw + k) moves tap k down, the channel after it to the right.
        weight: kernel, (C_out, C_in / groups, kh, kw); the number of groups
            follows from its second dimension.
        bias: (C_out,), or none.
        stride: of the output's grid, in input pixels; a number or (vertical, horizontal).
        padding: rows and columns of zeros around the input.
        dilation: between two taps, in input pixels.
        mask: factor of every tap's sample, (B, G·kh·kw, H_out, W_out), or none.

    Returns:
        (B, C_out, H_out, W_out) in the data type of `input`, channels last where `input` is.

    Raises:
        ValueError: if the shapes do not fit each other.
    """
    stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
    _check_shapes(input, offset, weight, bias, stride, padding, dilation, mask)
    working = torch.promote_types(input.dtype, torch.float32)
    form = torchvision_deform_conv2d if TORCHVISION_LOADS else deform_conv2d_gathered
    output = form(
        input.to(working),
        offset.to(working),
        weight.to(working),
        None if bias is None else bias.to(working),
        stride,
        padding,
        dilation,
        None if mask is None else mask.to(working),
    )
    if input.is_contiguous(memory_format=torch.channels_last):
        output = output.contiguous(
            memory_format=torch.channels_last
        )  # torchvision's operator drops the memory format
    return output.to(input.dtype)


def deform_conv2d_gathered(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    mask: Tensor | None = None,
) -> Tensor:
    """`deform_conv2d` in plain PyTorch; all tensors float32 or all float64.

    The channels of a pixel are contiguous, so that a bilinear sample is a weighted
    sum of four rows of a table.  `F.embedding_bag` computes this in parallel and
    vectorised, without storing the rows.  Taps are processed one by one, so memory
    does not grow with the kernel.
    """
    batch, channels = input.shape[:2]
    out_channels, group_channels, kernel_h, kernel_w = weight.shape
    out_height, out_width = offset.shape[-2:]
    groups = channels // group_channels
    taps = kernel_h * kernel_w

    moves = offset.unflatten(1, (-1, taps, 2)).permute(2, 3, 0, 4, 5, 1)  # (tap, 2, B, H_out, W_out, G)
    masks = None if mask is None else mask.unflatten(1, (-1, taps)).permute(2, 0, 3, 4, 1)
    grid_y = torch.arange(out_height, device=input.device).view(-1, 1, 1) * stride[0] - padding[0]
    grid_x = torch.arange(out_width, device=input.device).view(-1, 1) * stride[1] - padding[1]
    image = F.pad(input.permute(0, 2, 3, 1), _MARGIN)

    output = input.new_zeros(batch * out_height * out_width, groups, out_channels // groups)
    for tap, (move, kernel) in enumerate(zip(moves.unbind(), weight.flatten(2).unbind(2), strict=True)):
        down, right = move.unbind()
        y = down + (grid_y + tap // kernel_w * dilation[0])
        x = right + (grid_x + tap % kernel_w * dilation[1])
        sample = _bilinear(image, y, x, None if masks is None else masks[tap]).view(
            -1, groups, group_channels
        )
        kernel = kernel.view(groups, -1, group_channels)
        if group_channels == 1:
            output.addcmul_(sample, kernel.squeeze(-1))
        else:
            output += torch.einsum('pgi,goi->pgo', sample, kernel)
    output = output.view(batch, out_height, out_width, out_channels).permute(0, 3, 1, 2)
    if not input.is_contiguous(memory_format=torch.channels_last):
        output = output.contiguous()
    return output if bias is None else output + bias.view(-1, 1, 1)


_MARGIN = (0, 0, 1, 2, 1, 2)
"""Zeros around a channels-last image: one left and above, two right and below."""


def _bilinear(image: Tensor, y: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """Read an image between its pixels.

    Args:
        image: (B, H + 3, W + 3, C) with its `_MARGIN`.
        y: rows, counted without the margin, (B, H_out, W_out, G).
        x: columns, likewise.
        mask: factors of the samples, of the same shape, or none.

    Returns:
        (B·H_out·W_out·G, C / G).
    """
    batch, rows, columns, channels = image.shape
    groups = y.shape[-1]
    # Samples at -1 and at H are 0 already, and their neighbours are still in the margin.
    y, x = y.clamp(-1, rows - 3), x.clamp(-1, columns - 3)
    top, left = y.detach().floor(), x.detach().floor()
    below, right = y - top, x - left
    above, before = 1 - below, 1 - right
    shares = torch.stack((above * before, above * right, below * before, below * right), dim=-1)
    if mask is not None:
        shares = shares * mask.unsqueeze(-1)

    # NaN must not become an address; it stays in the shares.
    row, column = (corner.nan_to_num().long() + 1 for corner in (top, left))
    first = torch.arange(batch, device=y.device).view(-1, 1, 1, 1) * rows
    pixel = ((first + row) * columns + column) * groups + torch.arange(groups, device=y.device)
    corners = torch.stack(
        (pixel, pixel + groups, pixel + columns * groups, pixel + (columns + 1) * groups), dim=-1
    )
    return F.embedding_bag(
        corners.view(-1, 4),
        image.view(-1, channels // groups),
        mode='sum',
        per_sample_weights=shares.view(-1, 4),
    )


def _pair(value: Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _check_shapes(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    mask: Tensor | None,
) -> None:
    """Raise a `ValueError` that names the sizes if the tensors do not fit a deformable convolution."""
    batch, channels, *sides = input.shape
    out_channels, group_channels, *kernel = weight.shape
    if channels % group_channels or out_channels % (channels // group_channels):
        raise ValueError(
            f'a kernel of shape {tuple(weight.shape)} does not divide {channels} channels into groups'
        )
    if bias is not None and bias.shape != (out_channels,):
        raise ValueError(f'the bias has shape {tuple(bias.shape)}, not ({out_channels},)')

    height, width = (
        (side + 2 * p - d * (k - 1) - 1) // s + 1
        for side, p, d, k, s in zip(sides, padding, dilation, kernel, stride, strict=True)
    )
    taps = kernel[0] * kernel[1]
    groups = max(offset.shape[1] // (2 * taps), 1)
    if channels % groups:
        raise ValueError(f'{groups} offset groups do not divide {channels} channels')
    for name, tensor, depth in (('offset', offset, 2 * taps * groups), ('mask', mask, taps * groups)):
        if tensor is not None and tensor.shape != (batch, depth, height, width):
            raise ValueError(
                f'the {name} has shape {tuple(tensor.shape)}, not ({batch}, {depth}, {height}, {width})'
            )
