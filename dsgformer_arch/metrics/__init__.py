"""What is measured: each protocol of the field as its authors compute it, registered in METRIC_REGISTRY.

`protocols` says which metrics make up the protocol of a data set.
"""

from dsgformer_arch.metrics import mhnet, perceptual, psnr_ssim, rain, realblur, rsblur
from dsgformer_arch.metrics.protocols import PROTOCOLS, Protocol, protocol, to_uint8

__all__ = [
    'PROTOCOLS',
    'Protocol',
    'mhnet',
    'perceptual',
    'protocol',
    'psnr_ssim',
    'rain',
    'realblur',
    'rsblur',
    'to_uint8',
]
