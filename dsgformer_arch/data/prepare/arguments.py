"""Arguments that `create_lmdb.py` and `create_stream.py` share: which images of which data set."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from dsgformer_arch.data.prepare.layouts import PRESETS, USUAL_FOLDERS, Split, read_pairs, read_splits
from dsgformer_arch.utils.arguments import positive
from dsgformer_arch.utils.errors import UserError

PAIRS = 'pairs'


def layouts() -> str:
    """The presets and the layout that each expects, one a line."""
    usual = ', '.join('/'.join(couple) for couple in USUAL_FOLDERS)
    lines = [f'  {name:12} {preset.layout}' for name, preset in PRESETS.items()]
    return '\n'.join(
        [*lines, f'  {PAIRS:12} two folders of images with equal names: {usual}, or --lq and --gt']
    )


def add_source(parser: argparse.ArgumentParser) -> None:
    """Add what says which images to read: PRESET, ROOT."""
    parser.add_argument('preset', metavar='PRESET', choices=[*PRESETS, PAIRS], help='the data set; see below')
    parser.add_argument('root', metavar='ROOT', type=Path, help='the folder that it was unpacked to')


def add_choices(parser: argparse.ArgumentParser) -> None:
    """Add `--split`, `--workers`, `--lq` and `--gt`."""
    parser.add_argument(
        '--split',
        metavar='NAME',
        nargs='+',
        default=[],
        help=f'only these splits (default: all there are); with {PAIRS}, the name to give (default: train)',
    )
    parser.add_argument(
        '--workers',
        metavar='N',
        type=positive,
        default=min(8, os.cpu_count() or 1),
        help='threads that read, check and encode (default: %(default)s)',
    )
    parser.add_argument(
        '--lq', metavar='DIR', type=Path, help=f'{PAIRS}: degraded images, below ROOT or anywhere'
    )
    parser.add_argument('--gt', metavar='DIR', type=Path, help=f'{PAIRS}: their ground truth, likewise')


def splits_of(args: argparse.Namespace) -> list[Split]:
    """The splits that the arguments ask for.

    Raises:
        UserError: the arguments do not fit together, or a split is not there.
    """
    if args.preset == PAIRS:
        if len(args.split) > 1:
            raise UserError(f'{PAIRS} makes one split; give one name by --split')
        return [read_pairs(args.root, args.split[0] if args.split else 'train', args.lq, args.gt)]
    if args.lq or args.gt:
        raise UserError(f'--lq and --gt belong to the preset {PAIRS}; {args.preset} knows its folders')
    return read_splits(args.preset, args.root, args.split)
