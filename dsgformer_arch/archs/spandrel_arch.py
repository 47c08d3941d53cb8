"""Restormer, MPRNet, NAFNet, FFTformer and IPT, from spandrel, under their names in ARCH_REGISTRY.

The networks are those of spandrel 0.4.2 and spandrel_extra_arches 0.2.0 (MIT), unchanged: same keys,
same numbers as the authors' releases.  What is added here are the defaults of the releases for
deblurring, the sizes that their test scripts pad to, and how to read a network's settings from its
state dict.  Spandrel tells whose state dict it is, but its own loaders do not serve for the settings:
they build the network on the CPU, insist that every key is there, and take an expansion factor that
holds at the first level only.

| network | paper | release and its licence |
|---|---|---|
| Restormer | Zamir et al., CVPR 2022, arXiv 2111.09881 | swz30/Restormer, academic public licence |
| MPRNet | Zamir et al., CVPR 2021, arXiv 2102.02808 | swz30/MPRNet, academic public licence |
| NAFNet | Chen et al., ECCV 2022, arXiv 2204.04676 | megvii-research/NAFNet, MIT |
| FFTformer | Kong et al., CVPR 2023, arXiv 2211.12250 | kkkls/FFTformer, MIT |
| IPT | Chen et al., CVPR 2021, arXiv 2012.00364 | huawei-noah/Pretrained-IPT, Apache 2.0 |

Images are (N, C, H, W) in [0, 1], the restored ones not clipped.  What one has to know of the code:

- NAFNet pads inside `forward`, with zeros; the others stop on sizes that are no multiples.
- NAFNet's LayerNorm is an autograd function with a hand-written backward pass that `torch.compile`
  cannot trace: it compiles as a whole for inference, and with a graph break at each norm for training.
- FFTformer takes its Fourier transforms in float32 whatever its parameters are, float64 included, and
  never uses `reduce_chan_level2`, whose parameters get no gradient.
- IPT works on values of 0 to 255, which bfloat16 resolves to 1 from 128 up: under autocast its input
  and its result are no finer than 8 bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from spandrel import Architecture
from spandrel.architectures.FFTformer import FFTformer as SpandrelFFTformer
from spandrel.architectures.FFTformer import FFTformerArch
from spandrel.architectures.IPT import IPT as SpandrelIPT  # noqa: N811 (a class, for all its capitals)
from spandrel.architectures.IPT import IPTArch
from spandrel.architectures.IPT import Model as Chopper
from spandrel.architectures.NAFNet import NAFNet as SpandrelNAFNet
from spandrel.architectures.NAFNet import NAFNetArch
from spandrel.util import get_seq_len
from spandrel_extra_arches.architectures.MPRNet import MPRNet as SpandrelMPRNet
from spandrel_extra_arches.architectures.MPRNet import MPRNetArch
from spandrel_extra_arches.architectures.Restormer import Restormer as SpandrelRestormer
from spandrel_extra_arches.architectures.Restormer import RestormerArch
from torch import Tensor

from dsgformer_arch.archs.layers.settings import expansion_factor
from dsgformer_arch.utils.errors import UserError


class FromSpandrel:
    """What the networks below have in common: spandrel's recognition of their state dicts."""

    architecture: ClassVar[Architecture]

    @classmethod
    def recognises(cls, state: Mapping[str, Tensor]) -> bool:
        """Whether `state`, a bare state dict, is one of this network, as spandrel tells it."""
        return cls.architecture.detect(dict(state))


