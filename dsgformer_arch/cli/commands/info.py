"""`dsgformer info FILE`: what an image, a video or a file of weights is."""

from __future__ import annotations

import argparse
import json

SUMMARY = 'describe an image, a video or a file of weights'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `dsgformer info`."""
    parser.description = 'Describe files.  Files of weights are read as data; they cannot run code.'
    parser.add_argument('files', nargs='+', metavar='FILE')
    parser.add_argument('--json', action='store_true', help='print one JSON object for each file')


def run(arguments: argparse.Namespace) -> int:
    """Print what each file is."""
    import dsgformer_arch

    dsgformer_arch.register()
    from dsgformer_arch.inference.models import describe

    for file in arguments.files:
        found = describe(file)
        if arguments.json:
            print(json.dumps(found, ensure_ascii=False, default=str))
            continue
        width = max(map(len, found))
        for key, value in found.items():
            print(f'{key:<{width}}  {_text(value)}')
    return 0


def _text(value: object) -> str:
    if isinstance(value, bool):
        return 'yes' if value else 'no'
    if isinstance(value, int):
        return f'{value:,}'
    if isinstance(value, (list, tuple)):
        return ', '.join(map(str, value)) or 'none'
    if isinstance(value, dict):
        return ', '.join(f'{key}={entry}' for key, entry in value.items()) or 'none'
    return str(value)
