"""`meta_info.txt`, the list of an LMDB's images: one line `<key>.png (<height>,<width>,<channels>) <level>`.

BasicSR defines the format (`basicsr.utils.lmdb_util`).  This is its only reader and writer here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dsgformer_arch.utils.errors import UserError

NAME = 'meta_info.txt'

MAX_BYTES = 256 * 2**20
"""Four million lines."""
MAX_SIDE = 2**16
KEY_LENGTH = 511
"""LMDB's own limit, in bytes."""

LINE = re.compile(r'([^.]+)\.([A-Za-z0-9]+) \(([0-9]{1,6}),([0-9]{1,6}),([0-9]{1,2})\) ([0-9]{1,3})')


@dataclass(frozen=True)
class Entry:
    """One image: its key, its size in pixels, its channels, and the level it was compressed with."""

    key: str
    height: int
    width: int
    channels: int
    level: int = 1

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.height, self.width

    def line(self) -> str:
        """The line of the file, with its line feed."""
        return f'{self.key}.png ({self.height},{self.width},{self.channels}) {self.level}\n'


def read(folder: str | os.PathLike[str]) -> dict[str, Entry]:
    """The images of an LMDB by key, in the file's order.

    Args:
        folder: the LMDB.

    Raises:
        UserError: the file is missing, too large, no text, or has a line that is refused (see `parse`).
    """
    path = Path(folder, NAME)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f'{path} has more than {MAX_BYTES >> 20} MiB; make the LMDB again')
        text = path.read_text('utf-8')
    except (OSError, ValueError) as error:
        reason = getattr(error, 'strerror', None) or 'it is not text'
        raise UserError(f'{path} cannot be read ({reason}); make the LMDB again') from None
    return parse(text.splitlines(), str(path))


def parse(lines: Iterable[str], path: str) -> dict[str, Entry]:
    """The images of `meta_info.txt`, by key.

    Args:
        lines: the file's lines.
        path: its name, for messages.

    Raises:
        UserError: a line has another form, an impossible size, or a key that occurs twice or cannot be a
            relative path: restored images are saved under their keys.
    """
    entries: dict[str, Entry] = {}
    for number, line in enumerate(lines, 1):
        where = f'{path}, line {number}'
        found = LINE.fullmatch(line)
        if found is None:
            raise UserError(f'{where} is unreadable: {line[:80]!r}; make the LMDB again')
        key = found[1]
        check_key(key, where)
        height, width, channels, level = (int(group) for group in found.groups()[2:])
        if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE and 0 < channels <= 4):
            raise UserError(f'{where} gives {key} the impossible size {width}×{height}, {channels} channels')
        if key in entries:
            raise UserError(f'{where} names {key} a second time; make the LMDB again')
        entries[key] = Entry(key, height, width, channels, level)
    return entries


def check_key(key: str, where: str) -> None:
    """Refuse a key that is not a relative path below a folder.

    Raises:
        UserError: it is empty, too long, absolute, holds `..`, a backslash or a control character.
    """
    parts = key.split('/')
    if (
        not key.isprintable()
        or len(key.encode('utf-8', 'replace')) > KEY_LENGTH
        or '\\' in key
        or ':' in parts[0]
        or any(part in ('', '.', '..') for part in parts)
    ):
        raise UserError(
            f'{where} has the key {key[:80]!r}, which is not a relative path; '
            'make the LMDB again with other names'
        )
