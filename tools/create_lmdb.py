"""Turn a data set, as its authors pack it, into the LMDBs that the options read.

    python tools/create_lmdb.py gopro GOPRO_Large datasets/gopro --workers 4

writes `train_lq.lmdb`, `train_gt.lmdb`, `test_lq.lmdb` and `test_gt.lmdb` below `datasets/gopro`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from dsgformer_arch.data.prepare.layouts import PRESETS, USUAL_FOLDERS, read_pairs, read_splits
from dsgformer_arch.data.prepare.lmdb_writer import CropGrid, create_lmdbs
from dsgformer_arch.utils.errors import UserError, guarded

PAIRS = 'pairs'


def positive(text: str) -> int:
    """An argument that must be a whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number above 0')
    return int(text)


def parser() -> argparse.ArgumentParser:
    usual = ', '.join('/'.join(couple) for couple in USUAL_FOLDERS)
    layouts = '\n'.join(f'  {name:12} {preset.layout}' for name, preset in PRESETS.items())
    result = argparse.ArgumentParser(
        description='Turn a data set, as its authors pack it, into LMDBs for BasicSR: for each split '
        'OUT/<split>_lq.lmdb (blurred or rainy) and OUT/<split>_gt.lmdb (sharp or clean).',
        epilog='presets and what they expect below ROOT:\n'
        f'{layouts}\n  {PAIRS:12} two folders of images with equal names: {usual}, or --lq and --gt\n\n'
        'Images are checked as they are copied; where anything is wrong, all of it is listed, the exit\n'
        'status is 2 and nothing is written.  Run the same command again to complete an interrupted run.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument('preset', metavar='PRESET', choices=[*PRESETS, PAIRS], help='the data set; see below')
    result.add_argument('root', metavar='ROOT', type=Path, help='the folder that it was unpacked to')
    result.add_argument('out', metavar='OUT', type=Path, help='the folder for the LMDBs, as datasets/gopro')
    result.add_argument(
        '--split',
        metavar='NAME',
        nargs='+',
        default=[],
        help=f'only these splits (default: all there are); with {PAIRS}, the name to give (default: train)',
    )
    result.add_argument('--crop', metavar='S', type=positive, help='store overlapping crops of SxS as PNG')
    result.add_argument(
        '--step', metavar='T', type=positive, help='pixels from crop to crop (default: half of --crop)'
    )
    result.add_argument(
        '--raw',
        action='store_true',
        help='store pixels without compression: several times the space, and training with '
        'PairedCropDataset reads only what a crop needs',
    )
    result.add_argument(
        '--workers',
        metavar='N',
        type=positive,
        default=min(8, os.cpu_count() or 1),
        help='threads that read, check and encode (default: %(default)s)',
    )
    result.add_argument('--verify', action='store_true', help='decode every stored image afterwards')
    result.add_argument('--force', action='store_true', help='replace LMDBs that OUT already holds')
    result.add_argument(
        '--lq', metavar='DIR', type=Path, help=f'{PAIRS}: degraded images, below ROOT or anywhere'
    )
    result.add_argument('--gt', metavar='DIR', type=Path, help=f'{PAIRS}: their ground truth, likewise')
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    if args.step and not args.crop:
        raise UserError('--step says how far crops are apart; give --crop too')
    if args.preset == PAIRS:
        if len(args.split) > 1:
            raise UserError(f'{PAIRS} makes one split; give one name by --split')
        splits = [read_pairs(args.root, args.split[0] if args.split else 'train', args.lq, args.gt)]
    elif args.lq or args.gt:
        raise UserError(f'--lq and --gt belong to the preset {PAIRS}; {args.preset} knows its folders')
    else:
        splits = read_splits(args.preset, args.root, args.split)
    crop = CropGrid(args.crop, args.step or max(1, args.crop // 2)) if args.crop else None
    create_lmdbs(splits, args.out, args.preset, crop, args.workers, args.verify, args.force, args.raw)


if __name__ == '__main__':
    raise SystemExit(guarded(main))
