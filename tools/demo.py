"""Show what training and testing on the sample set achieved; `make demo` ends with it.

    python tools/demo.py

reads what `basicsr train` and `basicsr test` left, and writes `results/demo/before_after.png` and
`results/demo/report.json`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dsgformer_arch.benchmark.render.demo import show
from dsgformer_arch.utils.errors import guarded


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description='Show what training and testing achieved: a picture and a record.  Run it in the folder '
        'that holds experiments/ and results/.'
    )
    result.add_argument(
        '--out',
        metavar='DIR',
        type=Path,
        default=Path('results/demo'),
        help='the folder to write to (default: %(default)s)',
    )
    for name in ('train', 'test'):
        result.add_argument(
            f'--{name}',
            metavar='FILE',
            type=Path,
            default=Path(f'options/{name}_sample.yml'),
            help=f'the option file of basicsr {name} (default: %(default)s)',
        )
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    report = show(args.train, args.test, args.out)
    blurred, restored = report['psnr_blurred'], report['psnr_restored']
    print(f'blurred {blurred:.2f} dB, restored {restored:.2f} dB ({restored - blurred:+.2f} dB)')
    print(f'see {args.out / "before_after.png"} and {args.out / "report.json"}')


if __name__ == '__main__':
    raise SystemExit(guarded(main))
