"""Metrics of the published tables, computed as by their authors, and registered in METRIC_REGISTRY.

`protocols` maps each data set to the metrics of its published tables.
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
