"""Files and folders: atomic writes, checksums, locks, JSON that may be missing, messages for a full disk."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dsgformer_arch.utils.errors import UserError


def write_atomically(write: Callable[..., Any], path: str | os.PathLike[str]) -> None:
    """Call `write(temporary_path)`, then rename the result to `path`: a reader finds the whole file or none.

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
        sync_folder(os.path.dirname(path) or '.')
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_bytes(data: bytes, path: str | os.PathLike[str]) -> None:
    """Write a file atomically; see `write_atomically`."""
    write_atomically(lambda temporary: Path(temporary).write_bytes(data), path)


def write_text(text: str, path: str | os.PathLike[str]) -> None:
    """Write a text file in UTF-8 atomically; see `write_atomically`."""
    write_bytes(text.encode('utf-8'), path)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make renames in `folder` survive a power failure, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object of a file; empty if the file is missing, damaged or holds something else."""
    try:
        found = json.loads(Path(path).read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextlib.contextmanager
def locked(folder: Path, out: Path) -> Iterator[None]:
    """Lock an existing folder for this process; the system releases the lock however the process ends.

    Args:
        folder: the folder.
        out: what the message names as in use.

    Raises:
        UserError: another process holds the lock, or has just removed the folder.
        OSError: the folder cannot be opened.
    """
    import fcntl  # Windows has none; only commands that make data sets lock folders

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.path.samestat(os.fstat(handle), folder.stat())
        except (BlockingIOError, FileNotFoundError):
            held = False
        if not held:
            raise UserError(f'another run is writing to {out}; wait for it to end, or give another folder')
        yield
    finally:
        os.close(handle)


def disk_is_full(error: OSError) -> bool:
    """Whether a write failed for lack of space or quota."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def cannot_write(what: str, error: OSError) -> UserError:
    """The error for output that could not be written.

    Args:
        what: what was to be written and where, such as `'to results'`.
        error: why not.
    """
    advice = 'free some space or give another folder' if disk_is_full(error) else 'give another folder'
    return UserError(f'cannot write {what} ({error.strerror}); {advice}')
