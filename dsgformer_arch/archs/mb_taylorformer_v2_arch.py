"""MB-TaylorFormer V2 (Jin Z., Qiu Y., Zhang K., Li H., Luo W., TPAMI 2025, arXiv 2501.04486).

"MB-TaylorFormer V2: Improved Multi-branch Linear Transformer Expanded by Taylor Formula for Image
Restoration".  Official implementation: FVL2020/MB-TaylorFormerV2, without a licence.

A U-net of four levels.  Each stage embeds its input into several branches, each the deformable
convolution of the one before, runs linear-attention blocks on every branch with weights of its own, and
merges the branches by a softmax over them (SKFF).  The attention is softmax expanded by Taylor's formula:
the first-order term with normalised q and k, and the remainder with ReLU(·)^p instead of the exponential,
so that no map of pixels × pixels is formed.

    patch_embed  (N, 3, H, W) → (N, d0, H, W)
    encoder      d0 at H×W, d1 at H/2, d2 at H/4, latent d3 at H/8
    decoder      d2 at H/4, d1 at H/2, d1 at H×W, refinement at H×W, output + image

Where the official implementation differs from the paper, it is followed: the refinement stage has as many
blocks as level 1, the first encoder level has no residual around it, every norm is bias-free, and
`ffn_expansion_factor` is always 2.66.  It keeps branches in the batch, (p N) C H W; here they are a list.

`one_M`, a parameter without gradient, has to be 1: the denominator of the attention,
n · one_M + Σ q̂·k̂ + s · Σ q̃·k̃, is then positive, since |q̂·k̂| ≤ 1 and q̃·k̃ ≥ 0, and the network is well
conditioned (a change of the image changes the result by less, see `tests/conformance/check.py`).  Smaller
values give denominators of both signs: results then depend on the order in which sums are taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from basicsr.utils.registry import ARCH_REGISTRY
from spandrel.util import get_seq_len
from torch import Tensor, nn

from dsgformer_arch.archs.layers.deform_conv import deform_conv2d
from dsgformer_arch.archs.layers.network import RestorationNetwork
from dsgformer_arch.utils.errors import UserError

Branches = list[Tensor]

EXPANSION = 2.66
"""Width of the feed-forward network over that of the block."""

WINDOWS = {1: {3: 1}, 2: {3: 2}, 4: {3: 2, 5: 2}, 8: {3: 2, 5: 3, 7: 3}}
"""By number of heads: how many of them have a convolutional position encoding of which kernel size."""

TAPS = 3
"""Kernel size of the deformable convolution."""

EPSILON = 1e-8


class BranchConv(nn.Conv2d):
    """One convolution for each branch, stored like the official ones as groups of a single one."""

    def __init__(self, paths: int, channels_in: int, channels_out: int, kernel_size: int = 1) -> None:
        depthwise = kernel_size > 1
        groups = paths * (channels_out if depthwise else 1)
        super().__init__(
            channels_in * paths,
            channels_out * paths,
            kernel_size,
            padding=kernel_size // 2,
            groups=groups,
            bias=False,
        )
        self.paths = paths

    def forward(self, branches: Branches) -> Branches:  # type: ignore[override]
        """Each (N, channels_in, H, W) to (N, channels_out, H, W)."""
        groups = self.groups // self.paths
        return [
            F.conv2d(x, weight, None, padding=self.padding[0], groups=groups)
            for x, weight in zip(branches, self.weight.chunk(self.paths), strict=True)
        ]


class BranchNorm(nn.Module):
    """Division by the standard deviation over the channels; weights a branch, no bias, no mean taken off."""

    def __init__(self, dim: int, paths: int) -> None:
        super().__init__()
        self.body = nn.ParameterDict({'weight': nn.Parameter(torch.ones(paths, dim))})

    def forward(self, branches: Branches) -> Branches:
        normalised = []
        for x, weight in zip(branches, self.body['weight'].unbind(), strict=True):
            normalised.append(x / torch.sqrt(variance(x) + 1e-5) * weight.view(-1, 1, 1))
        return normalised


def variance(x: Tensor) -> Tensor:
    """Of (N, C, H, W) over the channels, (N, 1, H, W)."""
    if x.dtype == torch.float64:
        return x.var(1, keepdim=True, unbiased=False)
    # Several times as fast on a CPU, and equal up to rounding.
    return (x - x.mean(1, keepdim=True)).square().mean(1, keepdim=True)


class FeedForward(nn.Module):
    """Gated feed-forward network with depthwise convolutions, on each branch."""

    def __init__(self, dim: int, paths: int) -> None:
        super().__init__()
        hidden = int(dim * EXPANSION)
        self.project_in_1 = BranchConv(paths, dim, hidden)
        self.project_in_2 = BranchConv(paths, dim, hidden)
        self.dwconv_1 = BranchConv(paths, hidden, hidden, 3)
        self.dwconv_2 = BranchConv(paths, hidden, hidden, 3)
        self.project_out = BranchConv(paths, hidden, dim)

    def forward(self, branches: Branches) -> Branches:
        gates = self.dwconv_1(self.project_in_1(branches))
        values = self.dwconv_2(self.project_in_2(branches))
        return self.project_out([F.gelu(g) * v for g, v in zip(gates, values, strict=True)])


class PositionEncoding(nn.Module):
    """Convolutional position encoding of V: one number a head and pixel."""

    def __init__(self, width: int, heads: int, paths: int) -> None:
        super().__init__()
        self.paths = paths
        self.widths = [count * width for count in WINDOWS[heads].values()]
        self.conv_list = nn.ModuleList(
            nn.Conv2d(count * width * paths, count * paths, size, padding=size // 2, groups=count * paths)
            for size, count in WINDOWS[heads].items()
        )

    def forward(self, values: Branches) -> Branches:
        """Each (N, heads · width, H, W) to (N, heads, H, W)."""
        encoded = []
        for path, value in enumerate(values):
            parts = value.split(self.widths, dim=1)
            maps = [self._convolve(*pair, path) for pair in zip(self.conv_list, parts, strict=True)]
            encoded.append(torch.cat(maps, dim=1))
        return encoded

    def _convolve(self, conv: nn.Module, part: Tensor, path: int) -> Tensor:
        assert isinstance(conv, nn.Conv2d)
        assert conv.bias is not None
        weight, bias = conv.weight.chunk(self.paths)[path], conv.bias.chunk(self.paths)[path]
        return F.conv2d(part, weight, bias, padding=conv.padding, groups=conv.groups // self.paths)


class Attention(nn.Module):
    """Linear attention T-MSA++ on each branch.

    With q̂, k̂ of unit length over the channels and q̃, k̃ the unit vectors of ReLU(q)^p, ReLU(k)^p:

        out = α · (Σ v + q̂ (k̂ᵀ v) + s · q̃ (k̃ᵀ v)) / (n + q̂ Σ k̂ + s · q̃ Σ k̃) + σ(position of v)

    n is the number of pixels, s = σ(scale), α the temperature.
    """

    def __init__(self, dim: int, heads: int, paths: int, focusing_factor: int) -> None:
        super().__init__()
        if heads not in WINDOWS or dim % heads:
            raise UserError(f'heads: {heads} of {dim} channels cannot be; take 1, 2, 4 or 8 that divide dim')
        self.heads = heads
        self.focusing_factor = focusing_factor
        self.temperature = nn.Parameter(torch.ones(paths, heads, 1, 1))
        self.qkv = BranchConv(paths, dim, 3 * dim)
        self.qkv_dwconv = BranchConv(paths, 3 * dim, 3 * dim, 3)
        self.project_out = BranchConv(paths, dim, dim)
        self.refine_att = PositionEncoding(dim // heads, heads, paths)
        self.scale = nn.Parameter(torch.ones(paths, heads, 1, 1))
        self.one_M = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, branches: Branches) -> Branches:
        qkv = self.qkv_dwconv(self.qkv(branches))
        position = torch.cat(self.refine_att([x.chunk(3, dim=1)[2] for x in qkv]))
        joined = torch.cat(qkv)
        # An eighth power and a sum over all pixels leave the range of float16.
        working = torch.promote_types(joined.dtype, torch.float32)
        with torch.autocast(joined.device.type, enabled=False):
            q, k, v = joined.to(working).chunk(3, dim=1)
            attended = self.attend(q, k, v, position.to(working), branches[0].shape[0])
        return self.project_out(list(attended.to(joined.dtype).chunk(len(branches))))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor, batch: int) -> Tensor:
        """The attention of all branches, one after another in the batch.

        Args:
            q: (paths · batch, dim, H, W).
            k: likewise.
            v: likewise.
            position: (paths · batch, heads, H, W).
            batch: images.

        Returns:
            (paths · batch, dim, H, W).
        """
        size = q.shape[-2:]
        q, k, v = (t.unflatten(1, (self.heads, -1)).flatten(-2) for t in (q, k, v))
        q_hat, k_hat = unit(q), unit(k)
        q_tilde, k_tilde = (unit(F.relu(t) ** self.focusing_factor) for t in (q, k))
        scale = torch.sigmoid(self.scale).repeat_interleave(batch, 0)
        first, rest = (k_hat @ v.mT).mT @ q_hat, (k_tilde @ v.mT).mT @ q_tilde
        numerator = v.sum(-1, keepdim=True) + first + scale * rest
        denominator = q.shape[-1] * self.one_M + k_hat.sum(-1).unsqueeze(-2) @ q_hat
        denominator = denominator + (scale * k_tilde).sum(-1).unsqueeze(-2) @ q_tilde + EPSILON
        attended = numerator / denominator * self.temperature.repeat_interleave(batch, 0)
        attended = attended + torch.sigmoid(position).flatten(-2).unsqueeze(-2)
        return attended.unflatten(-1, size).flatten(1, 2)


def unit(x: Tensor) -> Tensor:
    """Vectors over the channels, dimension -2, divided by their length."""
    return x / (torch.linalg.vector_norm(x, dim=-2, keepdim=True) + EPSILON)


class TransformerBlock(nn.Module):
    """Attention and feed-forward network, each with a norm before and a residual around it."""

    def __init__(self, dim: int, heads: int, paths: int, focusing_factor: int) -> None:
        super().__init__()
        self.norm1 = BranchNorm(dim, paths)
        self.attn = Attention(dim, heads, paths, focusing_factor)
        self.norm2 = BranchNorm(dim, paths)
        self.ffn = FeedForward(dim, paths)

    def forward(self, branches: Branches) -> Branches:
        branches = [x + y for x, y in zip(branches, self.attn(self.norm1(branches)), strict=True)]
        return [x + y for x, y in zip(branches, self.ffn(self.norm2(branches)), strict=True)]


class SelectiveFusion(nn.Module):
    """SKFF: the branches' sum, weighted a channel by a softmax over the branches.  (N, dim, H, W)."""

    def __init__(self, dim: int, paths: int) -> None:
        super().__init__()
        hidden = max(dim // 8, 4)
        self.conv_du = nn.Sequential(nn.Conv2d(dim, hidden, 1, bias=False), nn.PReLU())
        self.fcs = nn.ModuleList(nn.Conv2d(hidden, dim, 1, bias=False) for _ in range(paths))

    def forward(self, branches: Branches) -> Tensor:
        summary = self.conv_du(total(branches).mean((2, 3), keepdim=True))
        shares = torch.stack([fc(summary) for fc in self.fcs], 1).softmax(1)
        return total([x * share for x, share in zip(branches, shares.unbind(1), strict=True)])


def total(branches: Branches) -> Tensor:
    """The sum of all branches."""
    result = branches[0]
    for branch in branches[1:]:
        result = result + branch
    return result


class DepthwiseDeformConv(nn.Module):
    """Depthwise 3×3 convolution whose taps are moved by offsets."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, 1, TAPS, TAPS))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        return deform_conv2d(x, offset, self.weight, padding=TAPS // 2)


class PatchEmbedding(nn.Module):
    """A branch of the next larger receptive field: deformable convolution, 1×1, hard swish."""

    def __init__(self, dim: int, offset_clamp: Sequence[float] | None) -> None:
        super().__init__()
        self.offset_clamp = offset_clamp
        self.offset_generator = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False),
            nn.Conv2d(dim, 2 * TAPS * TAPS, 1, bias=False),
        )
        self.dcn = DepthwiseDeformConv(dim)
        self.pwconv = nn.Conv2d(dim, dim, 1, bias=False)
        for conv in (*self.offset_generator, self.pwconv):
            fan_out = conv.kernel_size[0] * conv.kernel_size[1] * conv.out_channels
            nn.init.normal_(conv.weight, std=math.sqrt(2 / fan_out))

    def forward(self, x: Tensor) -> Tensor:
        offset = self.offset_generator(x)
        if self.offset_clamp:
            offset = offset.clamp(*self.offset_clamp)
        return F.hardswish(self.pwconv(self.dcn(x, offset)))


class MultiScaleEmbedding(nn.Module):
    """(N, dim, H, W) to one tensor of that shape a branch, each made of the one before."""

    def __init__(self, dim: int, paths: int, offset_clamp: Sequence[float] | None) -> None:
        super().__init__()
        self.patch_embeds = nn.ModuleList(
            nn.ModuleDict({'patch_conv': PatchEmbedding(dim, offset_clamp)}) for _ in range(paths)
        )

    def forward(self, x: Tensor) -> Branches:
        branches = []
        for embed in self.patch_embeds:
            x = embed['patch_conv'](x)  # type: ignore[index]
            branches.append(x)
        return branches


class Stage(nn.Module):
    """Transformer blocks on the branches, then their fusion."""

    def __init__(self, dim: int, blocks: int, heads: int, paths: int, focusing_factor: int) -> None:
        super().__init__()
        layers = nn.Sequential(*(TransformerBlock(dim, heads, paths, focusing_factor) for _ in range(blocks)))
        self.mhca_blk = nn.ModuleDict({'MHCA_layers': layers})
        self.aggregate = SelectiveFusion(dim, paths)

    def forward(self, branches: Branches) -> Tensor:
        return self.aggregate(self.mhca_blk['MHCA_layers'](branches))


class Resample(nn.Module):
    """Depthwise 3×3 and 1×1 convolutions to `channels`, then a pixel (un)shuffle."""

    def __init__(self, dim: int, channels: int, shuffle: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False),
            nn.Conv2d(dim, channels, 1, bias=False),
            shuffle,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def downsample(dim: int, dim_out: int) -> Resample:
    """(N, dim, H, W) to (N, dim_out, H/2, W/2)."""
    return Resample(dim, dim_out // 4, nn.PixelUnshuffle(2))


def upsample(dim: int, dim_out: int) -> Resample:
    """(N, dim, H, W) to (N, dim_out, 2H, 2W)."""
    return Resample(dim, dim_out * 4, nn.PixelShuffle(2))


@ARCH_REGISTRY.register()
class MBTaylorFormerV2(RestorationNetwork):
    """MB-TaylorFormer V2.  (N, inp_channels, H, W) to (N, 3, H, W).

    Args:
        inp_channels: channels of the image; 6 for dual-pixel images.
        dim: channels by level.
        num_blocks: blocks by level; the decoder mirrors them, refinement has those of the first.
        heads: attention heads by level, each 1, 2, 4 or 8.
        bias: biases of the 1×1 convolutions that merge skips.
        dual_pixel_task: no residual to the image but one to the embedding.
        num_path: branches by level.
        offset_clamp: how far, in pixels, a tap may move; None for any distance.
        focusing_factor: p, the power that approximates the Taylor remainder.

    Raises:
        UserError: `dim` and `heads` do not fit each other, or the network.
    """

    pad_multiple = 8
    min_size = 8
    sees_whole_image = True
    channel_settings = ('inp_channels',)
    width_settings = ('dim',)
    depth_settings = ('num_blocks', 'num_path')

    def __init__(
        self,
        inp_channels: int = 3,
        dim: Sequence[int] = (24, 48, 72, 96),
        num_blocks: Sequence[int] = (2, 3, 3, 4),
        heads: Sequence[int] = (1, 2, 4, 8),
        bias: bool = False,
        dual_pixel_task: bool = False,
        num_path: Sequence[int] = (2, 2, 2, 2),
        offset_clamp: Sequence[float] | None = (-1, 1),
        focusing_factor: int = 8,
    ) -> None:
        super().__init__()
        self.dual_pixel_task = dual_pixel_task

        def embedding(level: int, width: int) -> MultiScaleEmbedding:
            return MultiScaleEmbedding(width, num_path[level], offset_clamp)

        def stage(level: int, width: int) -> Stage:
            return Stage(width, num_blocks[level], heads[level], num_path[level], focusing_factor)

        # Every stage is an embedding into branches and the blocks that run on them, with official names.
        d0, d1, d2, d3 = dim
        if d1 != 2 * d0 or any(width % 4 for width in dim[1:]):
            raise UserError(
                f'dim: {list(dim)} cannot be; the second is twice the first, the others multiples of 4'
            )
        self.patch_embed = nn.ModuleDict({'proj': nn.Conv2d(inp_channels, d0, 3, padding=1, bias=False)})
        self.patch_embed_encoder_level1, self.encoder_level1 = embedding(0, d0), stage(0, d0)
        self.down1_2 = downsample(d0, d1)
        self.patch_embed_encoder_level2, self.encoder_level2 = embedding(1, d1), stage(1, d1)
        self.down2_3 = downsample(d1, d2)
        self.patch_embed_encoder_level3, self.encoder_level3 = embedding(2, d2), stage(2, d2)
        self.down3_4 = downsample(d2, d3)
        self.patch_embed_latent, self.latent = embedding(3, d3), stage(3, d3)
        self.up4_3 = upsample(d3, d2)
        self.reduce_chan_level3 = nn.Sequential(nn.Conv2d(2 * d2, d2, 1, bias=bias))
        self.patch_embed_decoder_level3, self.decoder_level3 = embedding(2, d2), stage(2, d2)
        self.up3_2 = upsample(d2, d1)
        self.reduce_chan_level2 = nn.Sequential(nn.Conv2d(2 * d1, d1, 1, bias=bias))
        self.patch_embed_decoder_level2, self.decoder_level2 = embedding(1, d1), stage(1, d1)
        self.up2_1 = upsample(d1, d0)
        self.patch_embed_decoder_level1, self.decoder_level1 = embedding(0, d1), stage(0, d1)
        self.patch_embed_refinement, self.refinement = embedding(0, d1), stage(0, d1)
        if dual_pixel_task:
            self.skip_conv = nn.Conv2d(d0, d1, 1, bias=bias)
        self.output = nn.Sequential(nn.Conv2d(d1, 3, 3, padding=1, bias=False))

    def forward_padded(self, image: Tensor) -> Tensor:
        if image.dtype != torch.float64:
            image = image.contiguous(memory_format=torch.channels_last)  # several times as fast on a CPU
        embedded = self.patch_embed['proj'](image)
        e1 = self.encoder_level1(self.patch_embed_encoder_level1(embedded))
        x = self.down1_2(e1)
        e2 = self.encoder_level2(self.patch_embed_encoder_level2(x)) + x
        x = self.down2_3(e2)
        e3 = self.encoder_level3(self.patch_embed_encoder_level3(x)) + x
        x = self.down3_4(e3)
        x = self.latent(self.patch_embed_latent(x)) + x
        x = self.reduce_chan_level3(torch.cat([self.up4_3(x), e3], 1))
        x = self.decoder_level3(self.patch_embed_decoder_level3(x)) + x
        x = self.reduce_chan_level2(torch.cat([self.up3_2(x), e2], 1))
        x = self.decoder_level2(self.patch_embed_decoder_level2(x)) + x
        x = torch.cat([self.up2_1(x), e1], 1)
        x = self.decoder_level1(self.patch_embed_decoder_level1(x)) + x
        x = self.refinement(self.patch_embed_refinement(x)) + x
        if self.dual_pixel_task:
            return self.output(x + self.skip_conv(embedded))
        return self.output(x) + image

    @classmethod
    def recognises(cls, state: Mapping[str, Any]) -> bool:
        """Whether `state` is a state dict of this network."""
        needed = {
            'patch_embed_encoder_level1.patch_embeds.0.patch_conv.dcn.weight',
            'encoder_level1.mhca_blk.MHCA_layers.0.attn.one_M',
            'refinement.aggregate.conv_du.0.weight',
            'output.0.weight',
        }
        return needed <= set(state)

    @classmethod
    def settings_from_state(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """The keyword arguments of a network, read from the shapes of its state dict.

        `offset_clamp` and `focusing_factor` leave no trace in the shapes.
        """
        stages = ('encoder_level1', 'encoder_level2', 'encoder_level3', 'latent')
        layers = [f'{stage}.mhca_blk.MHCA_layers' for stage in stages]
        norms = [state[f'{layer}.0.norm1.body.weight'] for layer in layers]
        return {
            'inp_channels': state['patch_embed.proj.weight'].shape[1],
            'dim': tuple(norm.shape[1] for norm in norms),
            'num_blocks': tuple(get_seq_len(state, layer) for layer in layers),
            'heads': tuple(state[f'{layer}.0.attn.temperature'].shape[1] for layer in layers),
            'bias': 'reduce_chan_level3.0.bias' in state,
            'dual_pixel_task': 'skip_conv.weight' in state,
            'num_path': tuple(norm.shape[0] for norm in norms),
        }
