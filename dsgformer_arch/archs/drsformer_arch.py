"""DRSformer: a Transformer that keeps the top-k scores of its channel attention, for deraining.

Paper: X. Chen, H. Li, M. Li, J. Pan, "Learning A Sparse Transformer Network for Effective Image
Deraining", CVPR 2023, pages 5896-5905, arXiv 2303.11950.
Official implementation: https://github.com/cschenxiang/DRSformer,
`basicsr/models/archs/DRSformer_arch.py`.  It has no licence file; its setup.py, inherited from BasicSR,
names Apache 2.0.

Where the official implementation differs from the paper, it is followed: k is not learnt.  Four fixed k,
half to four fifths of a head's width, give four softmaxes, and the weight of each is learnt (issue 2 of
the repository).  The published models for Rain200L and SPA-Data lack the two mixtures of experts
(`DRSformer_arch_200L+SPA.py`): that is `moe=False`.

For an image of H×W and C = `dim` (48: 33.66 M parameters, 32.61 M without experts):

    patch_embed, encoder_level0 (experts)       H×W×C
    encoder_level1                              H×W×C
    encoder_level2                              H/2×W/2×2C
    encoder_level3                              H/4×W/4×4C
    latent                                      H/8×W/8×8C
    decoder_level3, decoder_level2              H/4×W/4×4C, H/2×W/2×2C, on the concatenated skips
    decoder_level1, refinement (experts)        H×W×2C
    output, plus the image                      H×W×3

Levels 1 to latent and back are blocks of top-k sparse attention (TKSA) and a mixed-scale feed-forward
network (MSFN), each on a LayerNorm and with a residual.  The experts (MEFC) are seven depthwise
separable convolutions and a 3×3 mean, side by side; their weights follow from the map's global mean.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from basicsr.utils.registry import ARCH_REGISTRY
from spandrel.util import get_seq_len
from torch import Tensor, nn

from dsgformer_arch.archs.layers.network import RestorationNetwork
from dsgformer_arch.archs.layers.settings import expansion_factor
from dsgformer_arch.archs.layers.top_k import TOP_K_RATIOS
from dsgformer_arch.archs.tlc import Windowed, window_method
from dsgformer_arch.utils.errors import UserError

EXPERT_STEPS = 4
"""Layers of experts in one compensator."""

SEPARABLE_SIZES = (1, 3, 5, 7)
DILATED_SIZES = (3, 5, 7)
EXPERTS = len(SEPARABLE_SIZES) + len(DILATED_SIZES) + 1
"""Experts of one layer: the convolutions of these sizes and a 3×3 mean."""

LEVELS = ('encoder_level1', 'encoder_level2', 'encoder_level3', 'latent')


def named(**modules: nn.Module) -> nn.Sequential:
    """A sequence with names, which appear in the state dict."""
    return nn.Sequential(OrderedDict(modules))


def keep_layout(x: Tensor, like: Tensor) -> Tensor:
    """`x` laid out in memory as `like` is, channels last or contiguous.

    A norm over the permuted channels alone would switch all layers after it to channels last, which is
    the caller's choice: faster on a CPU in float32, more than twice as slow in float64.
    """
    return x if like.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


class BiasFreeLayerNorm(nn.Module):
    """Divides by the standard deviation over the last dimension; takes no mean away, adds no bias."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        variance = x.var(dim=-1, keepdim=True, unbiased=False)
        return x / torch.sqrt(variance + 1e-5) * self.weight


