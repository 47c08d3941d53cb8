"""`dsgformer batch`: restore millions of images on a Ray cluster."""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import TYPE_CHECKING

from dsgformer_arch.cli.commands.deblur import (
    add_network_arguments,
    add_output_arguments,
    image_suffix,
    restorer,
)
from dsgformer_arch.utils.arguments import positive
from dsgformer_arch.utils.errors import UserError

if TYPE_CHECKING:
    from dsgformer_arch.inference.deblurrer import Deblurrer
    from dsgformer_arch.inference.jobs import Tree

SUMMARY = 'restore millions of images on a Ray cluster'

DESCRIPTION = """\
Restore a folder of images on all GPUs or cores of a Ray cluster.

  dsgformer batch blurred/ sharp/                           on this machine
  dsgformer batch blurred/ sharp/ --ray auto                on the cluster that this machine belongs to
  dsgformer batch @list.txt sharp/ --ray 10.0.0.5:6379      the files that a list names, one a line

A file is skipped if its result exists and is not older than the file, so that a job that was killed
continues.  Failed images are listed in OUT/failed.jsonl.  Needs Ray:
pip install "dsgformer[cluster]".

Exit status: 0 all restored, 1 some failed, 2 wrong usage or no cluster.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `dsgformer batch`."""
    parser.description = DESCRIPTION
    parser.add_argument(
        'input', metavar='INPUT', help='folder, or @FILE with a path in each line, relative to the file'
    )
    parser.add_argument('out', metavar='OUT', help='folder in which the tree of the inputs is repeated')
    parser.add_argument(
        '--ray',
        default='local',
        metavar='HOST:PORT|auto|local',
        help='cluster: an address, the one of this machine, or a new one on this machine (default: local)',
    )
    parser.add_argument(
        '--workers', type=positive, metavar='N', help='processes at most; default: one a GPU, or all cores'
    )
    parser.add_argument(
        '--per-gpu', type=positive, default=1, metavar='N', help='workers on each GPU (default: 1)'
    )
    parser.add_argument('--cpus', type=positive, metavar='N', help='cores of a CPU worker (default: 4)')
    add_network_arguments(parser)
    add_output_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Restore; returns the exit status."""
    from dsgformer_arch.inference.batch import Pool, absolute, batch

    tree = absolute(files(arguments))
    begun = time.monotonic()
    tally = batch(
        tree,
        Maker(arguments),
        Pool(arguments.ray, arguments.workers, arguments.cpus, arguments.per_gpu, arguments.device),
        force=arguments.force,
        as_json=arguments.json,
    )
    print(tally.summary(time.monotonic() - begun), file=sys.stderr, flush=True)
    return int(tally.failed > 0)


def files(arguments: argparse.Namespace) -> Tree:
    """The tree that INPUT, OUT and --format name.

    Raises:
        UserError: there is no such folder or list.
    """
    from dsgformer_arch.inference.jobs import Tree

    suffix = image_suffix(arguments)
    if arguments.input.startswith('@'):
        listed = arguments.input[1:]
        if not os.path.isfile(listed):
            raise UserError(f'{listed}: there is no such file; @ names a list of paths')
        return Tree(os.path.dirname(listed) or '.', arguments.out, suffix, listed)
    if not os.path.isdir(arguments.input):
        raise UserError(f'{arguments.input}: no such folder; `dsgformer deblur` restores single files')
    return Tree(arguments.input, arguments.out, suffix)


class Maker:
    """Makes restorers, also in processes with another working directory.

    Args:
        arguments: the command line.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = vars(arguments) | {'run': None}
        if arguments.weights is not None:
            self.arguments['weights'] = os.path.abspath(arguments.weights)

    def __call__(self, device: str) -> Deblurrer:
        """A restorer on `device`."""
        return restorer(argparse.Namespace(**self.arguments | {'device': device}))
