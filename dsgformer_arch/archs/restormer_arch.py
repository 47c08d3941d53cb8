"""Restormer: Efficient Transformer for High-Resolution Image Restoration.

Zamir S. W., Arora A., Khan S., Hayat M., Khan F. S., Yang M.-H., CVPR 2022, arXiv 2111.09881.
Official implementation: swz30/Restormer, academic public licence.

The network is that of spandrel_extra_arches 0.2.0 (MIT): same keys and same results as the official
implementation.  Added here are what `RestorationNetwork` declares, the settings that a state dict tells,
windows for its attention, PyTorch's own layer norm where no gradient is wanted, and blocks in strips of rows
on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from basicsr.utils.registry import ARCH_REGISTRY
from spandrel.util import get_seq_len
from spandrel_extra_arches.architectures.Restormer import Restormer as SpandrelRestormer
from spandrel_extra_arches.architectures.Restormer import RestormerArch
from spandrel_extra_arches.architectures.Restormer.__arch import restormer_arch as spandrel_parts
from torch import Tensor, nn

from dsgformer_arch.archs.layers import strips
from dsgformer_arch.archs.layers.network import Outputs, RestorationNetwork
from dsgformer_arch.archs.layers.norms import norm_of_channels
from dsgformer_arch.archs.layers.settings import expansion_factor_from_state
from dsgformer_arch.archs.layers.strips import pointwise
from dsgformer_arch.archs.tlc import Windowed, window_method
from dsgformer_arch.ops.block import is_untouched

NORM_EPSILON = 1e-5
LEAST_NORM = 1e-12
"""Least norm of a row of Q or K, `F.normalize`'s."""


class LayerNorm(spandrel_parts.LayerNorm):
    """LN over the channels, (N, C, H, W) to the same; without gradients on a CPU by one operator instead of
    seven, whose result is channels-last.  Existing modules are given this class.
    """

    def forward(self, x: Tensor) -> Tensor:
        body = self.body
        one = not torch.is_grad_enabled() and x.device.type == 'cpu' and x.dtype != torch.float64
        if not one or not is_untouched(body, spandrel_parts.WithBias_LayerNorm):
            return cast(Tensor, super().forward(x))
        return norm_of_channels(x, body.normalized_shape[0], body.weight, body.bias, NORM_EPSILON)


class MDTA(spandrel_parts.Attention):
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

    @property
    def is_windowed(self) -> bool:
        """Whether `attend` was replaced, as `archs.tlc` does to give it windows."""
        return 'attend' in vars(self)


class TransformerBlock(spandrel_parts.TransformerBlock):
    """Restormer's block: Y = X + MDTA(LN(X)), then Y + GDFN(LN(Y)).  Existing blocks are given this class.

    Without gradients on a CPU it runs in strips of rows, twice over the image: the first pass adds up Q Kᵀ
    and the squares of the rows of Q and K, and keeps V; the second does everything else.
    """

    attn: MDTA

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        if not strips.suit(x) or not self._as_built():
            return cast(Tensor, super().forward(x))
        images = [self._restored(image) for image in x.split(1)]
        return images[0] if len(images) == 1 else torch.cat(images)

    def _as_built(self) -> bool:
        """Whether nothing would be passed over by calling the parts of the attention and of the GDFN."""
        untouched = is_untouched(self.attn, MDTA) and is_untouched(self.ffn, spandrel_parts.FeedForward)
        return untouched and not self.attn.is_windowed

    def _restored(self, x: Tensor) -> Tensor:
        """The block of one image."""
        scores, V = self._scores_and_values(x)
        maps = (scores * self.attn.temperature).softmax(dim=-1).flatten(0, 1)[..., None, None]

        def rest(x: Tensor, V: Tensor) -> Tensor:
            attended = F.conv2d(V, maps, groups=self.attn.num_heads)
            y = x + pointwise(self.attn.project_out, attended)
            first, second = self.ffn.dwconv(pointwise(self.ffn.project_in, self.norm2(y))).chunk(2, dim=1)
            return y + pointwise(self.ffn.project_out, F.gelu(first) * second)

        return strips.in_strips(rest, [x, V], self.ffn.dwconv.out_channels, halo=1)

    def _scores_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Q Kᵀ of rows that are normalised over the pixels, (heads, c, c), and V, (1, C, H, W)."""
        channels, heads = x.shape[1], self.attn.num_heads
        products, squares = torch.zeros(()), torch.zeros(())
        V = x.new_empty(0)
        for strip in strips.strips([x], 3 * channels, halo=1):
            qkv = self.attn.qkv_dwconv(pointwise(self.attn.qkv, self.norm1(*strip.maps)))[:, :, strip.inner]
            QK = qkv.permute(0, 2, 3, 1)[..., : 2 * channels].reshape(-1, 2 * channels)
            Q, K = QK.view(-1, 2, heads, channels // heads).unbind(1)
            products = products + (Q.permute(1, 2, 0) @ K.permute(1, 0, 2)).float()
            squares = squares + QK.float().square().sum(0)
            if not V.numel():
                V = torch.empty_like(x, dtype=qkv.dtype, memory_format=torch.channels_last)
            V[:, :, strip.rows] = qkv[:, 2 * channels :]
        q_norm, k_norm = squares.sqrt().clamp(min=LEAST_NORM).view(2, heads, -1)
        return products / (q_norm[:, :, None] * k_norm[:, None]), V


KINDS: dict[type[nn.Module], type[nn.Module]] = {
    spandrel_parts.LayerNorm: LayerNorm,
    spandrel_parts.Attention: MDTA,
    spandrel_parts.TransformerBlock: TransformerBlock,
}
"""Classes of this module by those that they extend."""


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

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for module in self.modules():
            kind = KINDS.get(type(module))
            if kind is not None:
                module.__class__ = kind

    def forward_padded(self, x: Tensor) -> Outputs:
        return super().forward_padded(strips.channels_last(x))

    def windowed_attentions(self) -> Iterator[tuple[str, Windowed]]:
        for name, module in self.named_modules():
            if isinstance(module, MDTA):
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
