"""Stripformer: Strip Transformer for Fast Image Deblurring.

Tsai F.-J., Peng Y.-T., Lin Y.-Y., Tsai C.-C., Lin C.-W., ECCV 2022, arXiv:2204.04627.
Official implementation: github.com/pp00704831/Stripformer-ECCV-2022- (models/Stripformer.py).  Its licence
is the MIT text restricted to non-commercial use; parts descend from DeblurGAN-v2 (BSD).

The network takes images in [-0.5, 0.5]: the official scripts subtract 0.5 from an image in [0, 1] and add
it to the result.  Callers of this class do the same; `input_offset` is the value.  As in the official
implementation, the last convolution also ends in a leaky ReLU, before the global residual is added.

With H×W the size of the image and the official widths:

    encoder    convolutions with residuals: H×W×64 (R1), H/2×W/2×128 (R2), then H/4×W/4×320
    Trans      12 strip blocks, intra and inter in turn, H/4×W/4×320
    decoder    up to H/2×W/2×192, joined with R2, 6 strip blocks; up to H×W×64, joined with R1; to RGB
    output     decoder + input

A strip block is attention, an MLP and a convolutional position embedding (PEG), each with a residual.
Its attention halves the channels: one half attends along horizontal strips, the other along vertical
ones.  Intra: the pixels of a strip attend to each other, each strip on its own.  Inter: a strip, all its
pixels and channels together, is one token, and the strips of an image attend to each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

from dsgformer_arch.archs.layers.network import RestorationNetwork
from dsgformer_arch.utils.errors import UserError

CHANNELS_PER_HEAD = 64
"""Block width over heads: 320 / 5 and 192 / 3; each of the two halves has as many heads of 32 channels."""


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Multi-head attention over tokens, softmax(QKᵀ/√d)V; all of shape (N, tokens, heads·d)."""
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class Mlp(nn.Module):
    """Two linear layers, four times as wide between them.  (…, C) to the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class PEG(nn.Module):
    """Conditional position embedding: a depthwise convolution with a residual.  (N, C, H, W) to the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.PEG = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.PEG(x) + x


class StripBlock(nn.Module):
    """What intra and inter blocks share.  (N, C, H, W) to the same.

    Args:
        channels: C, a multiple of 64; there is one head for each 64 channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = channels // CHANNELS_PER_HEAD
        self.attention_norm = nn.LayerNorm(channels)
        self.conv_input = nn.Conv2d(channels, channels, 1)
        self.fuse_out = nn.Conv2d(channels, channels, 1)
        self.ffn_norm = nn.LayerNorm(channels)
        self.ffn = Mlp(channels)
        self.PEG = PEG(channels)

    def attention(self, horizontal: Tensor, vertical: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of the two halves, each (N, C/2, H, W), along rows and along columns."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        normed = self.attention_norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        halves = self.attention(*self.conv_input(normed).chunk(2, dim=1))
        x = x + self.fuse_out(torch.cat(halves, dim=1))
        pixels = x.permute(0, 2, 3, 1)
        pixels = pixels + self.ffn(self.ffn_norm(pixels))
        return self.PEG(pixels.permute(0, 3, 1, 2))


class IntraStripBlock(StripBlock):
    """Pixels attend within their row (first half) or column (second half)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        half = channels // 2
        self.qkv_local_h = nn.Linear(half, 3 * half)
        self.qkv_local_v = nn.Linear(half, 3 * half)

    def attention(self, horizontal: Tensor, vertical: Tensor) -> tuple[Tensor, Tensor]:
        # A column is a row of the transposed image.
        columns = self.rows(vertical.transpose(-2, -1), self.qkv_local_v)
        return self.rows(horizontal, self.qkv_local_h), columns.transpose(-2, -1)

    def rows(self, x: Tensor, project: nn.Linear) -> Tensor:
        n, _, h, _ = x.shape
        query, key, value = project(x.permute(0, 2, 3, 1).flatten(0, 1)).chunk(3, dim=-1)
        return attend(query, key, value, self.heads).unflatten(0, (n, h)).permute(0, 3, 1, 2)


