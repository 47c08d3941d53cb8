"""ConvIR: Revitalizing Convolutional Network for Image Restoration.

Cui Y., Ren W., Cao X., Knoll A., IEEE TPAMI 2024 (IEEE Xplore 10571568; no arXiv version).
Official implementation: github.com/c-yn/ConvIR (Motion_Deblurring/models/ConvIR.py, layers.py), MIT.

The official networks for the other tasks are the same: desnowing and dehazing without change, deraining
with `dilations=(3, 7, 9)`.  (The dehazing code has (5, 9, 11) for GTA5, but its condition never holds.)
One difference: a training batch of a single image, for which the official code raises an error, uses the
running statistics.

With x the image, x2 and x4 its every second and fourth pixel, C = 32, and levels of n residual blocks
each (n = 4, 8, 16: ConvIR-S, -B, -L):

    E1 = level(conv(x))                      H×W×C
    E2 = level(FAM(conv↓(E1), SCM(x2)))      H/2×W/2×2C
    E3 = level(FAM(conv↓(E2), SCM(x4)))      H/4×W/4×4C
    D3 = level(E3)                           H/4×W/4×4C       out4 = conv(D3) + x4
    D2 = level(conv([conv↑(D3), E2]))        H/2×W/2×2C       out2 = conv(D2) + x2
    D1 = level(conv([conv↑(D2), E1]))        H×W×C            out  = conv(D1) + x

The last residual block of a level holds the deep pool layer: at 1/8, 1/4 and 1/2 of
the level's size, coarse to fine, a 3×3 convolution and then dilated filters that the features themselves
choose: a square one, and a horizontal one followed by a vertical one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from basicsr.utils.registry import ARCH_REGISTRY
from spandrel.util import get_seq_len
from torch import Tensor, nn

from dsgformer_arch.archs.layers.network import RestorationNetwork
from dsgformer_arch.utils.errors import UserError

POOLS = (8, 4, 2)
"""By how much a deep pool layer reduces its input, coarse to fine."""

GROUPS = 8
"""Groups of channels that share a predicted filter."""


class BasicConv(nn.Module):
    """A convolution and, unless `linear`, a GELU.  `stride=2` halves the size; `transpose` doubles it."""

    def __init__(
        self,
        channels_in: int,
        channels: int,
        kernel: int = 3,
        stride: int = 1,
        transpose: bool = False,
        linear: bool = False,
    ) -> None:
        super().__init__()
        conv: nn.Module
        if transpose:
            conv = nn.ConvTranspose2d(channels_in, channels, kernel, stride, padding=kernel // 2 - 1)
        else:
            conv = nn.Conv2d(channels_in, channels, kernel, stride, padding=kernel // 2)
        self.main = nn.Sequential(conv) if linear else nn.Sequential(conv, nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x)


class BatchNorm(nn.BatchNorm2d):
    """Normalisation of pooled features, (N, C, 1, 1): in training over the batch alone."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) == 1:  # one value a channel has no variance
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        return super().forward(x)


