"""ONNX: graphs of standard operators, for onnxruntime and everything that reads its files."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsgformer_arch.export.image_to_image import INPUT, OUTPUT, ImageToImage, Interface
from dsgformer_arch.export.verify import Run

TRACING_OPSET = 17
"""Version of ONNX's operators that the TorchScript exporter writes: the first with LayerNormalization."""

FLOAT16_OPERATORS = ('Conv', 'ConvTranspose')
"""Operators in float16 in a float16 graph.  The others stay in float32, as it takes little time: sums over an
image's pixels leave float16's range, DTSAS selects other scores where it compares rounded ones, and the sums
of the residual stream would add a rounding for each block.
"""

AXES = {0: 'batch', 2: 'height', 3: 'width'}


def by_torch_export(module: ImageToImage, interface: Interface, path: str) -> None:
    """Write `path` with the exporter that builds on `torch.export`."""
    with _quiet(), torch.no_grad():
        torch.onnx.export(
            module,
            (example(interface),),
            path,
            dynamo=True,
            external_data=False,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes={INPUT: dynamic_axes(interface)},
            verbose=False,
        )
    finish(path, interface, 'torch.export')


def by_tracing(module: ImageToImage, interface: Interface, path: str) -> None:
    """Write `path` with the older exporter, which traces one call with TorchScript."""
    with _quiet(), torch.no_grad():
        torch.onnx.export(
            module,
            (example(interface),),
            path,
            dynamo=False,
            opset_version=TRACING_OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes={INPUT: AXES, OUTPUT: AXES},
        )
    finish(path, interface, 'torchscript')


EXPORTERS: dict[str, Callable[[ImageToImage, Interface, str], None]] = {
    'torchscript': by_tracing,
    'torch.export': by_torch_export,
}
"""Exporters by name, in the order in which they are tried; the first is by far the faster."""


def finish(path: str, interface: Interface, exporter: str) -> None:
    """Convert the graph in `path` to its precision, and store the metadata in it."""
    import onnx

    model: Any = onnx.load(path)
    if interface.precision == 'fp16':
        model = in_float16(model)
    onnx.helper.set_model_props(model, {**interface.metadata(), 'exporter': exporter})
    model.producer_name = 'dsgformer'
    onnx.save(model, path)


def in_float16(model: Any) -> Any:
    """A graph whose `FLOAT16_OPERATORS` are in float16; its input and output stay float32."""
    from onnxruntime.transformers import float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    blocked = sorted({node.op_type for node in model.graph.node}.difference(FLOAT16_OPERATORS))
    with _quiet():
        model = float16.convert_float_to_float16(model, keep_io_types=True, op_block_list=blocked)
    # The converter casts a tensor once for each operator in float32 that reads it, under one name, and
    # appends the casts at the end.
    once = list({node.output[0]: node for node in reversed(model.graph.node)}.values())[::-1]
    del model.graph.node[:]
    model.graph.node.extend(once)
    remove_round_trips(model.graph)
    OnnxModel.graph_topological_sort(model.graph)
    return model


def remove_round_trips(graph: Any) -> None:
    """Give float32 operators the float32 results of others, in place.

    The converter casts what an operator in float32 returns to float16, and back for the next one: of a chain
    of such operators every result would be rounded.
    """
    from onnx import TensorProto

    def cast_to(node: Any, kind: int) -> bool:
        return node.op_type == 'Cast' and node.attribute[0].i == kind

    inserted = ('_cast_to_fp16_node', *(f'graph_input_cast{i}' for i in range(len(graph.input))))
    narrowed = {
        node.output[0]: node.input[0]
        for node in graph.node
        if cast_to(node, TensorProto.FLOAT16) and node.name.endswith(inserted)
    }
    outputs = {entry.name for entry in graph.output}
    same: dict[str, str] = {}
    for node in graph.node:
        if cast_to(node, TensorProto.FLOAT) and node.input[0] in narrowed:
            wide = narrowed[node.input[0]]
            if node.output[0] in outputs:
                node.input[0] = wide
            else:
                same[node.output[0]] = wide
    for node in graph.node:
        node.input[:] = [same.get(name, name) for name in node.input]
    used = outputs.union(*(node.input for node in graph.node))
    kept = [node for node in graph.node if used.intersection(node.output)]
    del graph.node[:]
    graph.node.extend(kept)


def runtime(path: str | bytes) -> Run:
    """A file, or its content, in onnxruntime, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])

    def run(image: np.ndarray) -> np.ndarray:
        restored: np.ndarray = session.run([OUTPUT], {INPUT: image})[0]
        return restored

    return run


def dynamic_axes(interface: Interface) -> dict[int, Any]:
    """The axes that vary, for `torch.export`: height and width are any multiples of the padding multiple."""
    sides = {
        axis: interface.pad_multiple * torch.export.Dim(f'{AXES[axis]}_multiples', min=1) for axis in (2, 3)
    }
    return {0: torch.export.Dim('batch'), **sides}


def example(interface: Interface) -> Tensor:
    """The images that a network is exported with."""
    return torch.rand(interface.export_shape(), generator=torch.Generator().manual_seed(0))


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress warnings of exporters: about their own deprecations, and about every dynamic shape."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(before)