class InterStripBlock(StripBlock):
    """Whole rows (first half) and whole columns (second half) attend to each other."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        half = channels // 2
        self.conv_h = nn.Conv2d(half, 3 * half, 1)
        self.conv_v = nn.Conv2d(half, 3 * half, 1)

    def attention(self, horizontal: Tensor, vertical: Tensor) -> tuple[Tensor, Tensor]:
        columns = self.rows(vertical.transpose(-2, -1), self.conv_v)
        return self.rows(horizontal, self.conv_h), columns.transpose(-2, -1)

    def rows(self, x: Tensor, project: nn.Conv2d) -> Tensor:
        _, c, _, w = x.shape
        query, key, value = (part.transpose(1, 2).flatten(2) for part in project(x).chunk(3, dim=1))
        return attend(query, key, value, self.heads).unflatten(2, (c, w)).transpose(1, 2)


def add_blocks(module: nn.Module, prefix: str, channels: int, count: int) -> None:
    """Give `module` the blocks `prefix`1 … `prefix``count`: intra, inter, intra, …"""
    for i in range(1, count + 1):
        module.add_module(f'{prefix}{i}', (IntraStripBlock if i % 2 else InterStripBlock)(channels))


def run_blocks(module: nn.Module, prefix: str, count: int, x: Tensor) -> Tensor:
    for i in range(1, count + 1):
        x = getattr(module, f'{prefix}{i}')(x)
    return x


def activation() -> nn.LeakyReLU:
    return nn.LeakyReLU(0.2, inplace=True)


def residual_branch(channels_in: int, channels: int, first_kernel: int = 3) -> nn.Sequential:
    """The convolutions of a residual unit, `activation(branch(x) + x)`."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, first_kernel, padding=first_kernel // 2),
        activation(),
        nn.Conv2d(channels, channels, 3, padding=1),
    )


