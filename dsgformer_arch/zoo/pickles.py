"""A limit on pickles that take few bytes and hours to read.

A pickle may refer to an object that it made before.  A tuple of two references to a tuple of two references,
and so on, takes a few bytes a level, but hashing it, as a key of a dict, takes 2^levels steps that no signal
interrupts.  `torch.load` with `weights_only` runs no code, but it hashes keys.
"""

from __future__ import annotations

import os
import pickletools
import zipfile
from typing import IO, Any

MOST_PARTS = 20_000
"""Parts of a tuple, those of the tuples inside counted as often as they are referred to."""
LEGACY_PICKLES = 5
"""Files of PyTorch before 1.6 begin with magic number, version, machine, content and keys."""
TUPLES = ('TUPLE', 'TUPLE1', 'TUPLE2', 'TUPLE3')
PUTS = ('PUT', 'BINPUT', 'LONG_BINPUT')
GETS = ('GET', 'BINGET', 'LONG_BINGET')


class NestedError(ValueError):
    """A tuple has more than `MOST_PARTS` parts."""


def check_nesting(path: str | os.PathLike[str]) -> None:
    """Check the pickles of a file that `torch.load` is going to read.

    What is not a pickle is left to `torch.load`.

    Args:
        path: a zip archive with records `*.pkl`, or a file that begins with pickles.

    Raises:
        NestedError: a tuple has more than `MOST_PARTS` parts.
        OSError, zipfile.BadZipFile: the file cannot be read.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.filename.endswith('.pkl'):
                    with archive.open(record) as stream:
                        _scan(stream)
    with open(path, 'rb') as file:
        if file.read(4) != b'PK\x03\x04':
            file.seek(0)
            for _ in range(LEGACY_PICKLES):
                if not _scan(file):
                    break


def _scan(stream: IO[bytes]) -> bool:
    """Follow a pickle's stack without making its objects; returns whether it was read to its end."""
    try:
        _follow(stream)
    except NestedError:
        raise
    except Exception:  # no pickle: whatever pickletools raises for arbitrary bytes
        return False
    return True


def _follow(stream: IO[bytes]) -> None:
    stack: list[Any] = []  # the number of parts of each object; `mark` where one was set
    memo: dict[Any, Any] = {}
    mark = pickletools.markobject
    for operation, argument, _ in pickletools.genops(stream):
        name, before = operation.name, operation.stack_before
        if name in PUTS:
            memo[argument] = stack[-1]
            continue
        if name == 'MEMOIZE':
            memo[len(memo)] = stack[-1]
            continue
        if name in GETS:
            stack.append(memo[argument])
            continue
        if mark in before:
            at = len(stack) - 1 - stack[::-1].index(mark)
            parts = stack[at + 1 :]
            del stack[at - before.index(mark) :]
        else:
            at = len(stack) - len(before)
            parts = stack[at:]
            del stack[at:]
        if name in TUPLES:
            size = 1 + sum(parts)
            if size > MOST_PARTS:
                raise NestedError
            stack.append(size)
        else:
            stack += [mark if each is mark else 1 for each in operation.stack_after]
