"""Atomic output: a file is there whole or not at all."""

from __future__ import annotations

import contextlib
import os
from typing import Any


def write_atomically(write: Any, path: str | os.PathLike[str]) -> None:
    """Call `write(temporary_path)`, then move the result to `path`: it is there whole or not at all.

    Raises:
        OSError: the file could not be written; nothing is left of it.
    """
    path = os.fspath(path)
    temporary = f'{path}.part{os.getpid()}'
    try:
        write(temporary)
        with open(temporary, 'rb') as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(os.path.dirname(path) or '.')
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def _sync_folder(folder: str) -> None:
    """Make a rename in `folder` last through a power failure, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
