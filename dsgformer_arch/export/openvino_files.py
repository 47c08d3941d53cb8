"""OpenVINO's intermediate representation: a graph (.xml) and its weights (.bin), converted from ONNX."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from dsgformer_arch.export import onnx_file
from dsgformer_arch.export.image_to_image import ImageToImage, Interface
from dsgformer_arch.export.verify import Run

Exporter = Callable[[ImageToImage, Interface, str], None]

METADATA = 'dsgformer'
"""Section of the graph's runtime information that holds the metadata."""


def through_onnx(exporter: Exporter, module: ImageToImage, interface: Interface, path: str) -> None:
    """Write `path` (.xml) and the file of weights (.bin) next to it."""
    import openvino

    graph = f'{path}.onnx'
    try:
        exporter(module, replace(interface, precision='fp32'), graph)
        model = openvino.convert_model(graph)
    finally:
        if os.path.exists(graph):
            os.remove(graph)
    for key, value in interface.metadata().items():
        model.set_rt_info(value, [METADATA, key])
    openvino.save_model(model, path, compress_to_fp16=interface.precision == 'fp16')


EXPORTERS: dict[str, Exporter] = {
    name: partial(through_onnx, exporter) for name, exporter in onnx_file.EXPORTERS.items()
}
"""Exporters by name, in the order in which they are tried."""


def runtime(path: str) -> Run:
    """The file in OpenVINO on the CPU, in float32; the default is bfloat16 where the CPU has it."""
    import openvino

    compiled = openvino.Core().compile_model(path, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})

    def run(image: np.ndarray) -> np.ndarray:
        return np.array(compiled(image)[0])

    return run
