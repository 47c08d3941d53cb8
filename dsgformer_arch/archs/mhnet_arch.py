"""MHNet: an encoder-decoder for context, whose features a full-resolution branch fuses level by level.

Paper: H. Gao, D. Dang, "Mixed Hierarchy Network for Image Restoration", arXiv 2302.09554, 2023.
Official implementation: https://github.com/Tombs98/MHNet, `MHNet.py`; academic public licence,
non-commercial use only.

Where the official implementation differs from the paper, it is followed:

- all four levels of the full-resolution branch use the first decoder projection, `conv_dnc1`;
- the softmax of the fusion (AFFM) runs over the channels of one branch, not over the branches;
- `intro`, `stage1.ending` and `conv_dnc2` to `conv_dnc4` have parameters that no output depends on;
  they are kept so that official checkpoints load, and get no gradient.

For an image of H×W and C = `width` (64: 67.54 M parameters):

    stage1, encoders 1 to 4 (E1..E4)            H×W×C, H/2×W/2×2C, H/4×W/4×4C, H/8×W/8×8C
    stage1, middle: top-k sparse attention      H/16×W/16×16C, without norm or residual
    stage1, decoders 1 to 4 (D4..D1)            H/8×W/8×8C, H/4×W/4×4C, H/2×W/2×2C, H×W×C
    intro2, concat12 (with D1)                  H×W×C
    stage2, level n = 1 to 4                    H×W×C, fused with En and Dn brought to H×W×C
    ending, plus the image                      H×W×3

`affm` and `smam` are the switches of the paper's ablation.  The official implementation has no such variants;
what replaces the modules is chosen here.  `smam=False` puts NAFNet's block in the middle, as in NAFNet, for
SMAM's top-k sparse attention.  `affm=False` adds the three maps, as AFFM does before it weighs them.

The blocks of both stages are NAFNet's: gates instead of activations, and a channel attention from the
mean of the map.  The means (`sca.0` of a block, `avg_pool` of a fusion) are modules without state, so
that means over a window of the training size can replace them at test time (the official MHNetLocal).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from spandrel.util import get_seq_len
from torch import Tensor, nn

from dsgformer_arch.archs.drsformer_arch import TopKSparseAttention, keep_layout, named
from dsgformer_arch.archs.layers.network import RestorationNetwork
from dsgformer_arch.archs.layers.norms import norm_of_channels
from dsgformer_arch.utils.errors import UserError

LEVELS = 4
"""Levels of the encoder, of the decoder, and of the branch at full resolution, which takes in one a level."""

MIDDLE_HEADS = 8


class LayerNorm2d(nn.Module):
    """LayerNorm over the channels of each pixel.  (N, C, H, W) to the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = norm_of_channels(x, self.weight.shape[0], self.weight, self.bias, 1e-6)
        return keep_layout(y, like=x)


