"""`dsgformer deblur`: restore images and videos."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

from dsgformer_arch.utils.arguments import whole_number
from dsgformer_arch.utils.errors import UserError

if TYPE_CHECKING:
    from dsgformer_arch.inference.deblurrer import Deblurrer

SUMMARY = 'restore images, folders and videos'

DESCRIPTION = """\
Restore blurred images and videos.

  dsgformer deblur photo.jpg                     writes photo_deblurred.jpg
  dsgformer deblur holiday/ -o sharp/            a folder, the same tree out
  dsgformer deblur 'scans/*.tif' --strength 0.7
  dsgformer deblur - < in.png > out.png

The result has the format, depth, EXIF data and colour profile of the input.  A file is skipped if its result
exists and is not older than the file.

Exit status: 0 all restored, 1 some failed (each is named), 2 wrong usage.
"""

side = whole_number(64, 'pixels')
"""The type of sides of tiles and crops, in pixels."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `dsgformer deblur`."""
    parser.description = DESCRIPTION
    parser.add_argument(
        'inputs', nargs='+', metavar='INPUT', help='image, video, folder, pattern, or - for standard input'
    )
    parser.add_argument(
        '-o',
        '--out',
        metavar='OUT',
        help='file for one input, folder for several; by default next to the input, as *_deblurred',
    )
    add_network_arguments(parser)
    add_output_arguments(parser)
    parser.add_argument(
        '--compare', action='store_true', help='write side-by-side images too (*_compare.jpg)'
    )
    parser.add_argument(
        '--shard', type=_shard, metavar='I/N', help='restore the I-th of N parts of the inputs, I from 1 to N'
    )


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that choose a network and how it computes; `restorer` reads them."""
    parser.add_argument('--model', metavar='NAME', help='system; `dsgformer models` lists them')
    parser.add_argument('--weights', metavar='FILE', help='checkpoint; its system is detected from the file')
    parser.add_argument(
        '--tile', type=_tile, default='auto', metavar='auto|N', help='largest side of tiles in pixels'
    )
    parser.add_argument(
        '--precision', choices=['auto', 'fp32', 'bf16', 'fp16'], default='auto', help='default: %(default)s'
    )
    parser.add_argument('--device', default='auto', metavar='auto|cpu|cuda|mps', help='default: %(default)s')
    parser.add_argument(
        '--tlc',
        nargs='?',
        type=side,
        const=True,
        default=False,
        metavar='PIXELS',
        help='local pooling at test time, for crops of this side in training (default: 256)',
    )
    parser.add_argument(
        '--strength', type=_strength, default=1.0, metavar='0..1', help='blend with the input (default: 1)'
    )


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Options about what is written and printed; `image_suffix` reads --format."""
    parser.add_argument('--format', metavar='SUFFIX', help='write images as png, jpg, tif, webp or bmp')
    parser.add_argument('--json', action='store_true', help='print one JSON object for each file')
    parser.add_argument('--force', action='store_true', help='also restore files whose result is up to date')


def image_suffix(arguments: argparse.Namespace) -> str | None:
    """The suffix of --format, such as `'.png'`; None where it is not given.

    Raises:
        UserError: images of that format cannot be written.
    """
    from dsgformer_arch.inference.images import FORMATS

    if not arguments.format:
        return None
    suffix = f'.{arguments.format.lower().lstrip(".")}'
    if suffix not in FORMATS:
        raise UserError(f'--format {arguments.format}: choose one of png, jpg, tif, webp and bmp')
    return suffix


def restorer(arguments: argparse.Namespace) -> Deblurrer:
    """The restorer that `add_network_arguments` describe.

    Raises:
        UserError: no such system, no weights, or no such device.
    """
    import dsgformer_arch

    if arguments.model is None and arguments.weights is None:
        dsgformer_arch.register_dsgformer()
    else:
        dsgformer_arch.register()
    from dsgformer_arch.inference.deblurrer import Deblurrer

    return Deblurrer(
        arguments.model,
        weights=arguments.weights,
        device=arguments.device,
        precision=arguments.precision,
        tile=arguments.tile,
        tlc=arguments.tlc,
        strength=arguments.strength,
    )


def run(arguments: argparse.Namespace) -> int:
    """Restore; returns the exit status."""
    from dsgformer_arch.inference.deblur import deblur, summary
    from dsgformer_arch.inference.jobs import STREAM, plan

    begun = time.monotonic()
    jobs = plan(arguments.inputs, arguments.out, image_suffix(arguments), arguments.shard)
    to_stream = any(job.target == STREAM for job in jobs)
    if arguments.json and to_stream:
        raise UserError('--json and an image cannot both go to standard output; name a file with -o')
    if arguments.compare and jobs and jobs[0].source == STREAM:
        raise UserError('--compare reads its input twice; give a file, not standard input')

    def make() -> Deblurrer:
        from dsgformer_arch.utils.allocator import keep_freed_memory
        from dsgformer_arch.utils.collection import without_collection

        keep_freed_memory()
        with without_collection():
            return restorer(arguments)

    results = deblur(jobs, make, force=arguments.force, compare=arguments.compare, as_json=arguments.json)
    print(summary(results, time.monotonic() - begun), file=sys.stderr, flush=True)
    return int(any(result.status == 'failed' for result in results))


def _tile(text: str) -> int | str:
    return text if text == 'auto' else side(text)


def _strength(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not between 0 (the input) and 1 (restored)')
    return value


def _shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition('/')
    if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f'{text!r} is not I/N with I from 1 to N, such as 2/8')
    return int(index), int(count)
