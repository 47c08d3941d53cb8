"""`UserError`, the exception for wrong input, and what the command lines make of it.

Wrong input (a path, an option, a checkpoint, an image) raises `UserError` or a
subclass of it.  Command lines print its one sentence and exit with status 2; a
traceback means a fault of the program.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import NoReturn

from dsgformer_arch.utils.text import printable


class UserError(Exception):
    """Wrong input.  The message is one sentence: what is wrong, where, and how to fix it."""

    def __init__(self, message: str = '') -> None:
        # A loader raises a worker's exception again with the worker's traceback in the message.
        if message.startswith('Caught ') and 'Original Traceback' in message:
            message = message.rpartition('Error: ')[2].strip()
        super().__init__(message)


def fail(message: str) -> NoReturn:
    """Print `message` on standard error, control characters as escapes, and exit with status 2."""
    lines = (printable(line) for line in message.split('\n'))
    print('error:', '\n'.join(lines), file=sys.stderr, flush=True)
    raise SystemExit(2)


def guarded(main: Callable[[], int | None]) -> int:
    """Run a command line's `main` and turn a `UserError` into status 2.

    Characters that the terminal's encoding lacks are printed as escapes, as in `ReLU\\xb2` for GBK.

    Returns:
        The status that `main` returned, 0 if it returned nothing.

    Raises:
        SystemExit: with status 2 on `UserError`, 130 on an interrupt.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == 'strict':
            stream.reconfigure(errors='backslashreplace')
    try:
        return main() or 0
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr, flush=True)
        raise SystemExit(130) from None