class Encoder(nn.Module):
    """(N, 3, H, W) to features at a quarter, at full (R1) and at half (R2) resolution."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        c1, c2, c3 = channels
        self.activation = activation()
        self.en_layer1_1 = nn.Sequential(nn.Conv2d(3, c1, 3, padding=1), activation())
        self.en_layer1_2 = residual_branch(c1, c1)
        self.en_layer1_3 = residual_branch(c1, c1)
        self.en_layer1_4 = residual_branch(c1, c1)
        self.en_layer2_1 = nn.Sequential(nn.Conv2d(c1, c2, 3, stride=2, padding=1), activation())
        self.en_layer2_2 = residual_branch(c2, c2)
        self.en_layer2_3 = residual_branch(c2, c2)
        self.en_layer2_4 = residual_branch(c2, c2)
        self.en_layer3_1 = nn.Sequential(nn.Conv2d(c2, c3, 3, stride=2, padding=1), activation())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        R1 = self.en_layer1_1(x)
        for branch in (self.en_layer1_2, self.en_layer1_3, self.en_layer1_4):
            R1 = self.activation(branch(R1) + R1)
        R2 = self.en_layer2_1(R1)
        for branch in (self.en_layer2_2, self.en_layer2_3, self.en_layer2_4):
            R2 = self.activation(branch(R2) + R2)
        return self.en_layer3_1(R2), R1, R2


class Decoder(nn.Module):
    """Features at a quarter, R1 and R2 to the residual image, (N, 3, H, W)."""

    def __init__(self, channels: Sequence[int], width: int, num_blocks: int) -> None:
        super().__init__()
        c1, c2, c3 = channels
        self.num_blocks = num_blocks
        self.activation = activation()
        self.de_layer3_1 = nn.Sequential(nn.ConvTranspose2d(c3, width, 4, stride=2, padding=1), activation())
        self.de_layer2_2 = nn.Sequential(nn.Conv2d(width + c2, width, 1), activation())
        add_blocks(self, 'de_block_', width, num_blocks)
        self.de_layer2_1 = nn.Sequential(nn.ConvTranspose2d(width, c1, 4, stride=2, padding=1), activation())
        self.de_layer1_3 = residual_branch(2 * c1, c1, first_kernel=1)
        self.de_layer1_2 = residual_branch(c1, c1)
        self.de_layer1_1 = nn.Sequential(nn.Conv2d(c1, 3, 3, padding=1), activation())

    def forward(self, x: Tensor, R1: Tensor, R2: Tensor) -> Tensor:
        x = self.de_layer2_2(torch.cat((self.de_layer3_1(x), R2), dim=1))
        x = self.de_layer2_1(run_blocks(self, 'de_block_', self.num_blocks, x))
        x = self.activation(self.de_layer1_3(torch.cat((x, R1), dim=1)) + x)
        x = self.activation(self.de_layer1_2(x) + x)
        return self.de_layer1_1(x)


@ARCH_REGISTRY.register()
class Stripformer(RestorationNetwork):
    """The network.  (N, 3, H, W), around zero, to the same.

    The official implementation takes no settings; it has the defaults.

    Args:
        channels: width of the encoder at full, half and quarter resolution; the last is a multiple of 64.
        decoder_channels: width of the decoder's strip blocks; a multiple of 64.
        num_blocks: strip blocks at a quarter of the resolution and in the decoder.

    Raises:
        UserError: for a width of strip blocks that is not a multiple of 64.
    """

    pad_multiple = 8
    """The network needs 4; the official test scripts for HIDE and RealBlur pad to 8."""
    min_size = 8
    input_offset = 0.5
    sees_whole_image = True
    width_settings = ('channels', 'decoder_channels')
    depth_settings = ('num_blocks',)

    def __init__(
        self,
        channels: Sequence[int] = (64, 128, 320),
        decoder_channels: int = 192,
        num_blocks: Sequence[int] = (12, 6),
    ) -> None:
        super().__init__()
        for width in (channels[-1], decoder_channels):
            if width % CHANNELS_PER_HEAD:
                raise UserError(
                    f'Stripformer: strip blocks of {width} channels are impossible; '
                    f'choose a multiple of {CHANNELS_PER_HEAD}'
                )
        self.num_blocks, decoder_blocks = num_blocks
        self.encoder = Encoder(channels)
        add_blocks(self, 'Trans_block_', channels[-1], self.num_blocks)
        self.decoder = Decoder(channels, decoder_channels, decoder_blocks)

    def forward_padded(self, x: Tensor) -> Tensor:
        features, R1, R2 = self.encoder(x)
        features = run_blocks(self, 'Trans_block_', self.num_blocks, features)
        return self.decoder(features, R1, R2) + x

    @classmethod
    def recognises(cls, state: Mapping[str, Any]) -> bool:
        """Whether `state` is a state dict of this network."""
        characteristic = {
            'encoder.en_layer1_1.0.weight',
            'encoder.en_layer3_1.0.weight',
            'Trans_block_1.qkv_local_h.weight',
            'decoder.de_layer1_1.0.weight',
        }
        return characteristic <= set(state)

    @classmethod
    def settings_from_state(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """The keyword arguments of a network, read from the shapes of its state dict."""
        return {
            'channels': tuple(state[f'encoder.en_layer{i}_1.0.weight'].shape[0] for i in (1, 2, 3)),
            'decoder_channels': state['decoder.de_layer2_2.0.weight'].shape[0],
            'num_blocks': (_count_blocks(state, 'Trans_block_'), _count_blocks(state, 'decoder.de_block_')),
        }


def _count_blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    return max((int(key[len(prefix) :].split('.')[0]) for key in state if key.startswith(prefix)), default=0)
