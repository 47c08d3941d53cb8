"""Types of command-line arguments, for `type=` of `argparse`."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def whole_number(least: int, unit: str = '') -> Callable[[str], int]:
    """The type of an argument that must be a whole number of at least `least` of a unit."""
    bound = f'{least} {unit}'.rstrip()

    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f'{text!r} is not a whole number of at least {bound}')
        return int(text)

    return convert


natural = whole_number(0)
positive = whole_number(1)