class SimpleGate(nn.Module):
    """The product of the two halves of the channels.  (N, 2C, H, W) to (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=1)
        return first * second


class NAFBlock(nn.Module):
    """NAFNet's block: a gated depthwise convolution with channel attention, then a gated feed-forward.

    (N, C, H, W) to the same.
    """

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm2d(c)
        self.conv1 = nn.Conv2d(c, 2 * c, 1)
        self.conv2 = nn.Conv2d(2 * c, 2 * c, 3, padding=1, groups=2 * c)
        self.sg = SimpleGate()
        self.sca = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, c, 1))
        self.conv3 = nn.Conv2d(c, c, 1)
        self.norm2 = LayerNorm2d(c)
        self.conv4 = nn.Conv2d(c, 2 * c, 1)
        self.conv5 = nn.Conv2d(c, c, 1)
        self.beta = nn.Parameter(torch.zeros(1, c, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(1, c, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        gated = self.sg(self.conv2(self.conv1(self.norm1(x))))
        x = x + self.conv3(gated * self.sca(gated)) * self.beta
        return x + self.conv5(self.sg(self.conv4(self.norm2(x)))) * self.gamma


def blocks(width: int, number: int) -> nn.Sequential:
    """`number` NAFNet blocks of `width` channels."""
    return nn.Sequential(*(NAFBlock(width) for _ in range(number)))


def attentions(width: int, number: int) -> nn.Sequential:
    """`number` top-k sparse attentions of `width` channels."""
    return nn.Sequential(*(TopKSparseAttention(width, MIDDLE_HEADS, bias=False) for _ in range(number)))


def upsample(channels: int) -> nn.Sequential:
    """(N, C, H, W) to (N, C/2, 2H, 2W)."""
    return nn.Sequential(nn.Conv2d(channels, 2 * channels, 1, bias=False), nn.PixelShuffle(2))


def upscale(width: int, steps: int) -> nn.Sequential:
    """(N, 2ⁿC, H, W) to (N, C, 2ⁿH, 2ⁿW), n steps; a single step is not nested, as in the official code."""
    ups = [named(up=upsample(width << step)) for step in range(steps, 0, -1)]
    return ups[0] if steps == 1 else nn.Sequential(*ups)


class EncoderDecoder(nn.Module):
    """Stage 1: NAFNet's encoder and decoder around top-k sparse attention.

    Args:
        img_channels: channels of the image.
        width: C.
        enc_blk_nums: blocks of each encoder, from H×W to H/8×W/8.
        middle_blk_num: attentions at H/16×W/16.
        dec_blk_nums: blocks of each decoder, from H/8×W/8 to H×W.
        smam: top-k sparse attention in the middle; False for NAFNet's block.
    """

    def __init__(
        self,
        img_channels: int,
        width: int,
        enc_blk_nums: Sequence[int],
        middle_blk_num: int,
        dec_blk_nums: Sequence[int],
        smam: bool,
    ) -> None:
        super().__init__()
        widths = [width << level for level in range(LEVELS + 1)]
        self.intro = nn.Conv2d(img_channels, width, 3, padding=1)
        self.ending = nn.Conv2d(width, img_channels, 3, padding=1)
        self.encoders = nn.ModuleList(map(blocks, widths, enc_blk_nums))
        self.downs = nn.ModuleList(nn.Conv2d(c, 2 * c, 2, stride=2) for c in widths[:-1])
        self.middle_blks = (attentions if smam else blocks)(widths[-1], middle_blk_num)
        self.ups = nn.ModuleList(map(upsample, widths[:0:-1]))
        self.decoders = nn.ModuleList(map(blocks, widths[-2::-1], dec_blk_nums))

    def forward(self, image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """What leaves the encoders and what leaves the decoders, both from H×W×C to H/8×W/8×8C."""
        x = self.intro(image)
        encoded: list[Tensor] = []
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            encoded.append(encoder(x))
            x = down(encoded[-1])
        x = self.middle_blks(x)
        decoded: list[Tensor] = []
        for up, skip, decoder in zip(self.ups, reversed(encoded), self.decoders, strict=True):
            x = decoder(up(x) + skip)
            decoded.append(x)
        return encoded, decoded[::-1]


class AdaptiveFeatureFusion(nn.Module):
    """AFFM: the sum of three maps, each weighted by a softmax over its channels.

    The weights follow from the mean of the maps' plain sum.

    Raises:
        UserError: the bottleneck, an eighth of the width, has an odd number of channels: no gate halves it.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        bottleneck = max(width // 8, 4)
        if bottleneck % 2:
            raise UserError(
                f'MHNet has no width {width}: an eighth of it must be even; choose a multiple of 16.'
            )
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.conv_du = nn.Sequential(nn.Conv2d(width, bottleneck, 1, bias=False), SimpleGate())
        self.fcs = nn.ModuleList(nn.Conv2d(bottleneck // 2, width, 1, bias=False) for _ in range(3))

    def forward(self, x: Tensor, encoded: Tensor, decoded: Tensor) -> Tensor:
        """Three maps of shape (N, C, H, W) to one."""
        z = self.conv_du(self.avg_pool(x + encoded + decoded))
        a, a_e, a_d = (fc(z).softmax(dim=1) for fc in self.fcs)
        return a * x + a_e * encoded + a_d * decoded


class PlainFusion(nn.Module):
    """The sum of three maps, in place of AFFM in the paper's ablation."""

    def forward(self, x: Tensor, encoded: Tensor, decoded: Tensor) -> Tensor:
        """Three maps of shape (N, C, H, W) to one."""
        return x + encoded + decoded


class FullResolutionBranch(nn.Module):
    """Stage 2 (FRSNet): at each level x + NAFBlocks(x) of the normalised x, fused with a level of stage 1.

    Args:
        width: C.
        bias: whether the projections have biases.
        num: blocks of a level.
        affm: fusion by AFFM; False for a plain sum.
    """

    def __init__(self, width: int, bias: bool, num: int, affm: bool) -> None:
        super().__init__()
        for n in range(1, LEVELS + 1):
            self.add_module(f'norm{n}', LayerNorm2d(width))
            self.add_module(f'CABG{n}', blocks(width, num))
            self.add_module(f'conv_enc{n}', nn.Conv2d(width, width, 1, bias=bias))
            self.add_module(f'conv_dnc{n}', nn.Conv2d(width, width, 1, bias=bias))
            self.add_module(f'skff{n}', AdaptiveFeatureFusion(width) if affm else PlainFusion())
        for steps in range(1, LEVELS):
            self.add_module(f'up_enc{steps}', upscale(width, steps))
            self.add_module(f'up_dec{steps}', upscale(width, steps))

    def part(self, name: str, n: int) -> nn.Module:
        return self.get_submodule(f'{name}{n}')

    def forward(self, x: Tensor, encoded: Sequence[Tensor], decoded: Sequence[Tensor]) -> Tensor:
        """x of shape (N, C, H, W) to the same; of stage 1, E1 to E4 and D1 to D4."""
        for n, (e, d) in enumerate(zip(encoded, decoded, strict=True), start=1):
            if n > 1:
                e, d = self.part('up_enc', n - 1)(e), self.part('up_dec', n - 1)(d)
            x = self.part('norm', n)(x)
            x = self.part('CABG', n)(x) + x
            x = self.part('skff', n)(x, self.part('conv_enc', n)(e), self.part('conv_dnc', 1)(d))
        return x


@ARCH_REGISTRY.register()
class MHNet(RestorationNetwork):
    """MHNet; the module's docstring gives the source and the structure.

    Args:
        in_c: channels of the image.
        out_c: channels of the restored image; the same, for the image is added to the output.
        width: C; an eighth of it, rounded down and at least 4, must be even.
        num_cab: blocks at each level of stage 2.
        bias: whether the convolutions outside the blocks of stage 2 and outside stage 1 have biases.
        enc_blk_nums: blocks of the four encoders, from full resolution down (fixed in the official code).
        middle_blk_num: attentions between encoders and decoders (fixed in the official code).
        dec_blk_nums: blocks of the four decoders, from H/8×W/8 up (fixed in the official code).
        affm: adaptive feature fusion; False for a plain sum of the three maps (the paper's ablation).
        smam: top-k sparse attention between encoders and decoders; False for NAFNet's block (the same).

    Raises:
        UserError: `enc_blk_nums` or `dec_blk_nums` has not four entries, or the width does not suit.
    """

    pad_multiple = 2**LEVELS
    min_size = 2**LEVELS
    sees_whole_image = True
    channel_settings = ('in_c', 'out_c')
    width_settings = ('width',)
    depth_settings = ('num_cab', 'enc_blk_nums', 'middle_blk_num', 'dec_blk_nums')

    def __init__(
        self,
        in_c: int = 3,
        out_c: int = 3,
        width: int = 64,
        num_cab: int = 8,
        bias: bool = False,
        enc_blk_nums: Sequence[int] = (1, 1, 1, 28),
        middle_blk_num: int = 1,
        dec_blk_nums: Sequence[int] = (1, 1, 1, 1),
        affm: bool = True,
        smam: bool = True,
    ) -> None:
        super().__init__()
        if len(enc_blk_nums) != LEVELS or len(dec_blk_nums) != LEVELS:
            raise UserError(f"MHNet's enc_blk_nums and dec_blk_nums need {LEVELS} entries each.")
        self.intro = nn.Conv2d(in_c, width, 3, padding=1, bias=bias)
        self.intro2 = nn.Conv2d(in_c, width, 3, padding=1, bias=bias)
        self.stage1 = EncoderDecoder(in_c, width, enc_blk_nums, middle_blk_num, dec_blk_nums, smam)
        self.stage2 = FullResolutionBranch(width, bias, num_cab, affm)
        self.concat12 = nn.Conv2d(2 * width, width, 1, bias=bias)
        self.ending = nn.Conv2d(width, out_c, 3, padding=1, bias=bias)

    def forward_padded(self, image: Tensor) -> Tensor:
        """The image, (N, C, H, W) in [0, 1], H and W multiples of 16, to the restored one, not clipped."""
        encoded, decoded = self.stage1(image)
        x = self.concat12(torch.cat([self.intro2(image), decoded[0]], dim=1))
        return self.ending(self.stage2(x, encoded, decoded)) + image

    @classmethod
    def recognises(cls, state: Mapping[str, Tensor]) -> bool:
        """Whether `state` (a bare state dict) is an MHNet's."""
        return {
            'intro2.weight',
            'concat12.weight',
            'ending.weight',
            'stage1.intro.weight',
            'stage1.ups.0.0.weight',
            'stage2.norm1.weight',
            'stage2.conv_dnc1.weight',
            'stage2.up_enc3.0.up.0.weight',
        } <= state.keys()

    @classmethod
    def settings_from_state(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """The keyword arguments that rebuild the network of `state`, a bare state dict that it recognises."""
        width, in_c = state['intro.weight'].shape[:2]
        return {
            'in_c': in_c,
            'out_c': state['ending.weight'].shape[0],
            'width': width,
            'num_cab': get_seq_len(state, 'stage2.CABG1'),
            'bias': 'ending.bias' in state,
            'enc_blk_nums': [get_seq_len(state, f'stage1.encoders.{i}') for i in range(LEVELS)],
            'middle_blk_num': get_seq_len(state, 'stage1.middle_blks'),
            'dec_blk_nums': [get_seq_len(state, f'stage1.decoders.{i}') for i in range(LEVELS)],
            'affm': 'stage2.skff1.conv_du.0.weight' in state,
            'smam': 'stage1.middle_blks.0.conv1.weight' not in state,
        }
