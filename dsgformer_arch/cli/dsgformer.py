"""The command `dsgformer`: restores images and videos, and related tasks.

Each command is a module of `dsgformer_arch.cli.commands`; a name in `COMMANDS` adds it.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import importlib
from typing import Any

from dsgformer_arch.utils.errors import guarded

COMMANDS = ('deblur', 'batch', 'models', 'info', 'weights', 'export', 'serve', 'doctor')
"""Modules of `dsgformer_arch.cli.commands`, in the order of the help."""


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""

    # At exit the collector would free what PyTorch's import made, object by object: a quarter of the time of
    # restoring a small image.
    atexit.register(gc.freeze)

    def run() -> int:
        parsed = parser().parse_args(arguments)
        status: int = parsed.run(parsed)
        return status

    return guarded(run)


def parser() -> argparse.ArgumentParser:
    """The command line, with all commands."""
    top = argparse.ArgumentParser(
        prog='dsgformer',
        description='Sharpen blurred images and videos.',
        epilog='`dsgformer COMMAND --help` describes a command.',
    )
    commands = top.add_subparsers(dest='command', required=True, metavar='COMMAND')
    for name in COMMANDS:
        module: Any = importlib.import_module(f'dsgformer_arch.cli.commands.{name}')
        command = commands.add_parser(
            name, help=module.SUMMARY, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return top


if __name__ == '__main__':
    raise SystemExit(main())
