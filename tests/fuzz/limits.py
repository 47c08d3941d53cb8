"""What one input may cost: processor time, and memory on top of what the process had before."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import psutil

SECONDS = 5.0
"""Of processor time, so that other programs on the machine do not count."""
MEMORY = 512 << 20
"""Bytes of resident memory at the peak."""


class FindingError(AssertionError):
    """An input was answered with something else than data or the documented error, or was too expensive."""


def examine(read: Callable[[bytes], None], data: bytes, allowed: type[Exception]) -> None:
    """Read one input within the limits.

    Args:
        read: the code under test.
        data: the input.
        allowed: the documented error.

    Raises:
        FindingError: another exception, no message or one that cannot be printed, more than `SECONDS`, or
            more than `MEMORY`.
    """
    before, start = _reset_peak(), time.process_time()
    try:
        read(data)
    except allowed as error:
        _check_message(error)
        _check_cause(error)
    except Exception as error:
        raise FindingError(f'{type(error).__name__}: {error}') from error
    seconds, grown = time.process_time() - start, _peak() - before
    if seconds > SECONDS:
        raise FindingError(f'{seconds:.1f} seconds for {len(data)} bytes')
    if grown > MEMORY:
        raise FindingError(f'{grown >> 20} MiB for {len(data)} bytes')


def _check_message(error: Exception) -> None:
    message = str(error)
    if not message:
        raise FindingError(f'{type(error).__name__} without a message') from error
    try:
        message.encode('utf-8')
    except UnicodeEncodeError:
        raise FindingError(f'a message that no terminal can print: {message[:200]!r}') from error
    if '\0' in message:
        raise FindingError(f'a message with a null character: {message[:200]!r}') from error


def _check_cause(error: BaseException) -> None:
    """An error that stands for a failed allocation: the memory was asked for, though it was not there."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or "can't allocate memory" in str(cause):
            raise FindingError(f'memory ran out: {str(cause)[:200]}') from error
        cause = cause.__cause__ or cause.__context__


def _reset_peak() -> int:
    """Start the peak of the resident memory anew (Linux); return what is resident now, in bytes."""
    with contextlib.suppress(OSError):
        Path('/proc/self/clear_refs').write_text('5', encoding='ascii')
    return int(psutil.Process().memory_info().rss)


def _peak() -> int:
    """Peak of the resident memory since `_reset_peak`, in bytes."""
    try:
        status = Path('/proc/self/status').read_text(encoding='ascii')
    except OSError:  # no Linux
        return int(psutil.Process().memory_info().rss)
    return int(status.partition('VmHWM:')[2].split(maxsplit=1)[0]) << 10
