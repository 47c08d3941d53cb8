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


class BranchConv(nn.Conv2d):
    def __init__(self, branches, i, o, k=1, depthwise=False, bias=False):
        super().__init__(i*branches, o*branches, k, padding=k // 2, groups=branches * (o if depthwise else 1), bias=bias)
        self.branches = branches

    def forward(self, xs):
        bias = [None] * self.branches if self.bias is None else self.bias.chunk(self.branches)
        return [F.conv2d(x, w, b, padding=self.padding, groups=self.groups // self.branches) for x, w, b in zip(xs, self.weight.chunk(self.branches), bias, strict=True)]


class PathNorm(nn.Module):
    def __init__(self, dim: int, paths: int):
        super().__init__()
        self.body = nn.ParameterDict({'weight': nn.Parameter(torch.ones(paths, dim))})

    def forward(self, xs):
        return [self.norm(x, w.view(-1, 1, 1)) for x, w in zip(xs, self.body['weight'].unbind(), strict=True)]

    def norm(self, x, w):
        if x.dtype == torch.float64:
            variance = x.var(1, keepdim=True, unbiased=False)
        else:
            variance = (x - x.mean(1, keepdim=True)).square().mean(1, keepdim=True)
        return x / torch.sqrt(variance + 1e-5) * w


class FeedForward(nn.Module):
    def __init__(self, dim: int, paths: int):
        super().__init__()
        hidden = int(dim * FFN)
        self.project_in_1 = BranchConv(paths, dim, hidden)
        self.project_in_2 = BranchConv(paths, dim, hidden)
        self.dwconv_1 = BranchConv(paths, hidden, hidden, 3, True)
        self.dwconv_2 = BranchConv(paths, hidden, hidden, 3, True)
        self.project_out = BranchConv(paths, hidden, dim)

    def forward(self, xs):
        a = self.dwconv_1(self.project_in_1(xs))
        b = self.dwconv_2(self.project_in_2(xs))
        return self.project_out([F.gelu(x) * y for x, y in zip(a, b)])


class RefineAttention(nn.Module):
    def __init__(self, head_dim: int, heads: int, paths: int):
        super().__init__()
        self.splits = [n * head_dim for n in _WINDOWS[heads].values()]
        self.paths = paths
        self.conv_list = nn.ModuleList(
            nn.Conv2d(n * paths * head_dim, n * paths, w, padding=w // 2, groups=n * paths)
            for w, n in _WINDOWS[heads].items()
        )

    def forward(self, vs):
        """(B, heads * c, H, W) -> (B, heads, H, W)"""
        out = []
        for i, v in enumerate(vs):
            maps = [
                F.conv2d(part, conv.weight.chunk(self.paths)[i], conv.bias.chunk(self.paths)[i], padding=conv.padding, groups=conv.groups // self.paths)
                for conv, part in zip(self.conv_list, v.split(self.splits, dim=1), strict=True)
            ]
            out.append(torch.cat(maps, dim=1))
        return out


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, paths: int, focusing_factor: int):
        super().__init__()
        self.heads, self.paths, self.focusing_factor = heads, paths, focusing_factor
        self.temperature = nn.Parameter(torch.ones(paths, heads, 1, 1))
        self.qkv = BranchConv(paths, dim, 3*dim)
        self.qkv_dwconv = BranchConv(paths, 3*dim, 3*dim, 3, True)
        self.project_out = BranchConv(paths, dim, dim)
        self.refine_att = RefineAttention(dim // heads, heads, paths)
        self.scale = nn.Parameter(torch.ones(paths, heads, 1, 1))
        self.one_M = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, xs):
        qkvs = self.qkv_dwconv(self.qkv(xs))
        local = torch.cat(self.refine_att([qkv.chunk(3, 1)[2] for qkv in qkvs]))
        mixed = self.core(*torch.cat(qkvs).chunk(3, 1), local, len(xs[0]))
        return self.project_out(mixed.chunk(self.paths))

    def core(self, q, k, v, local, b):
        shape = q.shape
        q, k, v = (t.unflatten(1, (self.heads, -1)).flatten(-2) for t in (q, k, v))
        q1, k1 = _unit(q), _unit(k)
        q2, k2 = _unit(torch.relu(q) ** self.focusing_factor), _unit(torch.relu(k) ** self.focusing_factor)
        scale = torch.sigmoid(self.scale).repeat_interleave(b, 0)
        num = v.sum(-1, keepdim=True) + (k1 @ v.mT).mT @ q1 + scale * ((k2 @ v.mT).mT @ q2)
        den = q.shape[-1] * self.one_M + k1.sum(-1).unsqueeze(-2) @ q1 + (scale * k2).sum(-1).unsqueeze(-2) @ q2 + 1e-8
        out = num / den * self.temperature.repeat_interleave(b, 0) + torch.sigmoid(local).flatten(-2).unsqueeze(-2)
        return out.unflatten(-1, shape[-2:]).flatten(1, 2)


def _unit(x):
    return x / (torch.linalg.vector_norm(x, dim=-2, keepdim=True) + 1e-8)


class Block(nn.Module):
    def __init__(self, dim, heads, paths, focusing_factor):
        super().__init__()
        self.norm1 = PathNorm(dim, paths)
        self.attn = Attention(dim, heads, paths, focusing_factor)
        self.norm2 = PathNorm(dim, paths)
        self.ffn = FeedForward(dim, paths)

    def forward(self, xs):
        xs = [x + y for x, y in zip(xs, self.attn(self.norm1(xs)))]
        return [x + y for x, y in zip(xs, self.ffn(self.norm2(xs)))]


class SKFF(nn.Module):
    def __init__(self, dim, paths):
        super().__init__()
        hidden = max(dim // 8, 4)
        self.conv_du = nn.Sequential(nn.Conv2d(dim, hidden, 1, bias=False), nn.PReLU())
        self.fcs = nn.ModuleList(nn.Conv2d(hidden, dim, 1, bias=False) for _ in range(paths))

    def forward(self, xs):
        z = self.conv_du(sum(xs).mean((2, 3), keepdim=True))
        v = torch.stack([fc(z) for fc in self.fcs], 1).softmax(1)
        return sum(x * a for x, a in zip(xs, v.unbind(1)))


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
        return self.aggregate(self.mhca_blk['MHCA_layers'](xs))


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
        if img.dtype != torch.float64: img = img.contiguous(memory_format=torch.channels_last)
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
