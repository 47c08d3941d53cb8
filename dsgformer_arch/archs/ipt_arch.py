"""IPT: Pre-Trained Image Processing Transformer.

Chen H., Wang Y., Guo T., Xu C., Deng Y., Liu Z., Ma S., Xu C., Xu C., Gao W., CVPR 2021,
arXiv 2012.00364.  Official implementation: huawei-noah/Pretrained-IPT, Apache 2.0.

The network and its tiling are those of spandrel 0.4.2 (MIT), unchanged: same keys and same results as the
official implementation.  Added here are images in [0, 1] and in batches, what `RestorationNetwork`
declares, and the settings that a state dict tells.

IPT works on values of 0 to 255, which bfloat16 resolves to 1 from 128 up: under autocast its input and its
result are no finer than 8 bits.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from spandrel.architectures.IPT import IPT as SpandrelIPT  # noqa: N811 (a class, for all its capitals)
from spandrel.architectures.IPT import IPTArch
from spandrel.architectures.IPT import Model as Chopper
from spandrel.util import get_seq_len
from torch import Tensor

from dsgformer_arch.archs.layers.network import RestorationNetwork
from dsgformer_arch.utils.errors import UserError


@ARCH_REGISTRY.register()
class IPT(RestorationNetwork, SpandrelIPT):
    """IPT for restoration: 115.31 M parameters with one head and tail.

    The Transformer sees patches of 48×48 and nothing else.  An image of that size goes through it
    once.  A larger one is cut into patches at every 12th pixel, and each pixel is the mean of the
    patches that contain it in their inner half (at the border, of the strips along it), as the official
    implementation tests: 16 passes a pixel, some 13,000 GMACs for 256×256.

    The pretrained network has a head and a tail for each task, the fine-tuned ones (`--derain`,
    `--denoise`) have one of scale 1.  This class restores, so it runs the first of scale 1;
    `set_scale` chooses another.

    Args:
        scale: enlargement of each task; one of them must be 1.
        crop_batch_size: patches that go through the Transformer together.
        settings: `patch_size`, `patch_dim`, `n_feats`, `rgb_range`, `num_heads`, `num_layers`,
            `num_queries`, `dropout_rate`, `mlp`, `pos_every`, `no_pos` and `no_norm`, as in the official
            implementation.

    Raises:
        UserError: no task has scale 1.
    """

    spandrel_architecture = IPTArch()
    pad_multiple: int = 1
    min_size: int = 48
    depth_settings = ('num_layers', 'scale')
    patch_size: int
    rgb_range: float

    def __init__(self, *, scale: Sequence[int] = (1,), crop_batch_size: int = 64, **settings: Any) -> None:
        if 1 not in scale:
            raise UserError(f'IPT of scale {list(scale)} enlarges; restoring takes a checkpoint of scale 1.')
        super().__init__(scale=list(scale), **settings)
        self.crop_batch_size = crop_batch_size
        self.min_size = self.patch_size
        SpandrelIPT.set_scale(self, list(scale).index(1))

    def forward_padded(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1], H and W at least `patch_size`, to the same size."""
        if x.shape[-2] == x.shape[-1] == self.patch_size:
            return SpandrelIPT.forward(self, x * self.rgb_range) / self.rgb_range
        # It calls this network again, on patches; and it takes no batches.
        chopped = Chopper(self, self.crop_batch_size)
        return torch.cat([chopped.forward_chop(image) for image in x.split(1)])

    def join_batches(self) -> None:
        self.crop_batch_size = sys.maxsize

    @classmethod
    def settings_from_state(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """The keyword arguments that rebuild the network of `state`.

        `num_heads`, `pos_every` and, without `mlp` and positions, the patch size leave no trace in the
        shapes.  `rgb_range` is read from the values of `sub_mean.bias`.
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
"""Mean of DIV2K's red channel, which IPT subtracts from its input."""


def _tail_scale(state: Mapping[str, Tensor], tail: int) -> int:
    """How much one of IPT's tails enlarges: a PixelShuffle by s takes s² channels for each one."""
    scale = 1
    for step in range(get_seq_len(state, f'tail.{tail}.0')):
        weight = state.get(f'tail.{tail}.0.{step}.weight')
        if weight is not None:
            scale *= math.isqrt(weight.shape[0] // weight.shape[1])
    return scale