@ARCH_REGISTRY.register()
class Restormer(FromSpandrel, SpandrelRestormer):
    """Restormer for deblurring: 26.13 M parameters.

    Keyword arguments: `inp_channels`, `out_channels`, `dim`, `num_blocks` and `heads` (levels 1–3 and
    latent), `num_refinement_blocks`, `ffn_expansion_factor`, `bias`, `LayerNorm_type` (`'WithBias'` or
    `'BiasFree'`, the release's for denoising) and `dual_pixel_task`; the release's defaults.
    """

    architecture = RestormerArch()
    pad_multiple: int = 8
    min_size: int = 8

    @classmethod
    def settings_from_state(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """The keyword arguments that rebuild the network of `state`."""
        levels = ('encoder_level1', 'encoder_level2', 'encoder_level3', 'latent')
        dim, inp_channels = state['patch_embed.proj.weight'].shape[:2]
        return {
            'inp_channels': inp_channels,
            'out_channels': state['output.weight'].shape[0],
            'dim': dim,
            'num_blocks': [get_seq_len(state, level) for level in levels],
            'num_refinement_blocks': get_seq_len(state, 'refinement'),
            'heads': [state[f'{level}.0.attn.temperature'].shape[0] for level in levels],
            'ffn_expansion_factor': _expansion_factor(state, levels),
            'bias': 'output.bias' in state,
            'LayerNorm_type': 'WithBias' if 'latent.0.norm1.body.bias' in state else 'BiasFree',
            'dual_pixel_task': 'skip_conv.weight' in state,
        }


@ARCH_REGISTRY.register()
class MPRNet(FromSpandrel, SpandrelMPRNet):
    """MPRNet for deblurring: 20.13 M parameters.  Returns the images of stages 3, 2 and 1.

    Args:
        n_feat: channels at full resolution.
        scale_unetfeats: channels that each level of the encoders adds.
        scale_orsnetfeats: channels that the third stage adds.
        settings: `in_c`, `out_c`, `num_cab`, `kernel_size`, `reduction` and `bias`, as in the release.
            The widths of the release for deraining are 40, 20 and 16, spandrel's defaults.
    """

    architecture = MPRNetArch()
    pad_multiple: int = 8
    min_size: int = 8
    final_output: int = 0

    def __init__(
        self, *, n_feat: int = 96, scale_unetfeats: int = 48, scale_orsnetfeats: int = 32, **settings: Any
    ) -> None:
        super().__init__(
            n_feat=n_feat, scale_unetfeats=scale_unetfeats, scale_orsnetfeats=scale_orsnetfeats, **settings
        )

    @classmethod
    def settings_from_state(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """The keyword arguments that rebuild the network of `state`."""
        n_feat, in_c, kernel_size = state['shallow_feat1.0.weight'].shape[:3]
        out_c, last = state['tail.weight'].shape[:2]
        return {
            'in_c': in_c,
            'out_c': out_c,
            'n_feat': n_feat,
            'scale_unetfeats': state['stage1_encoder.down12.down.1.weight'].shape[0] - n_feat,
            'scale_orsnetfeats': last - n_feat,
            # A sequence of channel attention blocks and the convolution that ends it.
            'num_cab': get_seq_len(state, 'stage3_orsnet.orb1.body') - 1,
            'kernel_size': kernel_size,
            'reduction': n_feat // state['shallow_feat1.1.CA.conv_du.0.weight'].shape[0],
            'bias': 'shallow_feat1.0.bias' in state,
        }


@ARCH_REGISTRY.register()
class NAFNet(FromSpandrel, SpandrelNAFNet):
    """NAFNet for GoPro: 17.11 M parameters at width 32, 67.89 M at 64.

    Args:
        img_channel: channels of the image.
        width: channels at full resolution.
        middle_blk_num: blocks between encoder and decoder.
        enc_blk_nums: blocks of each level of the encoder.
        dec_blk_nums: blocks of each level of the decoder, from the lowest up; as many levels.
    """

    architecture = NAFNetArch()
    pad_multiple: int = 16
    min_size: int = 16

    def __init__(
        self,
        *,
        img_channel: int = 3,
        width: int = 32,
        middle_blk_num: int = 1,
        enc_blk_nums: Sequence[int] = (1, 1, 1, 28),
        dec_blk_nums: Sequence[int] = (1, 1, 1, 1),
    ) -> None:
        super().__init__(
            img_channel=img_channel,
            width=width,
            middle_blk_num=middle_blk_num,
            enc_blk_nums=list(enc_blk_nums),
            dec_blk_nums=list(dec_blk_nums),
        )
        self.pad_multiple = self.min_size = self.padder_size

    @classmethod
    def settings_from_state(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """The keyword arguments that rebuild the network of `state`."""
        width, img_channel = state['intro.weight'].shape[:2]

        def block_numbers(part: str) -> list[int]:
            return [get_seq_len(state, f'{part}.{level}') for level in range(get_seq_len(state, part))]

        return {
            'img_channel': img_channel,
            'width': width,
            'middle_blk_num': get_seq_len(state, 'middle_blks'),
            'enc_blk_nums': block_numbers('encoders'),
            'dec_blk_nums': block_numbers('decoders'),
        }


@ARCH_REGISTRY.register()
class FFTformer(FromSpandrel, SpandrelFFTformer):
    """FFTformer: 16.56 M parameters.

    Keyword arguments: `inp_channels`, `out_channels`, `dim`, `num_blocks` (levels 1–3),
    `num_refinement_blocks`, `ffn_expansion_factor`, `bias`; the release's defaults.
    """

    architecture = FFTformerArch()
    # Blocks of 8×8 pixels at a quarter of the size.
    pad_multiple: int = 32
    min_size: int = 32

    @classmethod
    def settings_from_state(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """The keyword arguments that rebuild the network of `state`."""
        levels = ('encoder_level1', 'encoder_level2', 'encoder_level3')
        dim, inp_channels = state['patch_embed.proj.weight'].shape[:2]
        return {
            'inp_channels': inp_channels,
            'out_channels': state['output.weight'].shape[0],
            'dim': dim,
            'num_blocks': [get_seq_len(state, level) for level in levels],
            'num_refinement_blocks': get_seq_len(state, 'refinement'),
            'ffn_expansion_factor': _expansion_factor(state, levels),
            'bias': 'output.bias' in state,
        }


@ARCH_REGISTRY.register()
class IPT(FromSpandrel, SpandrelIPT):
    """IPT for restoration: 115.31 M parameters with one head and tail.

    The Transformer sees patches of 48×48 and nothing else.  An image of that size goes through it
    once.  A larger one is cut into patches at every 12th pixel, and each pixel is the mean of the
    patches that have it in their inner half (at the border, of the strips along it), as the release
    tests: 16 passes a pixel, some 13,000 G multiply-adds for 256×256.

    The pretrained network has a head and a tail for each task, the fine-tuned ones (`--derain`,
    `--denoise`) have one of scale 1.  This class restores, so it runs the first of scale 1;
    `set_scale` chooses another.

    Args:
        scale: enlargement of each task; one of them must be 1.
        crop_batch_size: patches that go through the Transformer together.
        settings: `patch_size`, `patch_dim`, `n_feats`, `rgb_range`, `num_heads`, `num_layers`,
            `num_queries`, `dropout_rate`, `mlp`, `pos_every`, `no_pos` and `no_norm`, as in the release.

    Raises:
        UserError: no task has scale 1; in `forward`, an image smaller than a patch.
    """

    architecture = IPTArch()
    pad_multiple: int = 1
    min_size: int = 48

    def __init__(self, *, scale: Sequence[int] = (1,), crop_batch_size: int = 64, **settings: Any) -> None:
        if 1 not in scale:
            raise UserError(f'IPT of scale {list(scale)} enlarges; restoring takes a checkpoint of scale 1.')
        super().__init__(scale=list(scale), **settings)
        self.crop_batch_size = crop_batch_size
        self.min_size = self.patch_size
        self.set_scale(self.scale.index(1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1], H and W at least `patch_size`, to the same size."""
        height, width = x.shape[-2:]
        if height == width == self.patch_size:
            return super().forward(x * self.rgb_range) / self.rgb_range
        if min(height, width) < self.patch_size:
            least = f'{self.patch_size}×{self.patch_size}'
            raise UserError(f'IPT takes images of at least {least}, not {height}×{width}; pad the image.')
        # It calls this network again, on patches; and it knows no batches.
        chopped = Chopper(self, self.crop_batch_size)
        return torch.cat([chopped.forward_chop(image) for image in x.split(1)])

    @classmethod
    def settings_from_state(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """The keyword arguments that rebuild the network of `state`.

        `num_heads`, `pos_every` and, without `mlp` and positions, the patch size leave no trace in the
        shapes: the release's are assumed.  `rgb_range` is read from the values of `sub_mean.bias`.
        """
        n_feats = state['head.0.0.weight'].shape[0]
        embedding = state['body.encoder.layers.0.self_attn.in_proj_weight'].shape[1]
        patch_dim = math.isqrt(embedding // n_feats)
        settings: dict[str, Any] = {
            'patch_dim': patch_dim,
            'n_feats': n_feats,
            'rgb_range': round(float(state['add_mean.bias'][0]) / RED_MEAN),
            'scale': [_tail_scale(state, tail) for tail in range(get_seq_len(state, 'tail'))],
            'num_layers': get_seq_len(state, 'body.encoder.layers'),
            'mlp': 'body.linear_encoding.weight' in state,
            'no_pos': 'body.position_encoding.pe.weight' not in state,
            'no_norm': 'body.encoder.layers.0.norm1.weight' not in state,
        }
        if settings['mlp']:
            settings['num_queries'], query = state['body.query_embed.weight'].shape
            settings['patch_size'] = math.isqrt(query // embedding) * patch_dim
        elif not settings['no_pos']:
            settings['patch_size'] = math.isqrt(len(state['body.position_encoding.pe.weight'])) * patch_dim
        return settings


RED_MEAN = 0.4488
"""Mean of DIV2K's red channel, which IPT takes away from its input."""


def _tail_scale(state: Mapping[str, Tensor], tail: int) -> int:
    """How much one of IPT's tails enlarges: a PixelShuffle by s stands behind s² channels for each one."""
    scale = 1
    for step in range(get_seq_len(state, f'tail.{tail}.0')):
        weight = state.get(f'tail.{tail}.0.{step}.weight')
        if weight is not None:
            scale *= math.isqrt(weight.shape[0] // weight.shape[1])
    return scale


def _expansion_factor(state: Mapping[str, Tensor], levels: Sequence[str]) -> float:
    shapes = [state[f'{level}.0.ffn.project_out.weight'].shape[:2] for level in levels]
    return expansion_factor(*zip(*shapes, strict=True))
