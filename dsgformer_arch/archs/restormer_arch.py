"""Restormer: Efficient Transformer for High-Resolution Image Restoration.

Zamir S. W., Arora A., Khan S., Hayat M., Khan F. S., Yang M.-H., CVPR 2022, arXiv 2111.09881.
Official implementation: swz30/Restormer, academic public licence.

The network is that of spandrel_extra_arches 0.2.0 (MIT), unchanged: same keys and same results as the
official implementation.  Added here are what `RestorationNetwork` declares, the settings that a state
dict tells, and windows for its attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch.nn.functional as F
from basicsr.utils.registry import ARCH_REGISTRY
from spandrel.util import get_seq_len
from spandrel_extra_arches.architectures.Restormer import Restormer as SpandrelRestormer
from spandrel_extra_arches.architectures.Restormer import RestormerArch
from spandrel_extra_arches.architectures.Restormer.__arch.restormer_arch import Attention
from torch import Tensor

from dsgformer_arch.archs.layers.network import RestorationNetwork
from dsgformer_arch.archs.layers.settings import expansion_factor_from_state
from dsgformer_arch.archs.tlc import Windowed, window_method


class MDTA(Attention):
    """Restormer's channel attention, with the part that sums over all pixels in a method of its own.

    Existing modules are given this class.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        return self.project_out(self.attend(self.qkv_dwconv(self.qkv(x))))

    def attend(self, qkv: Tensor) -> Tensor:
        """Q, K and V stacked, (N, 3C, H, W), to softmax(τ Q Kᵀ) V, (N, C, H, W)."""
        n, c, h, w = qkv.shape
        q, k, v = qkv.reshape(n, 3, self.num_heads, c // 3 // self.num_heads, h * w).unbind(1)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
        return (scores.softmax(dim=-1) @ v).reshape(n, c // 3, h, w)


@ARCH_REGISTRY.register()
class Restormer(RestorationNetwork, SpandrelRestormer):
    """Restormer for deblurring: 26.13 M parameters.

    Keyword arguments: `inp_channels`, `out_channels`, `dim`, `num_blocks` and `heads` (levels 1–3 and
    latent), `num_refinement_blocks`, `ffn_expansion_factor`, `bias`, `LayerNorm_type` (`'WithBias'` or
    `'BiasFree'`, the official one for denoising) and `dual_pixel_task`; the official defaults.
    """

    spandrel_architecture = RestormerArch()
    pad_multiple: int = 8
    min_size: int = 8
    sees_whole_image = True
    channel_settings = ('inp_channels', 'out_channels')
    width_settings = ('dim',)
    depth_settings = ('num_blocks', 'num_refinement_blocks')

    def windowed_attentions(self) -> Iterator[tuple[str, Windowed]]:
        for name, module in self.named_modules():
            if isinstance(module, Attention):
                module.__class__ = MDTA
                yield name, window_method(module, 'attend')

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
            'ffn_expansion_factor': expansion_factor_from_state(state, levels),
            'bias': 'output.bias' in state,
            'LayerNorm_type': 'WithBias' if 'latent.0.norm1.body.bias' in state else 'BiasFree',
            'dual_pixel_task': 'skip_conv.weight' in state,
        }
