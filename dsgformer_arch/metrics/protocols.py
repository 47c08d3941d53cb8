"""The protocol of each data set: the metrics that its published tables report.

protocol('gopro').evaluate(to_uint8(output), sharp)
# {'psnr': …, 'ssim': …, 'ssim_skimage': …, 'ssim_basicsr': …}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from dsgformer_arch.metrics.metric import Image
from dsgformer_arch.metrics.mhnet import psnr_mhnet, ssim_mhnet
from dsgformer_arch.metrics.psnr_ssim import psnr_rgb, ssim_basicsr, ssim_matlab_rgb, ssim_skimage
from dsgformer_arch.metrics.rain import psnr_rain, ssim_rain
from dsgformer_arch.metrics.realblur import ecc_converged, psnr_realblur, ssim_realblur
from dsgformer_arch.metrics.rsblur import psnr_rsblur, ssim_rsblur
from dsgformer_arch.utils.errors import UserError

ROUNDING = (
    'clipped to [0, 1], times 255 in float32, rounded to the nearest integer (halves to even): '
    "8 bits, as by BasicSR's tensor2img and skimage's img_as_ubyte"
)


@dataclass(frozen=True)
class Protocol:
    """The metrics of the published tables of a data set.

    Attributes:
        name: the protocol's name, as options and command lines take it.
        source: the authors' evaluation code that it follows.
        columns: metrics by column of the report.  They take two uint8 BGR images, as BasicSR's do.
            `psnr` and `ssim` come first and are the published ones; the others are for comparison.
        rounding: how `to_uint8` converts an output, as text.
    """

    name: str
    source: str
    columns: Mapping[str, Callable[[Image, Image], float]]
    rounding: str = ROUNDING

    def evaluate(self, restored: Image, sharp: Image) -> dict[str, float]:
        """Score a restored image against the sharp one.

        Args:
            restored: uint8 RGB of shape (H, W, 3), as `to_uint8` returns it.
            sharp: the sharp image, likewise.

        Returns:
            The value of each column: PSNR in dB, SSIM at most 1.

        Raises:
            UserError: where the images are not uint8, not RGB or not of one size.
        """
        pair = [np.ascontiguousarray(image[..., ::-1]) for image in (restored, sharp)]
        return {column: measure(*pair) for column, measure in self.columns.items()}


_GOPRO_COLUMNS = {
    'psnr': psnr_rgb,
    'ssim': ssim_matlab_rgb,
    'ssim_skimage': ssim_skimage,
    'ssim_basicsr': ssim_basicsr,
}
_UNALIGNED = {'psnr_unaligned': psnr_rgb, 'ssim_unaligned': ssim_basicsr, 'ecc_converged': ecc_converged}

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            'gopro',
            "MATLAB's psnr and ssim on RGB: Deblurring/evaluate_GOPRO_HIDE.m of swz30/MPRNet, "
            'Motion_Deblurring/evaluate_gopro_hide.m of swz30/Restormer, '
            'evaluation_GoPro.m of pp00704831/Stripformer-ECCV-2022-',
            _GOPRO_COLUMNS,
        ),
        Protocol(
            'hide',
            "MATLAB's psnr and ssim on RGB: Deblurring/evaluate_GOPRO_HIDE.m of swz30/MPRNet, "
            'Motion_Deblurring/evaluate_gopro_hide.m of swz30/Restormer, '
            'evaluation_HIDE.m of pp00704831/Stripformer-ECCV-2022-',
            _GOPRO_COLUMNS,
        ),
        Protocol(
            'realblur',
            'ECC homography and intensity match: evaluation_RealBlur_ecc.py of rimchang/RealBlur, '
            'Motion_Deblurring/evaluate_realblur.py of swz30/Restormer',
            {'psnr': psnr_realblur, 'ssim': ssim_realblur, **_UNALIGNED},
        ),
        Protocol(
            'rsblur',
            'ECC homography and intensity match, then clipped: '
            'evaluation/evaluate_RSBlur.py of rimchang/RSBlur',
            {'psnr': psnr_rsblur, 'ssim': ssim_rsblur, **_UNALIGNED},
        ),
        Protocol(
            'rain',
            "8-bit Y of MATLAB's rgb2ycbcr: Deraining/evaluate_PSNR_SSIM.m of swz30/MPRNet and of "
            'swz30/Restormer, evaluate_PSNR_SSIM.m of cschenxiang/DRSformer (Rain200L, Rain200H, SPA-Data)',
            {'psnr': psnr_rain, 'ssim': ssim_rain},
        ),
        Protocol(
            'mhnet',
            'unrounded Y of the channels in BGR order, SSIM with replicated borders: Derain/cal.py and '
            "eval.py of Tombs98/MHNet; for MHNet's own tables, on rain and on GoPro and HIDE",
            {'psnr': psnr_mhnet, 'ssim': ssim_mhnet},
        ),
    )
}


def protocol(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        UserError: where there is none.
    """
    try:
        return PROTOCOLS[name]
    except KeyError:
        raise UserError(f'there is no protocol {name}; choose one of {", ".join(PROTOCOLS)}') from None


def to_uint8(output: torch.Tensor) -> Image:
    """A network's output as an 8-bit image, the way the authors' test scripts save theirs.

    Clipped to [0, 1], multiplied by 255 in float32 and rounded, halves to
    even.  Same as BasicSR's `tensor2img(output, rgb2bgr=False)`.

    Args:
        output: RGB of shape (3, H, W) or (1, 3, H, W), any floating type and device.

    Returns:
        uint8 RGB of shape (H, W, 3).

    Raises:
        ValueError: where the output has another shape or holds a NaN or an infinity.
    """
    image = output.detach()
    if image.ndim == 4 and image.shape[0] == 1:
        image = image[0]
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f'the output has shape {tuple(output.shape)}, not (3, H, W) or (1, 3, H, W)')
    wrong = image.numel() - int(image.isfinite().sum())
    if wrong:
        raise ValueError(f'{wrong} of the {image.numel()} values of the output are NaN or infinite')
    rounded = (image.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return rounded.permute(1, 2, 0).contiguous().cpu().numpy()
