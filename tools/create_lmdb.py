"""Turn a data set, as its authors pack it, into the LMDBs that the options read.

    python tools/create_lmdb.py gopro GOPRO_Large datasets/gopro --workers 4

writes `train_lq.lmdb`, `train_gt.lmdb`, `test_lq.lmdb` and `test_gt.lmdb` below `datasets/gopro`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dsgformer_arch.data.prepare.arguments import add_choices, add_source, layouts, splits_of
from dsgformer_arch.data.prepare.lmdb_writer import create_lmdbs
from dsgformer_arch.data.prepare.pair_files import CropGrid
from dsgformer_arch.utils.arguments import positive
from dsgformer_arch.utils.errors import UserError, guarded


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description='Turn a data set, as its authors pack it, into LMDBs for BasicSR: for each split '
        'OUT/<split>_lq.lmdb (blurred or rainy) and OUT/<split>_gt.lmdb (sharp or clean).',
        epilog=f'presets and what they expect below ROOT:\n{layouts()}\n\n'
        'Images are checked as they are copied; where anything is wrong, all of it is listed, the exit\n'
        'status is 2 and nothing is written.  Run the same command again to complete an interrupted run.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_source(result)
    result.add_argument('out', metavar='OUT', type=Path, help='the folder for the LMDBs, as datasets/gopro')
    add_choices(result)
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
    result.add_argument('--verify', action='store_true', help='decode every stored image afterwards')
    result.add_argument('--force', action='store_true', help='replace LMDBs that OUT already holds')
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    if args.step and not args.crop:
        raise UserError('--step says how far crops are apart; give --crop too')
    splits = splits_of(args)
    crop = CropGrid(args.crop, args.step or max(1, args.crop // 2)) if args.crop else None
    create_lmdbs(splits, args.out, args.preset, crop, args.workers, args.verify, args.force, args.raw)


if __name__ == '__main__':
    raise SystemExit(guarded(main))
