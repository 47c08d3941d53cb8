"""The base of all metrics: the image type, checks of the arguments, and registration in METRIC_REGISTRY."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from basicsr.utils.registry import METRIC_REGISTRY
from numpy.typing import NDArray

from dsgformer_arch.utils.errors import UserError

Image: TypeAlias = NDArray[np.uint8]
"""An 8-bit colour image, shape (H, W, 3), values 0 to 255."""

SIDE_MIN = 11
"""Side of the smallest image in pixels: that of the SSIM window."""


def check_pair(img: Image, img2: Image) -> None:
    """Check that two images are 8-bit RGB images of one size.

    Raises:
        UserError: where the sizes differ, a side is shorter than 11 pixels, or
            an image is not uint8 with three channels.
    """
    for which, image in (('restored', img), ('sharp', img2)):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise UserError(
                f'the {which} image has type {image.dtype} and shape {image.shape}; '
                'a metric needs uint8 values of shape (H, W, 3), see `to_uint8`'
            )
    if img.shape != img2.shape:
        raise UserError(
            f'the restored image has {img.shape[1]}×{img.shape[0]} pixels and its sharp partner '
            f'{img2.shape[1]}×{img2.shape[0]}; pair images of one size'
        )
    if min(img.shape[:2]) < SIDE_MIN:
        raise UserError(
            f'the images have {img.shape[1]}×{img.shape[0]} pixels, less than the 11×11 window of SSIM; '
            'measure larger ones'
        )


def metric(function: Callable[..., float]) -> Callable[..., float]:
    """Decorator that registers a metric under its name and checks its arguments.

    `function(img, img2, **options)` takes two 8-bit BGR images as passed by
    BasicSR's `calculate_metric`.  The option `better`, which BasicSR reads
    itself, is ignored.  Any other option that the metric does not have, such
    as `crop_border` of BasicSR's own metrics, is an error: ignoring it would
    misreport the result.

    Raises:
        UserError: when called with a pair that `check_pair` refuses or with an
            option that the metric does not have.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(img: Image, img2: Image, **options: Any) -> float:
        options.pop('better', None)
        try:
            signature.bind(img, img2, **options)
        except TypeError as error:
            raise UserError(f'metric {function.__name__}: {error}; fix its entry in the options') from None
        check_pair(img, img2)
        return float(function(img, img2, **options))

    METRIC_REGISTRY.register(checked)
    return checked
