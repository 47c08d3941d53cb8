"""MPRNet: Multi-Stage Progressive Image Restoration.

Zamir S. W., Arora A., Khan S., Hayat M., Khan F. S., Yang M.-H., Shao L., CVPR 2021, arXiv 2102.02808.
Official implementation: swz30/MPRNet, academic public licence.

The network is that of spandrel_extra_arches 0.2.0 (MIT), unchanged: same keys and same results as the
official implementation.  Added here are the official widths for deblurring, what `RestorationNetwork`
declares, and the settings that a state dict tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from basicsr.utils.registry import ARCH_REGISTRY
from spandrel.util import get_seq_len
from spandrel_extra_arches.architectures.MPRNet import MPRNet as SpandrelMPRNet
from spandrel_extra_arches.architectures.MPRNet import MPRNetArch
from torch import Tensor

from dsgformer_arch.archs.layers.network import RestorationNetwork


@ARCH_REGISTRY.register()
class MPRNet(RestorationNetwork, SpandrelMPRNet):
    """MPRNet for deblurring: 20.13 M parameters.  Returns the images of stages 3, 2 and 1.

    Args:
        n_feat: channels at full resolution.
        scale_unetfeats: channels that each level of the encoders adds.
        scale_orsnetfeats: channels that the third stage adds.
        settings: `in_c`, `out_c`, `num_cab`, `kernel_size`, `reduction` and `bias`, as in the official
            implementation.  Its widths for deraining are 40, 20 and 16, spandrel's defaults.
    """

    spandrel_architecture = MPRNetArch()
    pad_multiple: int = 8
    min_size: int = 8
    final_output: int = 0
    channel_settings = ('in_c', 'out_c')
    width_settings = ('n_feat', 'scale_unetfeats', 'scale_orsnetfeats')
    depth_settings = ('num_cab',)

    def __init__(
        self, *, n_feat: int = 96, scale_unetfeats: int = 48, scale_orsnetfeats: int = 32, **settings: Any
    ) -> None:
        super().__init__(
            n_feat=n_feat, scale_unetfeats=scale_unetfeats, scale_orsnetfeats=scale_orsnetfeats, **settings
        )

    @classmethod
    def settings_from_state(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """The keyword arguments that rebuild the network of `state`."""
        n_feat, in_c, kernel_size = state['shallow_feat1.0.weight'].shape[:3]
        out_c, last = state['tail.weight'].shape[:2]
        return {
            'in_c': in_c,
            'out_c': out_c,
            'n_feat': n_feat,
            'scale_unetfeats': state['stage1_encoder.down12.down.1.weight'].shape[0] - n_feat,
            'scale_orsnetfeats': last - n_feat,
            # A sequence of channel attention blocks and the convolution that ends it.
            'num_cab': get_seq_len(state, 'stage3_orsnet.orb1.body') - 1,
            'kernel_size': kernel_size,
            'reduction': n_feat // state['shallow_feat1.1.CA.conv_du.0.weight'].shape[0],
            'bias': 'shallow_feat1.0.bias' in state,
        }
