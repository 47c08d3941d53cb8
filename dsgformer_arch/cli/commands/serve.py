"""`dsgformer serve`: a page and an API in the browser."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from dsgformer_arch.utils.arguments import natural, positive

if TYPE_CHECKING:
    from dsgformer_arch.inference.deblurrer import Deblurrer

SUMMARY = 'restore images in a browser, or over HTTP'

DESCRIPTION = """\
Serve a page that restores images, and POST /api/deblur for programs.

  dsgformer serve                                  http://127.0.0.1:7860/, for this machine only
  dsgformer serve --port 0                         any free port, which is printed
  dsgformer serve --model restormer/motion --model dsgformer_h

One image is restored at a time; others wait in a queue.  The server opens no connections itself.  Ctrl-C or
SIGTERM ends it.

Exit status: 0 ended by a signal, 2 not started.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `dsgformer serve`."""
    parser.description = DESCRIPTION
    parser.add_argument('--host', default='127.0.0.1', help='address to listen on; default: %(default)s')
    parser.add_argument(
        '--port', type=_port, default=7860, metavar='N', help='0 for any free one; default: %(default)s'
    )
    parser.add_argument(
        '--model',
        action='append',
        metavar='NAME',
        help='system on offer, the first by default; may be given several times '
        '(default: the weights in the package and all downloaded ones)',
    )
    parser.add_argument(
        '--weights', metavar='FILE', help='checkpoint to serve; its system is detected from the file'
    )
    parser.add_argument('--device', default='auto', metavar='auto|cpu|cuda|mps', help='default: %(default)s')
    parser.add_argument('--threads', type=positive, metavar='N', help='threads of PyTorch on a CPU')
    parser.add_argument(
        '--queue', type=natural, default=20, metavar='N', help='images that may wait; default: %(default)s'
    )
    parser.add_argument(
        '--max-bytes', type=positive, default=50_000_000, metavar='N', help='of a file; default: %(default)s'
    )
    parser.add_argument(
        '--max-pixels',
        type=positive,
        default=50_000_000,
        metavar='N',
        help='of an image; default: %(default)s',
    )
    parser.add_argument(
        '--keep',
        type=positive,
        default=30,
        metavar='MINUTES',
        help="after which the page's files are removed; default: %(default)s",
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve; returns the exit status."""
    import dsgformer_arch

    dsgformer_arch.register()
    from dsgformer_arch.serving.server import Options, is_local, serve
    from dsgformer_arch.serving.service import Limits, offered

    if not is_local(arguments.host):
        print(
            f'warning: --host {arguments.host} lets anyone on the network use this server and send it images',
            file=sys.stderr,
            flush=True,
        )

    def make() -> dict[str, Callable[[], Deblurrer]]:
        import torch

        from dsgformer_arch.utils.allocator import keep_freed_memory

        keep_freed_memory()
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        return offered(arguments.model, arguments.weights, arguments.device)

    limits = Limits(arguments.max_bytes, arguments.max_pixels, arguments.queue)
    options = Options(arguments.host, arguments.port, limits, arguments.keep * 60.0)
    return serve(options, make, arguments.model)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f'{text!r} is not a port from 0 to 65535')
    return int(text)
