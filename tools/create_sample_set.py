"""Make the sample set, blurred photographs of scikit-image, for `make demo` and the tests.

    python tools/create_sample_set.py datasets/sample

writes `train_lq.lmdb`, `train_gt.lmdb`, `test_lq.lmdb` and `test_gt.lmdb` below `datasets/sample`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dsgformer_arch.data.prepare.sample_set import create_sample_set
from dsgformer_arch.utils.errors import guarded


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description='Blur photographs that come with scikit-image by random camera shake, and write them '
        'as LMDBs for BasicSR.  A complete set of the same seed is kept as it is.'
    )
    result.add_argument(
        'out',
        metavar='OUT',
        type=Path,
        nargs='?',
        default=Path('datasets/sample'),
        help='the folder for the LMDBs (default: %(default)s)',
    )
    result.add_argument(
        '--seed',
        metavar='N',
        type=int,
        default=0,
        help='camera paths and noise follow from it (default: %(default)s)',
    )
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    create_sample_set(args.out, args.seed)


if __name__ == '__main__':
    raise SystemExit(guarded(main))
