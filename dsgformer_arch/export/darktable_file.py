"""darktable's model packages (.dtmodel): a zip archive of a folder with an ONNX graph and its description.

darktable 5.6 reads `config.json` and `model.onnx` from the folder `<id>/` and runs the graph on square tiles
of RGB in sRGB's transfer curve, (1, 3, H, W), with mirrored borders.  The keys and the sizes of tiles are
those of darktable's src/ai/README.md and src/common/ai/restore.c and of the wiki of darktable-ai.  There is
no task for deblurring; `denoise` is the one that takes an image to an image of the same size.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from functools import partial

from dsgformer_arch.export import onnx_file
from dsgformer_arch.export.image_to_image import ImageToImage, Interface
from dsgformer_arch.export.verify import Run

Exporter = Callable[[ImageToImage, Interface, str], None]

CONFIG, GRAPH = 'config.json', 'model.onnx'
"""Names of the files in the archive's folder."""

TILES = (2048, 1536, 1024, 768, 512, 384, 256)
"""Sides of darktable's tiles, in pixels."""


def packaged(exporter: Exporter, module: ImageToImage, interface: Interface, path: str) -> None:
    """Write `path`."""
    graph = f'{path}.onnx'
    config = config_of(interface)
    try:
        exporter(module, interface, graph)
        with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f'{config["id"]}/{CONFIG}', json.dumps(config, indent=2) + '\n')
            archive.write(graph, f'{config["id"]}/{GRAPH}')
    finally:
        if os.path.exists(graph):
            os.remove(graph)


def config_of(interface: Interface) -> dict[str, object]:
    """The content of `config.json`: darktable's keys, and under `dsgformer` the metadata of all formats."""
    fitting = [side for side in TILES if side % interface.pad_multiple == 0 and side >= interface.min_size]
    metadata = interface.metadata()
    return {
        'id': f'denoise-{interface.system.lower().replace("_", "-")}',
        'name': f'restore {interface.system}',
        'description': f'Image restoration with {interface.system}, exported by dsgformer',
        'task': 'denoise',
        'version': metadata['dsgformer_version'],
        'backend': 'onnx',
        'arch': 'generic',
        'type': 'single',
        'tiling': True,
        'num_inputs': 1,
        'attributes': {'input_sizes': fitting},
        'dsgformer': metadata,
    }


EXPORTERS: dict[str, Exporter] = {
    name: partial(packaged, exporter) for name, exporter in onnx_file.EXPORTERS.items()
}
"""Exporters by name, in the order in which they are tried."""


def runtime(path: str) -> Run:
    """The graph of a package in onnxruntime, on the CPU."""
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith(f'/{GRAPH}'))
        return onnx_file.runtime(archive.read(name))
