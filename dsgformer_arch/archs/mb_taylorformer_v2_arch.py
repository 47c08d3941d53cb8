from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

from dsgformer_arch.ops.deform_conv import deform_conv2d

_WINDOWS = {1: {3: 1}, 2: {3: 2}, 4: {3: 2, 5: 2}, 8: {3: 2, 5: 3, 7: 3}}
FFN=2.66

class PathNorm(nn.Module):
    def __init__(self, dim: int, paths: int):
        super().__init__()
        self.body = nn.ParameterDict({'weight': nn.Parameter(torch.ones(paths, dim))})

    def forward(self, x: Tensor) -> Tensor:
        weight = self.body['weight']
        x = x.unflatten(1, weight.shape)
        if x.dtype == torch.float64:
            variance = x.var(2, keepdim=True, unbiased=False)
        else:
            variance = (x - x.mean(2, keepdim=True)).square().mean(2, keepdim=True)
        return (x / torch.sqrt(variance + 1e-5) * weight[..., None, None]).flatten(1, 2)


class FeedForward(nn.Module):
    def __init__(self, dim: int, paths: int):
        super().__init__()
        hidden = int(dim * FFN) * paths
        dim = dim * paths
        self.project_in_1 = nn.Conv2d(dim, hidden, 1, groups=paths, bias=False)
        self.project_in_2 = nn.Conv2d(dim, hidden, 1, groups=paths, bias=False)
        self.dwconv_1 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
        self.dwconv_2 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
        self.project_out = nn.Conv2d(hidden, dim, 1, groups=paths, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.project_out(F.gelu(self.dwconv_1(self.project_in_1(x))) * self.dwconv_2(self.project_in_2(x)))


class RefineAttention(nn.Module):
    def __init__(self, head_dim: int, heads: int, paths: int):
        super().__init__()
        self.splits = list(_WINDOWS[heads].values())
        self.paths = paths
        self.conv_list = nn.ModuleList(
            nn.Conv2d(n * paths * head_dim, n * paths, w, padding=w // 2, groups=n * paths)
            for w, n in _WINDOWS[heads].items()
        )

    def forward(self, v: Tensor) -> Tensor:
        """(B, P, heads, c, H, W) -> (B, P, heads, 1, H, W)"""
        maps = [
            conv(part.flatten(1, 3)).unflatten(1, (self.paths, -1))
            for conv, part in zip(self.conv_list, v.split(self.splits, dim=2), strict=True)
        ]
        return torch.cat(maps, dim=2).unsqueeze(3)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, paths: int, focusing_factor: int):
        super().__init__()
        self.heads, self.paths, self.focusing_factor = heads, paths, focusing_factor
        width = dim * paths
        self.temperature = nn.Parameter(torch.ones(paths, heads, 1, 1))
        self.qkv = nn.Conv2d(width, 3 * width, 1, groups=paths, bias=False)
        self.qkv_dwconv = nn.Conv2d(3 * width, 3 * width, 3, padding=1, groups=3 * width, bias=False)
        self.project_out = nn.Conv2d(width, width, 1, groups=paths, bias=False)
        self.refine_att = RefineAttention(dim // heads, heads, paths)
        self.scale = nn.Parameter(torch.ones(paths, heads, 1, 1))
        self.one_M = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        qkv = self.qkv_dwconv(self.qkv(x)).unflatten(1, (self.paths, 3, self.heads, -1))
        v = qkv[:, :, 2]
        local = torch.sigmoid(self.refine_att(v))
        qk = qkv[:, :, :2].flatten(-2)
        v = v.flatten(-2)
        unit = qk / (torch.linalg.vector_norm(qk, dim=-2, keepdim=True) + 1e-8)
        focus = torch.relu(qk) ** self.focusing_factor
        focus = focus / (torch.linalg.vector_norm(focus, dim=-2, keepdim=True) + 1e-8)
        q1, k1 = unit.unbind(2)
        q2, k2 = focus.unbind(2)
        scale = torch.sigmoid(self.scale)
        num = v.sum(-1, keepdim=True) + (k1 @ v.mT).mT @ q1 + scale * ((k2 @ v.mT).mT @ q2)
        den = h * w * self.one_M + k1.sum(-1).unsqueeze(-2) @ q1 + (scale * k2).sum(-1).unsqueeze(-2) @ q2 + 1e-8
        out = num / den * self.temperature
        out = out.unflatten(-1, (h, w)) + local
        return self.project_out(out.flatten(1, 3))


class Block(nn.Module):
    def __init__(self, dim, heads, paths, focusing_factor):
        super().__init__()
        self.norm1 = PathNorm(dim, paths)
        self.attn = Attention(dim, heads, paths, focusing_factor)
        self.norm2 = PathNorm(dim, paths)
        self.ffn = FeedForward(dim, paths)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class SKFF(nn.Module):
    def __init__(self, dim, paths):
        super().__init__()
        hidden = max(dim // 8, 4)
        self.conv_du = nn.Sequential(nn.Conv2d(dim, hidden, 1, bias=False), nn.PReLU())
        self.fcs = nn.ModuleList(nn.Conv2d(hidden, dim, 1, bias=False) for _ in range(paths))

    def forward(self, x):
        x = x.unflatten(1, (len(self.fcs), -1))
        z = self.conv_du(x.sum(1).mean((2, 3), keepdim=True))
        v = torch.stack([fc(z) for fc in self.fcs], 1).softmax(1)
        return (x * v).sum(1)


class DCN(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, 1, 3, 3))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x, offset):
        return deform_conv2d(x, offset, self.weight, padding=1)


class PatchEmbed(nn.Module):
    def __init__(self, dim, clamp):
        super().__init__()
        self.clamp = clamp
        self.offset_generator = nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False), nn.Conv2d(dim, 18, 1, bias=False))
        self.dcn = DCN(dim)
        self.pwconv = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x):
        o = self.offset_generator(x)
        if self.clamp:
            o = o.clamp(*self.clamp)
        return F.hardswish(self.pwconv(self.dcn(x, o)))


