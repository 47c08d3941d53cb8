"""`dsgformer weights`: the official weights of every system."""

from __future__ import annotations

import argparse
import sys

SUMMARY = 'list, download and remove official weights'

DESCRIPTION = """\
The checkpoints that the authors of the systems publish.

  dsgformer weights list                      what there is, and what is on this machine
  dsgformer weights get restormer/motion      download one, or resume a download
  dsgformer weights remove restormer/motion
  dsgformer deblur photo.jpg --model restormer/motion

Files are kept below $DSGFORMER_HOME, by default below ~/.cache/dsgformer.  They are read as data, never
executed, and must hold the weights of their system.  Each has the licence of its authors, see the list.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `dsgformer weights`."""
    parser.description = DESCRIPTION
    actions = parser.add_subparsers(dest='action', required=True, metavar='{list,get,remove}')
    listing = actions.add_parser('list', help='all official weights')
    listing.add_argument('--json', action='store_true', help='print one JSON object for each')
    for name, text in (('get', 'download'), ('remove', 'delete from this machine')):
        action = actions.add_parser(name, help=text)
        action.add_argument('keys', nargs='+', metavar='SYSTEM/NAME', help='such as restormer/motion')


def run(arguments: argparse.Namespace) -> int:
    """Run `dsgformer weights`; returns the exit status."""
    import dsgformer_arch

    dsgformer_arch.register()
    from dsgformer_arch.inference import official_weights

    if arguments.action == 'list':
        return _list(arguments.json)
    chosen = [official_weights.find(key) for key in arguments.keys]
    for weights in chosen:
        if arguments.action == 'get':
            print(official_weights.get_with_progress(weights))
        elif not official_weights.remove(weights):
            print(f'{weights.key} is not on this machine', file=sys.stderr)
    return 0


def _list(as_json: bool) -> int:
    import json

    from dsgformer_arch.inference import official_weights

    rows = [official_weights.describe(weights) for weights in official_weights.TABLE]
    if as_json:
        for row in rows:
            print(json.dumps(row))
        return 0
    heads = {'key': 'weights', 'trained_on': 'trained on', 'state': 'here', 'licence': 'licence'}
    lines = [heads, *rows]
    widths = [max(len(str(line[key])) for line in lines) for key in heads]
    for line in lines:
        print('  '.join(f'{line[key]!s:<{width}}' for key, width in zip(heads, widths, strict=True)).rstrip())
    return 0
