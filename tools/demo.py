"""Show what the weights in the package, and what training on the sample set achieve; `make demo` runs both.

    python tools/demo.py --pretrained

restores the test images of the sample set and writes `results/demo/pretrained.png`.

    python tools/demo.py

reads what `basicsr train` and `basicsr test` left, and writes `results/demo/before_after.png` and
`results/demo/report.json`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dsgformer_arch.benchmark.render.demo import show, show_pretrained
from dsgformer_arch.utils.errors import guarded


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description='Show what training and testing achieved: a figure and a record.  Run it in the folder '
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
    result.add_argument(
        '--pretrained',
        action='store_true',
        help='restore the test images with the weights in the package instead: pretrained.png',
    )
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    if args.pretrained:
        means = show_pretrained(args.test, args.out)
        blurred, restored = means['psnr_blurred'], means['psnr_restored']
        print(f'weights in the package: {blurred:.2f} dB to {restored:.2f} dB ({restored - blurred:+.2f} dB)')
        print(f'see {args.out / "pretrained.png"}')
        return
    report = show(args.train, args.test, args.out)
    blurred, restored = report['psnr_blurred'], report['psnr_restored']
    print(f'blurred {blurred:.2f} dB, restored {restored:.2f} dB ({restored - blurred:+.2f} dB)')
    print(f'see {args.out / "before_after.png"} and {args.out / "report.json"}')


if __name__ == '__main__':
    raise SystemExit(guarded(main))
