"""Networks as files for other tools' runtimes: ONNX, OpenVINO, `torch.export`, AOTInductor and darktable.

`export(network, path, system)` writes a file and verifies it; the suffix of `path` or `format` chooses the
format.
"""

from dsgformer_arch.export.formats import FORMATS, export
from dsgformer_arch.export.image_to_image import Interface

__all__ = ['FORMATS', 'Interface', 'export']
