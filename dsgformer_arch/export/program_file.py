"""`torch.export` programs (.pt2): PyTorch without this package, also for AOTInductor."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dsgformer_arch.export.image_to_image import INPUT, ImageToImage, Interface
from dsgformer_arch.export.onnx_file import dynamic_axes, example
from dsgformer_arch.export.verify import Run

METADATA = 'dsgformer.json'
"""Name of the file of metadata inside the package."""


def by_torch_export(module: ImageToImage, interface: Interface, path: str) -> None:
    """Write `path`."""
    with torch.no_grad():
        program = torch.export.export(
            module, (example(interface),), dynamic_shapes={INPUT: dynamic_axes(interface)}
        )
    metadata = {**interface.metadata(), 'exporter': 'torch.export'}
    torch.export.save(program, path, extra_files={METADATA: json.dumps(metadata)})


EXPORTERS: dict[str, Callable[[ImageToImage, Interface, str], None]] = {'torch.export': by_torch_export}
"""Exporters by name."""


def runtime(path: str) -> Run:
    """The program in PyTorch."""
    module: Any = torch.export.load(path).module()

    def run(image: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            restored: np.ndarray = module(torch.from_numpy(image)).numpy()
        return restored

    return run