class LayerNorm(nn.Module):
    """LayerNorm over the channels of each pixel.  (N, C, H, W) to the same."""

    def __init__(self, dim: int, kind: Literal['WithBias', 'BiasFree']) -> None:
        super().__init__()
        self.body = BiasFreeLayerNorm(dim) if kind == 'BiasFree' else nn.LayerNorm(dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return keep_layout(self.body(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), like=x)


class TopKSparseAttention(nn.Module):
    """TKSA: channel attention whose softmax runs over the k largest scores of each row.

    With Q and K normalised over the pixels and S = τ Q Kᵀ, one c×c map a head:

        out = Σ_n attn_n · softmax( T_{k_n}(S) ) V,  n = 1..4

    Args:
        dim: channels of the input and output.
        num_heads: heads; divides `dim`.
        bias: whether the convolutions have biases.
    """

    def __init__(self, dim: int, num_heads: int, bias: bool) -> None:
        super().__init__()
        if dim % num_heads:
            raise UserError(f'{num_heads} heads do not divide {dim} channels; choose a divisor.')
        self.num_heads = num_heads
        self.top_k = tuple(int(dim // num_heads * ratio) for ratio in TOP_K_RATIOS)
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=bias)
        self.qkv_dwconv = nn.Conv2d(3 * dim, 3 * dim, 3, padding=1, groups=3 * dim, bias=bias)
        self.project_out = nn.Conv2d(dim, dim, 1, bias=bias)
        self.attn1 = nn.Parameter(torch.tensor([0.2]))
        self.attn2 = nn.Parameter(torch.tensor([0.2]))
        self.attn3 = nn.Parameter(torch.tensor([0.2]))
        self.attn4 = nn.Parameter(torch.tensor([0.2]))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        return self.project_out(self.attend(self.qkv_dwconv(self.qkv(x))))

    def attend(self, qkv: Tensor) -> Tensor:
        """Q, K and V stacked, (N, 3C, H, W), to the attended values, (N, C, H, W)."""
        n, c, h, w = qkv.shape
        q, k, v = qkv.reshape(n, 3, self.num_heads, c // 3 // self.num_heads, h * w).unbind(1)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
        return (self.sparse_map(scores) @ v).reshape(n, c // 3, h, w)

    def sparse_map(self, scores: Tensor) -> Tensor:
        """Σ_n attn_n · softmax(T_{k_n}(scores)), (N, heads, c, c) to the same: V then multiplies once."""
        total = torch.zeros_like(scores)
        for weight, k in zip((self.attn1, self.attn2, self.attn3, self.attn4), self.top_k, strict=True):
            # Each k has a `topk` of its own: a prefix of one sort would break ties in another way than
            # the official code, and a feature map of one pixel (8×8 at the input) has nothing but ties.
            kept, index = scores.topk(k, dim=-1)
            probability = kept.softmax(dim=-1)
            total = total + weight * probability.new_zeros(scores.shape).scatter(-1, index, probability)
        return total


class MixedScaleFeedForward(nn.Module):
    """MSFN: depthwise 3×3 and 5×5 convolutions side by side, twice, the halves exchanged in between."""

    def __init__(self, dim: int, expansion: float, bias: bool) -> None:
        super().__init__()
        hidden = int(dim * expansion)
        self.project_in = nn.Conv2d(dim, 2 * hidden, 1, bias=bias)
        self.dwconv3x3 = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, bias=bias)
        self.dwconv5x5 = nn.Conv2d(2 * hidden, 2 * hidden, 5, padding=2, groups=2 * hidden, bias=bias)
        # A group here is two neighbours of the concatenation, not one channel at its two scales.
        self.dwconv3x3_1 = nn.Conv2d(2 * hidden, hidden, 3, padding=1, groups=hidden, bias=bias)
        self.dwconv5x5_1 = nn.Conv2d(2 * hidden, hidden, 5, padding=2, groups=hidden, bias=bias)
        self.project_out = nn.Conv2d(2 * hidden, dim, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        x = self.project_in(x)
        first3, second3 = F.relu(self.dwconv3x3(x)).chunk(2, dim=1)
        first5, second5 = F.relu(self.dwconv5x5(x)).chunk(2, dim=1)
        first = F.relu(self.dwconv3x3_1(torch.cat([first3, first5], dim=1)))
        second = F.relu(self.dwconv5x5_1(torch.cat([second3, second5], dim=1)))
        return self.project_out(torch.cat([first, second], dim=1))


class SparseTransformerBlock(nn.Module):
    """STB: x + TKSA(LN(x)), then x + MSFN(LN(x)).  (N, C, H, W) to the same."""

    def __init__(
        self, dim: int, num_heads: int, expansion: float, bias: bool, norm: Literal['WithBias', 'BiasFree']
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, norm)
        self.attn = TopKSparseAttention(dim, num_heads, bias)
        self.norm2 = LayerNorm(dim, norm)
        self.ffn = MixedScaleFeedForward(dim, expansion, bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


def separable_expert(dim: int, size: int) -> nn.Sequential:
    """Two depthwise separable convolutions of size×size with a ReLU between them."""

    def depthwise() -> nn.Conv2d:
        return nn.Conv2d(dim, dim, size, padding=size // 2, groups=dim, bias=False)

    def pointwise() -> nn.Conv2d:
        return nn.Conv2d(dim, dim, 1, bias=False)

    return named(op=nn.Sequential(depthwise(), pointwise(), nn.ReLU(), depthwise(), pointwise()))


def dilated_expert(dim: int, size: int) -> nn.Sequential:
    """One depthwise separable convolution of size×size, dilated by 2."""
    depthwise = nn.Conv2d(dim, dim, size, padding=size - 1, dilation=2, groups=dim, bias=False)
    return named(op=nn.Sequential(depthwise, nn.Conv2d(dim, dim, 1, bias=False)))


class ExpertWeights(nn.Module):
    """The weights of all layers' experts, from the mean of the feature map that enters the first.

    `avg_pool` has no state and may be replaced by a local mean of the same height and width as the
    input; the weights then vary over the image.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        outputs = EXPERT_STEPS * EXPERTS
        self.ca_fc = nn.Sequential(nn.Linear(dim, 2 * outputs), nn.ReLU(), nn.Linear(2 * outputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (steps, N, experts, h, w), which sum to 1 over the experts; h×w is 1×1 or H×W."""
        scores = self.ca_fc(self.avg_pool(x).permute(0, 2, 3, 1)).unflatten(-1, (EXPERT_STEPS, EXPERTS))
        return scores.softmax(dim=-1).permute(3, 0, 4, 1, 2)


class ExpertLayer(nn.Module):
    """The experts of one layer side by side, each weighted, then mixed by a 1×1 convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self._ops = nn.ModuleList(
            [
                *(separable_expert(dim, size) for size in SEPARABLE_SIZES),
                *(dilated_expert(dim, size) for size in DILATED_SIZES),
                nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
            ]
        )
        self._out = nn.Sequential(nn.Conv2d(dim * EXPERTS, dim, 1, bias=False), nn.ReLU())

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """x of shape (N, C, H, W), weights of (N, experts, h, w); returns (N, C, H, W)."""
        shares = weights.split(1, dim=1)
        return self._out(
            torch.cat([expert(x) * share for expert, share in zip(self._ops, shares, strict=True)], dim=1)
        )


class ExpertStack(nn.Module):
    """Layers of experts one after the other, each with a residual."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.preprocess = named(op=nn.Sequential(nn.Conv2d(dim, dim, 1, bias=False), nn.ReLU()))
        self._ops = nn.ModuleList([ExpertLayer(dim) for _ in range(EXPERT_STEPS)])

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """x of shape (N, C, H, W), weights of (steps, N, experts, h, w); returns (N, C, H, W)."""
        x = self.preprocess(x)
        for layer, layer_weights in zip(self._ops, weights, strict=True):
            x = F.relu(layer(x, layer_weights) + x)
        return x


class ExpertCompensator(nn.Module):
    """MEFC: mixture of experts feature compensator.  (N, C, H, W) to the same."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([ExpertWeights(dim), ExpertStack(dim)])

    def forward(self, x: Tensor) -> Tensor:
        weigh, stack = self.layers
        return stack(x, weigh(x))


def downsample(dim: int) -> nn.Sequential:
    """(N, C, H, W) to (N, 2C, H/2, W/2)."""
    return named(body=nn.Sequential(nn.Conv2d(dim, dim // 2, 3, padding=1, bias=False), nn.PixelUnshuffle(2)))


def upsample(dim: int) -> nn.Sequential:
    """(N, C, H, W) to (N, C/2, 2H, 2W)."""
    return named(body=nn.Sequential(nn.Conv2d(dim, dim * 2, 3, padding=1, bias=False), nn.PixelShuffle(2)))


@ARCH_REGISTRY.register()
class DRSformer(RestorationNetwork):
    """DRSformer; the module's docstring gives the source and the structure.

    Args:
        inp_channels: channels of the image.
        out_channels: channels of the restored image; the same, for the image is added to the output.
        dim: C, even.
        num_blocks: blocks at level 1, 2, 3 and in the latent; the decoder mirrors levels 1 to 3.
        heads: heads at level 1, 2, 3 and in the latent.
        ffn_expansion_factor: hidden channels of the feed-forward network over its input's, rounded down.
        bias: whether the convolutions outside the embedding, the resizing and the experts have biases.
        LayerNorm_type: `'WithBias'` or `'BiasFree'`.
        moe: whether the network has the two mixtures of experts.
    """

    pad_multiple = 8
    min_size = 8
    sees_whole_image = True
    channel_settings = ('inp_channels', 'out_channels')
    width_settings = ('dim',)
    depth_settings = ('num_blocks',)

    def __init__(
        self,
        inp_channels: int = 3,
        out_channels: int = 3,
        dim: int = 48,
        num_blocks: Sequence[int] = (4, 6, 6, 8),
        heads: Sequence[int] = (1, 2, 4, 8),
        ffn_expansion_factor: float = 2.66,
        bias: bool = False,
        LayerNorm_type: Literal['WithBias', 'BiasFree'] = 'WithBias',
        moe: bool = True,
    ) -> None:
        super().__init__()

        def blocks(level: int, width: int) -> nn.Sequential:
            return nn.Sequential(
                *(
                    SparseTransformerBlock(width, heads[level], ffn_expansion_factor, bias, LayerNorm_type)
                    for _ in range(num_blocks[level])
                )
            )

        def experts(width: int) -> nn.Module:
            return ExpertCompensator(width) if moe else nn.Identity()

        self.patch_embed = named(proj=nn.Conv2d(inp_channels, dim, 3, padding=1, bias=False))
        self.encoder_level0 = experts(dim)
        self.encoder_level1 = blocks(0, dim)
        self.down1_2 = downsample(dim)
        self.encoder_level2 = blocks(1, 2 * dim)
        self.down2_3 = downsample(2 * dim)
        self.encoder_level3 = blocks(2, 4 * dim)
        self.down3_4 = downsample(4 * dim)
        self.latent = blocks(3, 8 * dim)
        self.up4_3 = upsample(8 * dim)
        self.reduce_chan_level3 = nn.Conv2d(8 * dim, 4 * dim, 1, bias=bias)
        self.decoder_level3 = blocks(2, 4 * dim)
        self.up3_2 = upsample(4 * dim)
        self.reduce_chan_level2 = nn.Conv2d(4 * dim, 2 * dim, 1, bias=bias)
        self.decoder_level2 = blocks(1, 2 * dim)
        self.up2_1 = upsample(2 * dim)
        self.decoder_level1 = blocks(0, 2 * dim)
        self.refinement = experts(2 * dim)
        self.output = nn.Conv2d(2 * dim, out_channels, 3, padding=1, bias=bias)

    def forward_padded(self, inp_img: Tensor) -> Tensor:
        """The image, (N, C, H, W) in [0, 1], H and W multiples of 8, to the restored one, not clipped."""
        level1 = self.encoder_level1(self.encoder_level0(self.patch_embed(inp_img)))
        level2 = self.encoder_level2(self.down1_2(level1))
        level3 = self.encoder_level3(self.down2_3(level2))
        latent = self.latent(self.down3_4(level3))

        x = self.reduce_chan_level3(torch.cat([self.up4_3(latent), level3], dim=1))
        x = self.decoder_level3(x)
        x = self.reduce_chan_level2(torch.cat([self.up3_2(x), level2], dim=1))
        x = self.decoder_level2(x)
        x = self.decoder_level1(torch.cat([self.up2_1(x), level1], dim=1))
        return self.output(self.refinement(x)) + inp_img

    def windowed_attentions(self) -> Iterator[tuple[str, Windowed]]:
        for name, module in self.named_modules():
            if isinstance(module, TopKSparseAttention):
                yield name, window_method(module, 'attend')

    @classmethod
    def recognises(cls, state: Mapping[str, Tensor]) -> bool:
        """Whether `state` (a bare state dict) is a DRSformer's, with or without experts."""
        return {
            'patch_embed.proj.weight',
            'down3_4.body.0.weight',
            'output.weight',
            *(f'{level}.0.attn.attn4' for level in LEVELS),
            *(f'{level}.0.ffn.dwconv5x5_1.weight' for level in LEVELS),
        } <= state.keys()

    @classmethod
    def settings_from_state(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """The keyword arguments that rebuild the network of `state`, a bare state dict that it recognises."""
        dim, inp_channels = state['patch_embed.proj.weight'].shape[:2]
        return {
            'inp_channels': inp_channels,
            'out_channels': state['output.weight'].shape[0],
            'dim': dim,
            'num_blocks': [get_seq_len(state, level) for level in LEVELS],
            'heads': [state[f'{level}.0.attn.temperature'].shape[0] for level in LEVELS],
            'ffn_expansion_factor': expansion_factor(
                [dim * 2**i for i in range(len(LEVELS))],
                [state[f'{level}.0.ffn.project_out.weight'].shape[1] // 2 for level in LEVELS],
            ),
            'bias': 'output.bias' in state,
            'LayerNorm_type': 'WithBias' if 'latent.0.norm1.body.bias' in state else 'BiasFree',
            'moe': 'encoder_level0.layers.0.ca_fc.0.weight' in state,
        }