class Stage(nn.Module):
    def __init__(self, dim, n, heads, paths, ff):
        super().__init__()
        self.mhca_blk = nn.ModuleDict({'MHCA_layers': nn.Sequential(*(Block(dim, heads, paths, ff) for _ in range(n)))})
        self.aggregate = SKFF(dim, paths)

    def forward(self, xs):
        return self.aggregate(self.mhca_blk['MHCA_layers'](torch.cat(xs, 1)))


class PES(nn.Module):
    def __init__(self, dim, paths, clamp):
        super().__init__()
        self.patch_embeds = nn.ModuleList(nn.ModuleDict({'patch_conv': PatchEmbed(dim, clamp)}) for _ in range(paths))

    def forward(self, x):
        out = []
        for e in self.patch_embeds:
            x = e['patch_conv'](x)
            out.append(x)
        return out


class Down(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(i, i, 3, padding=1, groups=i, bias=False), nn.Conv2d(i, o // 4, 1, bias=False), nn.PixelUnshuffle(2))

    def forward(self, x):
        return self.body(x)


class Up(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(i, i, 3, padding=1, groups=i, bias=False), nn.Conv2d(i, o * 4, 1, bias=False), nn.PixelShuffle(2))

    def forward(self, x):
        return self.body(x)


@ARCH_REGISTRY.register()
class MBTaylorFormerV2(nn.Module):
    def __init__(self, inp_channels=3, dim=(24, 48, 72, 96), num_blocks=(2, 3, 3, 4), heads=(1, 2, 4, 8), bias=False, dual_pixel_task=False, num_path=(2, 2, 2, 2), offset_clamp=(-1, 1), focusing_factor=8):
        super().__init__()
        P = lambda d, i: PES(d, num_path[i], offset_clamp)
        S = lambda d, i: Stage(d, num_blocks[i], heads[i], num_path[i], focusing_factor)
        self.patch_embed = nn.ModuleDict({'proj': nn.Conv2d(inp_channels, dim[0], 3, padding=1, bias=False)})
        self.patch_embed_encoder_level1 = P(dim[0], 0)
        self.encoder_level1 = S(dim[0], 0)
        self.down1_2 = Down(dim[0], dim[1])
        self.patch_embed_encoder_level2 = P(dim[1], 1)
        self.encoder_level2 = S(dim[1], 1)
        self.down2_3 = Down(dim[1], dim[2])
        self.patch_embed_encoder_level3 = P(dim[2], 2)
        self.encoder_level3 = S(dim[2], 2)
        self.down3_4 = Down(dim[2], dim[3])
        self.patch_embed_latent = P(dim[3], 3)
        self.latent = S(dim[3], 3)
        self.up4_3 = Up(dim[3], dim[2])
        self.reduce_chan_level3 = nn.Sequential(nn.Conv2d(dim[2] * 2, dim[2], 1, bias=bias))
        self.patch_embed_decoder_level3 = P(dim[2], 2)
        self.decoder_level3 = S(dim[2], 2)
        self.up3_2 = Up(dim[2], dim[1])
        self.reduce_chan_level2 = nn.Sequential(nn.Conv2d(dim[1] * 2, dim[1], 1, bias=bias))
        self.patch_embed_decoder_level2 = P(dim[1], 1)
        self.decoder_level2 = S(dim[1], 1)
        self.up2_1 = Up(dim[1], dim[0])
        self.patch_embed_decoder_level1 = P(dim[1], 0)
        self.decoder_level1 = S(dim[1], 0)
        self.patch_embed_refinement = P(dim[1], 0)
        self.refinement = S(dim[1], 0)
        if dual_pixel_task:
            self.skip_conv = nn.Conv2d(dim[0], dim[1], 1, bias=bias)
        self.output = nn.Sequential(nn.Conv2d(dim[1], 3, 3, padding=1, bias=False))
        self.dual_pixel_task = dual_pixel_task

    def forward(self, img):
        x1 = self.patch_embed['proj'](img)
        e1 = self.encoder_level1(self.patch_embed_encoder_level1(x1))
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
            return self.output(x + self.skip_conv(x1))
        return self.output(x) + img
