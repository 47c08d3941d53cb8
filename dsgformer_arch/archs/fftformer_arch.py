"""FFTformer: Efficient Frequency Domain-based Transformers for High-Quality Image Deblurring.

Kong L., Dong J., Ge J., Li M., Pan J., CVPR 2023, arXiv 2211.12250.
Official implementation: kkkls/FFTformer, MIT.

The network is that of spandrel 0.4.2 (MIT), unchanged: same keys and same results as the official
implementation.  Added here are what `RestorationNetwork` declares and the settings that a state dict tells.

It computes its Fourier transforms in float32 whatever the type of its parameters, float64 included, and
never uses `reduce_chan_level2`, whose parameters get no gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from basicsr.utils.registry import ARCH_REGISTRY
from spandrel.architectures.FFTformer import FFTformer as SpandrelFFTformer
from spandrel.architectures.FFTformer import FFTformerArch
from spandrel.util import get_seq_len
from torch import Tensor

from dsgformer_arch.archs.layers.network import RestorationNetwork
from dsgformer_arch.archs.layers.settings import expansion_factor_from_state


@ARCH_REGISTRY.register()
class FFTformer(RestorationNetwork, SpandrelFFTformer):
    """FFTformer: 16.56 M parameters.

    Keyword arguments: `inp_channels`, `out_channels`, `dim`, `num_blocks` (levels 1–3),
    `num_refinement_blocks`, `ffn_expansion_factor`, `bias`; the official defaults.
    """

    spandrel_architecture = FFTformerArch()
    # Blocks of 8×8 pixels at a quarter of the size.
    pad_multiple: int = 32
    min_size: int = 32
    channel_settings = ('inp_channels', 'out_channels')
    width_settings = ('dim',)
    depth_settings = ('num_blocks', 'num_refinement_blocks')

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
            'ffn_expansion_factor': expansion_factor_from_state(state, levels),
            'bias': 'output.bias' in state,
        }
