"""Update the table of systems in the README: `python tools/make_system_table.py`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dsgformer_arch.benchmark.render import system_table
from dsgformer_arch.utils.errors import guarded


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description='Count every system and put the table between the markers of the README.'
    )
    result.add_argument(
        'readme',
        metavar='README',
        type=Path,
        nargs='?',
        default=Path(__file__).resolve().parents[1] / 'README.md',
        help="the Markdown file (default: this checkout's README.md)",
    )
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    print(f'{args.readme}: {"changed" if system_table.rewrite(args.readme) else "up to date"}')


if __name__ == '__main__':
    raise SystemExit(guarded(main))
