"""Metrics of pyiqa such as LPIPS and NIQE; it is installed by the extra `metrics`."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import numpy as np
import torch

from dsgformer_arch.metrics.metric import Image, metric
from dsgformer_arch.utils.errors import UserError


@functools.cache
def create(name: str) -> Any:
    """Create a metric of pyiqa, on the GPU if there is one.

    Raises:
        UserError: pyiqa is not installed, has no such metric, or cannot
            download the weights of the metric.
    """
    try:
        pyiqa = importlib.import_module('pyiqa')
    except ImportError as error:
        raise UserError(
            f'metric {name} needs pyiqa, which cannot be imported ({error}); '
            'install it with `pip install pyiqa` (the extra `metrics`)'
        ) from None
    if name not in pyiqa.list_models():
        raise UserError(f'pyiqa has no metric {name}; `pyiqa.list_models()` names those it has')
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        return pyiqa.create_metric(name, device=device)
    except OSError as error:
        raise UserError(
            f'pyiqa cannot get the weights of {name} ({error}); connect once to fetch them'
        ) from None


@metric
def pyiqa_metric(img: Image, img2: Image, name: str) -> float:
    """A metric of pyiqa with its default configuration, such as `lpips`, `dists` or `niqe`.

    Source: chaofengc/IQA-PyTorch.

    Args:
        img: the restored image, uint8 BGR of shape (H, W, 3).
        img2: the sharp image, likewise; no-reference metrics ignore it.
        name: the metric's name in pyiqa.

    Returns:
        The value of the metric; `lower_better(name)` is its direction.

    Raises:
        UserError: as `create` does.
    """
    scorer = create(name)
    images = [_rgb_tensor(image) for image in (img, img2)]
    with torch.inference_mode():
        score = scorer(images[0]) if scorer.metric_mode == 'NR' else scorer(*images)
    return float(score)


def lower_better(name: str) -> bool:
    """Whether smaller values of a metric of pyiqa are better.

    Raises:
        UserError: as `create` does.
    """
    return bool(create(name).lower_better)


def _rgb_tensor(bgr: Image) -> torch.Tensor:
    rgb = np.ascontiguousarray(bgr[..., ::-1].transpose(2, 0, 1))
    return torch.from_numpy(rgb)[None].float() / 255
