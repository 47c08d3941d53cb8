"""What `torch.load` with `weights_only` leaves to be checked: nesting, and NumPy's numbers.

A pickle may refer to an object that it made before.  A tuple of two references to a tuple of two references,
and so on, takes a few bytes a level, but hashing it, as a key of a dict, takes 2^levels steps that no signal
interrupts.  `torch.load` with `weights_only` runs no code, but it hashes keys.

Published files keep a best PSNR or an epoch as NumPy's numbers beside the weights.  NumPy's own reader of
types ends the process with SIGSEGV when their state is malformed, so that these are read by stand-ins.
"""

from __future__ import annotations

import os
import pickletools
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
import torch

MOST_PARTS = 20_000
"""Parts of a tuple, those of the tuples inside counted as often as they are referred to."""
LEGACY_PICKLES = 5
"""Files of PyTorch before 1.6 begin with magic number, version, machine, content and keys."""
NUMBERS = ('f2', 'f4', 'f8', 'i4', 'i8', 'b1')
"""Types of NumPy's numbers that are read."""
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


class NumberType:
    """Stands for a type of NumPy's numbers in a pickle.

    Args:
        code: one of `NUMBERS`.
        rest: flags that say nothing of numbers.

    Raises:
        ValueError: another type.
    """

    def __init__(self, code: object = None, *rest: object) -> None:
        if code not in NUMBERS:
            raise ValueError('a NumPy type of no number')
        self.code = str(code)

    def __setstate__(self, state: object) -> None:
        """Byte order and what structured types have; big-endian numbers are refused."""
        if not (isinstance(state, tuple) and len(state) > 1 and state[1] in ('<', '|', '=')):
            raise ValueError('a NumPy type in a form that NumPy does not write here')


def number(kind: object, data: object = None) -> Any:
    """Stands for NumPy's function that makes a number of its type and bytes.

    Raises:
        ValueError: other arguments.
    """
    if not (isinstance(kind, NumberType) and isinstance(data, bytes)) or len(data) != int(kind.code[1]):
        raise ValueError('a NumPy number that is none')
    return np.frombuffer(data, f'<{kind.code}')[0]


@contextmanager
def numbers_allowed() -> Iterator[None]:
    """Let `torch.load` read NumPy's numbers by the stand-ins within a `with` statement."""
    names = [f'numpy.{core}.multiarray.scalar' for core in ('core', '_core')]
    allowed: list[Any] = [(NumberType, 'numpy.dtype'), *((number, name) for name in names)]
    with torch.serialization.safe_globals(allowed):
        yield
