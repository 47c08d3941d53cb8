"""Types of command-line arguments, for `type=` of `argparse`."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """An argument that must be a whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number above 0')
    return int(text)


def natural(text: str) -> int:
    """An argument that must be a whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number of at least 0')
    return int(text)
