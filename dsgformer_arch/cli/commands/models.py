"""`dsgformer models`: the systems, and which of their weights are here."""

from __future__ import annotations

import argparse
import json

SUMMARY = 'list the systems and their weights'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `dsgformer models`."""
    parser.description = 'List the systems: task, parameters, MACs, reported results, and weights.'
    parser.add_argument('--json', action='store_true', help='print everything that is known as JSON')


def run(arguments: argparse.Namespace) -> int:
    """Print the table."""
    import dsgformer_arch

    dsgformer_arch.register()
    from dsgformer_arch.inference import models

    rows = models.table()
    print(json.dumps(rows, indent=1, ensure_ascii=False) if arguments.json else models.as_text(rows))
    return 0
