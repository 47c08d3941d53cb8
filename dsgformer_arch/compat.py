"""What BasicSR 1.4.2 needs on today's PyTorch, one function a repair.

BasicSR is used unchanged from its release of 2022.  Each function below mends
one thing that has broken since, or that never worked on a machine without a
GPU, names the upstream report, and does nothing where upstream is sound.
`import dsgformer_arch` calls `apply()`; after that `import basicsr` works.

Nothing else in this package patches another library.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import random
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def missing_torchvision_operators() -> None:
    """Declare `torchvision::nms` and `qnms` where torchvision's library does not load.

    A CPU build of torch beside the ordinary (CUDA) torchvision wheel cannot
    load the wheel's compiled operators, and since torchvision 0.17 its import
    then stops with "operator torchvision::nms does not exist"
    (pytorch/vision#8871).  The declarations have no kernel: calling such an
    operator still fails, with torchvision's own explanation.
    """
    try:
        importlib.import_module('torchvision')
        return
    except RuntimeError as error:
        if 'torchvision::' not in str(error):
            raise
    library = torch.library.Library('torchvision', 'FRAGMENT')
    for name in ('nms', 'qnms'):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
    _keep_alive.append(library)
    for name in [name for name in sys.modules if name.split('.')[0] == 'torchvision']:
        del sys.modules[name]  # the failed import left halves behind
    importlib.import_module('torchvision')


_keep_alive: list[torch.library.Library] = []
"""A `Library` withdraws what it defined when it is collected."""


def removed_functional_tensor() -> None:
    """Give back `torchvision.transforms.functional_tensor`, removed in torchvision 0.17.

    BasicSR's `data/degradations.py` imports `rgb_to_grayscale` from it
    (XPixelGroup/BasicSR#711 and many more).
    """
    name = 'torchvision.transforms.functional_tensor'
    if name in sys.modules or importlib.util.find_spec(name) is not None:
        return
    functional = importlib.import_module('torchvision.transforms.functional')
    module = types.ModuleType(name, 'Stands in for the module that torchvision 0.17 removed.')
    module.rgb_to_grayscale = functional.rgb_to_grayscale  # type: ignore[attr-defined]
    sys.modules[name] = module


def apply() -> None:
    """Apply every repair; calling it again changes nothing."""
    missing_torchvision_operators()
    removed_functional_tensor()
