"""`dsgformer export MODEL -o FILE`: a network as a file for another runtime, or as a folder for the hub."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, cast

from dsgformer_arch.utils.errors import UserError

if TYPE_CHECKING:
    from dsgformer_arch.archs.layers.network import RestorationNetwork

SUMMARY = 'write a network for other tools: ONNX, OpenVINO, torch.export, darktable, Hugging Face'

HUGGING_FACE = 'huggingface'
"""The format that is a folder with weights instead of a program; it is not verified in another runtime."""

FORMATS = ('onnx', 'openvino', 'torch', 'aoti', 'darktable', HUGGING_FACE)
"""The keys of `export.FORMATS`, which takes seconds to import, and `HUGGING_FACE`."""

DESCRIPTION = """\
Write a network with its weights as a file for other tools, and verify it there.

  dsgformer export dsgformer_h -o dsgformer_h.onnx
  dsgformer export restormer/motion -o restormer.onnx --precision fp16
  dsgformer export dsgformer_t -o mine.onnx --weights net_g_latest.pth
  dsgformer export dsgformer_h -o dsgformer_h.xml            OpenVINO
  dsgformer export dsgformer_h -o dsgformer_h.pt2            torch.export
  dsgformer export dsgformer_h -o dsgformer_h.pt2 --format aoti    compiled by AOTInductor
  dsgformer export dsgformer_h -o dsgformer_h.dtmodel        darktable
  dsgformer export dsgformer_h -o folder --format huggingface      config.json, model.safetensors, model card

The file takes an RGB image in [0, 1], float32, (N, 3, H, W), of any height and width that are multiples of
its padding multiple; the metadata in the file say which.  It is compared with PyTorch at two sizes that it
was not exported with, and written only if it computes the same.

Exit status: 0 written, 2 not written.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `dsgformer export`."""
    parser.description = DESCRIPTION
    parser.add_argument('model', metavar='MODEL', help='system; `dsgformer models` lists them')
    parser.add_argument(
        '-o', '--out', required=True, metavar='FILE', help='.onnx, .xml, .pt2, .dtmodel or a folder'
    )
    parser.add_argument('--format', choices=FORMATS, help='default: as the suffix of FILE tells')
    parser.add_argument('--weights', metavar='FILE', help='checkpoint of the system MODEL')
    parser.add_argument(
        '--precision', choices=['fp32', 'fp16'], default='fp32', help='of the weights; default: %(default)s'
    )


def run(arguments: argparse.Namespace) -> int:
    """Export; returns the exit status."""
    import dsgformer_arch

    dsgformer_arch.register()
    from dsgformer_arch import zoo
    from dsgformer_arch.export.formats import check_target, export
    from dsgformer_arch.inference import weights

    system = arguments.model.partition('/')[0]
    zoo.get(system)
    hub = arguments.format == HUGGING_FACE
    if hub and arguments.precision != 'fp32':
        raise UserError('--format huggingface keeps the type of the weights; leave --precision out')
    if not hub:
        check_target(arguments.out, arguments.precision, arguments.format)
    network = cast('RestorationNetwork', weights.network(arguments.model, arguments.weights)[0])
    if hub:
        folder = network.save_pretrained(arguments.out)
        print(f'{folder}: {system} as config.json, model.safetensors and README.md')
        return 0
    done = export(network, arguments.out, system, arguments.precision, arguments.format)
    print(
        f'{done.path}: {system}, {done.interface.precision}, exported with {done.exporter}; height and width '
        f'are multiples of {done.interface.pad_multiple} and at least {done.interface.min_size}; verified, '
        f'at most {done.difference:.1g} from PyTorch'
    )
    return 0