class DynamicFilter(nn.Module):
    """Filters the features with kernels predicted from their mean, and weighs low against high frequencies.

    With low = filter(x) and mean the average over the directions in which the kernel extends:

        λ_l · ((1 + w) · low - w · mean) + (1 + λ_h) · x

    (N, C, H, W) to the same; H and W, where the kernel extends along them, greater than the dilation.

    Args:
        channels: C, a multiple of 8.
        kernel: height and width of the kernel, each 1 or 3.
        dilation: distance between the kernel's taps.
    """

    def __init__(self, channels: int, kernel: tuple[int, int], dilation: int) -> None:
        super().__init__()
        self.kernel, self.dilation = kernel, dilation
        kh, kw = kernel
        pad_h, pad_w = dilation * (kh // 2), dilation * (kw // 2)
        self.padding = (pad_w, pad_w, pad_h, pad_h)
        self.extent = tuple(axis for axis, size in ((2, kh), (3, kw)) if size > 1)
        self.conv = nn.Conv2d(channels, GROUPS * kh * kw, 1, bias=False)
        self.lamb_l = nn.Parameter(torch.zeros(channels))
        self.lamb_h = nn.Parameter(torch.zeros(channels))
        self.inside_all = nn.Parameter(torch.zeros(channels, 1, 1))

    def predict(self, x: Tensor) -> Tensor:
        """Kernels of all groups, (N, 8·kh·kw, 1, 1), in [-1, 1]."""
        return torch.tanh(self.conv(x.mean((2, 3), keepdim=True)))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        kernels = self.predict(x).reshape(n, GROUPS, 1, *self.kernel)
        kernels = kernels.expand(-1, -1, c // GROUPS, -1, -1).reshape(n * c, 1, *self.kernel)
        padded = F.pad(x, self.padding, 'reflect')
        # Images become channels, so that one depthwise convolution has a kernel for each image.
        padded = padded.reshape(1, n * c, *padded.shape[2:])
        low = F.conv2d(padded, kernels, dilation=self.dilation, groups=n * c).reshape(n, c, h, w)
        low = low * (self.inside_all + 1) - self.inside_all * x.mean(self.extent, keepdim=True)
        return low * self.lamb_l[:, None, None] + x * (self.lamb_h[:, None, None] + 1)


class SquareFilter(DynamicFilter):
    """The 3×3 filter, whose prediction is batch-normalised."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__(channels, (3, 3), dilation)
        self.bn = BatchNorm(self.conv.out_channels)
        nn.init.kaiming_normal_(self.conv.weight, mode='fan_out', nonlinearity='relu')

    def predict(self, x: Tensor) -> Tensor:
        return torch.tanh(self.bn(self.conv(x.mean((2, 3), keepdim=True))))


class StripFilter(nn.Module):
    """A horizontal filter, then a vertical one, γ · filtered + β · x.  (N, C, H, W) to the same."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        # Official names: H stands for "horizontal", a kernel of one row.
        self.H_spatial_att = DynamicFilter(channels, (1, 3), dilation)
        self.W_spatial_att = DynamicFilter(channels, (3, 1), dilation)
        self.gamma = nn.Parameter(torch.zeros(channels, 1, 1))
        self.beta = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * self.W_spatial_att(self.H_spatial_att(x)) + self.beta * x


class MultiShapeKernel(nn.Module):
    """The sum of the strip filter and the square one.  (N, C, H, W) to the same."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.square_att = SquareFilter(channels, dilation)
        self.strip_att = StripFilter(channels, dilation)

    def forward(self, x: Tensor) -> Tensor:
        return self.strip_att(x) + self.square_att(x)


class DeepPoolLayer(nn.Module):
    """Filters the features at three reduced sizes and adds all to them.  (N, C, H, W) to the same.

    Args:
        channels: C, a multiple of 8.
        dilations: of the filters at 1/8, 1/4 and 1/2 of the size.
    """

    def __init__(self, channels: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in POOLS])
        self.dynas = nn.ModuleList([MultiShapeKernel(channels, dilation) for dilation in dilations])
        self.conv_sum = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        total, coarser = x, None
        for pool, conv, filters in zip(POOLS, self.convs, self.dynas, strict=True):
            y = F.avg_pool2d(x, pool)
            if coarser is not None:
                y = y + F.interpolate(coarser, scale_factor=2, mode='bilinear', align_corners=True)
            coarser = filters(conv(y))
            total = total + F.interpolate(coarser, x.shape[2:], mode='bilinear', align_corners=True)
        return self.conv_sum(F.gelu(total))


class ResBlock(nn.Module):
    """Two convolutions, the deep pool layer between them if there are `dilations`, and a residual."""

    def __init__(self, channels: int, dilations: Sequence[int] = ()) -> None:
        super().__init__()
        self.main = nn.Sequential(
            BasicConv(channels, channels),
            DeepPoolLayer(channels, dilations) if dilations else nn.Identity(),
            BasicConv(channels, channels, linear=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + x


class Level(nn.Module):
    """`num_res` residual blocks, the last one with the deep pool layer.  (N, C, H, W) to the same."""

    def __init__(self, channels: int, num_res: int, dilations: Sequence[int]) -> None:
        super().__init__()
        plain = [ResBlock(channels) for _ in range(num_res - 1)]
        self.layers = nn.Sequential(*plain, ResBlock(channels, dilations))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class SCM(nn.Module):
    """Shallow features of the reduced image.  (N, 3, H, W) to (N, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            BasicConv(3, channels // 4),
            BasicConv(channels // 4, channels // 2, 1),
            BasicConv(channels // 2, channels // 2),
            BasicConv(channels // 2, channels, 1, linear=True),
            nn.InstanceNorm2d(channels, affine=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x)


class FAM(nn.Module):
    """Merges features of the level above with those of the reduced image.  Two (N, C, H, W) to one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.merge = BasicConv(2 * channels, channels, linear=True)

    def forward(self, features: Tensor, shallow: Tensor) -> Tensor:
        return self.merge(torch.cat([features, shallow], dim=1))


@ARCH_REGISTRY.register()
class ConvIR(RestorationNetwork):
    """The network.  (N, 3, H, W) in [0, 1] to three images, at a quarter, half and all of the size.

    Images are padded to multiples of 32 and at least `min_size`: the filters reflect the pooled features at
    their border by as many pixels as they are dilated.

    Args:
        num_res: residual blocks of a level: 4 (S), 8 (B) or 16 (L).
        base_channel: C, a multiple of 8.
        dilations: of the filters at 1/8, 1/4 and 1/2 of a level's size; (3, 7, 9) for deraining.

    Raises:
        UserError: for settings other than that.
    """

    pad_multiple = 32
    min_size = 256
    """For the default dilations; an instance with others has its own."""
    width_settings = ('base_channel',)
    depth_settings = ('num_res',)

    def __init__(
        self, num_res: int = 16, base_channel: int = 32, dilations: Sequence[int] = (7, 9, 11)
    ) -> None:
        super().__init__()
        if num_res < 1 or base_channel < 1 or base_channel % GROUPS or len(dilations) != len(POOLS):
            raise UserError(
                f'ConvIR: num_res={num_res}, base_channel={base_channel}, dilations={tuple(dilations)}: '
                f'not possible; give at least 1, a multiple of {GROUPS} and {len(POOLS)} numbers'
            )
        self.min_size = _min_size(dilations)
        C = base_channel

        def level(channels: int) -> Level:
            return Level(channels, num_res, dilations)

        self.Encoder = nn.ModuleList([level(C), level(2 * C), level(4 * C)])
        self.feat_extract = nn.ModuleList(
            [
                BasicConv(3, C),
                BasicConv(C, 2 * C, stride=2),
                BasicConv(2 * C, 4 * C, stride=2),
                BasicConv(4 * C, 2 * C, 4, stride=2, transpose=True),
                BasicConv(2 * C, C, 4, stride=2, transpose=True),
                BasicConv(C, 3, linear=True),
            ]
        )
        self.Decoder = nn.ModuleList([level(4 * C), level(2 * C), level(C)])
        self.Convs = nn.ModuleList([BasicConv(4 * C, 2 * C, 1), BasicConv(2 * C, C, 1)])
        self.ConvsOut = nn.ModuleList([BasicConv(4 * C, 3, linear=True), BasicConv(2 * C, 3, linear=True)])
        self.FAM1 = FAM(4 * C)
        self.SCM1 = SCM(4 * C)
        self.FAM2 = FAM(2 * C)
        self.SCM2 = SCM(2 * C)

    def forward_padded(self, x: Tensor) -> list[Tensor]:
        x2, x4 = x[..., ::2, ::2], x[..., ::4, ::4]
        E1 = self.Encoder[0](self.feat_extract[0](x))
        E2 = self.Encoder[1](self.FAM2(self.feat_extract[1](E1), self.SCM2(x2)))
        E3 = self.Encoder[2](self.FAM1(self.feat_extract[2](E2), self.SCM1(x4)))
        D3 = self.Decoder[0](E3)
        D2 = self.Decoder[1](self.Convs[0](torch.cat([self.feat_extract[3](D3), E2], dim=1)))
        D1 = self.Decoder[2](self.Convs[1](torch.cat([self.feat_extract[4](D2), E1], dim=1)))
        return [self.ConvsOut[0](D3) + x4, self.ConvsOut[1](D2) + x2, self.feat_extract[5](D1) + x]

    @classmethod
    def recognises(cls, state: Mapping[str, Any]) -> bool:
        """Whether `state` is a state dict of this network."""
        characteristic = {'FAM1.merge.main.0.weight', 'SCM1.main.4.weight', 'ConvsOut.1.main.0.weight'}
        filters = ('dynas.2.square_att.lamb_l', 'dynas.2.strip_att.H_spatial_att.conv.weight')
        return characteristic <= set(state) and all(any(k.endswith(name) for k in state) for name in filters)

    @classmethod
    def settings_from_state(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """The keyword arguments of a network, read from the shapes of its state dict.

        `dilations` leave no trace in the shapes.
        """
        return {
            'num_res': get_seq_len(state, 'Encoder.0.layers'),
            'base_channel': state['feat_extract.0.main.0.weight'].shape[0],
        }


def _min_size(dilations: Sequence[int]) -> int:
    """Least side of an image: pooled at the lowest level, it must exceed each filter's dilation."""
    needed = max(4 * pool * (dilation + 1) for pool, dilation in zip(POOLS, dilations, strict=True))
    return -(-needed // ConvIR.pad_multiple) * ConvIR.pad_multiple
