"""NAFNet: Simple Baselines for Image Restoration.

Chen L., Chu X., Zhang X., Sun J., ECCV 2022, arXiv 2204.04676.
Official implementation: megvii-research/NAFNet, MIT.

The network is that of spandrel 0.4.2 (MIT): same keys and same results as the official implementation.
Added here are the official settings for GoPro, what `RestorationNetwork` declares, the settings that a
state dict tells, PyTorch's own layer norm where no gradient is wanted, and blocks in strips of rows on a CPU.

In training its LayerNorm is an autograd function with a hand-written backward pass that `torch.compile`
cannot trace: the network compiles as a whole for inference, and with a graph break at each norm for training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from spandrel.architectures.NAFNet import NAFNet as SpandrelNAFNet
from spandrel.architectures.NAFNet import NAFNetArch
from spandrel.architectures.NAFNet.__arch.arch_util import LayerNorm2d as SpandrelLayerNorm2d
from spandrel.architectures.NAFNet.__arch.NAFNet_arch import NAFBlock as SpandrelNAFBlock
from spandrel.util import get_seq_len
from torch import Tensor

from dsgformer_arch.archs.layers import strips
from dsgformer_arch.archs.layers.network import Outputs, RestorationNetwork
from dsgformer_arch.archs.layers.norms import norm_of_channels
from dsgformer_arch.archs.layers.strips import pointwise


class LayerNorm2d(SpandrelLayerNorm2d):
    """LN over the channels, (N, C, H, W) to the same; without gradients by one kernel instead of nine.

    The result is channels-last then, and the convolutions after it keep that order.  Exporters see one
    operator, and no Python function, which TorchScript cannot save.
    """

    def __init__(self, original: SpandrelLayerNorm2d) -> None:
        channels = original.weight.shape[0]
        super().__init__(channels, original.eps)
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return cast(Tensor, super().forward(x))
        return norm_of_channels(x, self.channels, self.weight, self.bias, self.eps)


class NAFBlock(SpandrelNAFBlock):
    """NAFNet's block.  Existing blocks are given this class.  (N, C, H, W) to the same."""

    def forward(self, inp: Tensor) -> Tensor:
        if not strips.suit(inp):
            return cast(Tensor, super().forward(inp))
        return forward_in_strips(self, inp)


def forward_in_strips(block: Any, x: Tensor) -> Tensor:
    """A block of NAFNet's structure, of which only the channel attention needs the whole image.

    Args:
        block: with the submodules of NAFNet's block.
        x: (N, C, H, W), see `strips.suit`.
    """

    def gated(x: Tensor) -> Tensor:
        return cast(Tensor, block.sg(block.conv2(pointwise(block.conv1, block.norm1(x)))))

    def rest(x: Tensor, gate: Tensor, attention: Tensor) -> Tensor:
        y = scaled_sum(x, block.dropout1(pointwise(block.conv3, gate * attention)), block.beta)
        gated = block.sg(pointwise(block.conv4, block.norm2(y)))
        return scaled_sum(y, block.dropout2(pointwise(block.conv5, gated)), block.gamma)

    gate = strips.in_strips(gated, [x], block.conv2.out_channels, halo=1)
    attention = block.sca(gate).expand_as(gate)
    return strips.in_strips(rest, [x, gate, attention], block.conv4.out_channels)


def scaled_sum(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """x + scale · y, in one pass where the types are the same."""
    return torch.addcmul(x, y, scale) if x.dtype == y.dtype == scale.dtype else x + y * scale


@ARCH_REGISTRY.register()
class NAFNet(RestorationNetwork, SpandrelNAFNet):
    """NAFNet for GoPro: 17.11 M parameters at width 32, 67.89 M at 64.

    Args:
        img_channel: channels of the image.
        width: channels at full resolution.
        middle_blk_num: blocks between encoder and decoder.
        enc_blk_nums: blocks of each level of the encoder.
        dec_blk_nums: blocks of each level of the decoder, from the lowest up; as many levels.
    """

    spandrel_architecture = NAFNetArch()
    pad_multiple: int = 16
    min_size: int = 16
    channel_settings = ('img_channel',)
    width_settings = ('width',)
    depth_settings = ('enc_blk_nums', 'middle_blk_num', 'dec_blk_nums')

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
        self.pad_multiple = self.min_size = 2 ** len(enc_blk_nums)
        for block in list(self.modules()):
            if isinstance(block, SpandrelNAFBlock):
                block.__class__ = NAFBlock
            for name, child in list(block.named_children()):
                if isinstance(child, SpandrelLayerNorm2d):
                    setattr(block, name, LayerNorm2d(child))

    def forward_padded(self, x: Tensor) -> Outputs:
        return super().forward_padded(strips.channels_last(x))

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
