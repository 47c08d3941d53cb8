"""Safe opening of LMDBs that may be truncated or other files.

LMDB maps `data.mdb` into memory and trusts its pages.  If the file is shorter than they say, or a page is
damaged, reading ends the process with SIGBUS or SIGSEGV.  `check_lmdb` reads the pages that hold the keys, a
few for each thousand images, before LMDB does.
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path
from typing import Any

import lmdb

from dsgformer_arch.data.meta_info import check_key
from dsgformer_arch.utils.errors import UserError

DATA = 'data.mdb'

# Offsets in a meta page of a 64-bit LMDB (lmdb 0.9, mdb.c: MDB_page, MDB_meta and MDB_db).
MAGIC_AT, PAGE_SIZE_AT, MAIN_AT, LAST_PAGE_AT = 16, 40, 88, 136
MAGIC = struct.pack('=II', 0xBEEFC0DE, 1)
PAGE_SIZES = [2**power for power in range(9, 17)]
NO_PAGE = 2**64 - 1
PAGE_HEADER, NODE_HEADER = 16, 8
BRANCH, LEAF, OVERFLOW = 1, 2, 4
"""Flags of a page: nodes that lead to other pages, nodes with keys and values, a large value."""
LARGE_VALUE = 1
"""Flag of a node whose value is on pages of its own."""
MOST_LEVELS = 32
AGAIN = 'make it again with tools/create_lmdb.py'


def check_lmdb(folder: str | os.PathLike[str]) -> None:
    """Check that `data.mdb` is an LMDB's, as long as its meta pages say, and that its keys can be read.

    Values are not read.

    Raises:
        UserError: it is not, or a page is damaged.
    """
    path = Path(folder, DATA)
    try:
        with open(path, 'rb') as file:
            size = os.fstat(file.fileno()).st_size
            meta = [file.read(LAST_PAGE_AT + 16)]
            page = struct.unpack_from('=I', meta[0].ljust(PAGE_SIZE_AT + 4, b'\0'), PAGE_SIZE_AT)[0]
            if page in PAGE_SIZES:
                file.seek(page)
                meta.append(file.read(LAST_PAGE_AT + 16))
    except OSError as error:
        raise UserError(f'{folder} is not a finished LMDB ({DATA}: {error.strerror}); {AGAIN}') from None
    if size == 0:
        raise UserError(f'the LMDB {folder} is empty; {AGAIN}')
    if len(meta) < 2 or any(part[MAGIC_AT : MAGIC_AT + 8] != MAGIC for part in meta):
        raise UserError(f'{path} is not an LMDB, or its beginning is damaged; {AGAIN}')
    if any(len(part) < LAST_PAGE_AT + 16 for part in meta):
        raise UserError(f'{path} is truncated; {AGAIN}')
    # The newer one counts; of two that are equally new, LMDB takes the first.
    newest = max(meta, key=lambda part: struct.unpack_from('=Q', part, LAST_PAGE_AT + 8)[0])
    last_page = struct.unpack_from('=Q', newest, LAST_PAGE_AT)[0]
    if (last_page + 1) * page > size:
        whole = (last_page + 1) * page
        raise UserError(f'{path} is truncated: it has {size} of its {whole} bytes; {AGAIN}')
    with open(path, 'rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            _check_tree(data, newest, page, last_page)
        except (_DamagedError, struct.error):
            raise UserError(f'{path} is damaged: a page of its keys cannot be read; {AGAIN}') from None


class _DamagedError(Exception):
    """A page is not as LMDB writes it."""


def _check_tree(data: mmap.mmap, meta: bytes, size: int, last: int) -> None:
    """Check all pages that reading the keys visits (lmdb 0.9, mdb.c: MDB_page, MDB_node, mdb_page_search).

    Args:
        data: the file.
        meta: its newest meta page.
        size: bytes of a page.
        last: number of the last page.
    """
    (flags, depth), root = struct.unpack_from('=HH', meta, MAIN_AT + 4), meta[MAIN_AT + 40 : MAIN_AT + 48]
    above = [struct.unpack('=Q', root)[0]]
    if above == [NO_PAGE]:
        return
    _require(flags == 0 and 0 < depth <= MOST_LEVELS)
    seen: set[int] = set()
    for level in range(1, depth + 1):
        below = []
        for number in above:
            _require(1 < number <= last and number not in seen)
            seen.add(number)
            start = number * size
            _, kind, lower, upper = struct.unpack_from('=HHHH', data, start + 8)
            _require(kind == (LEAF if level == depth else BRANCH))
            _require(PAGE_HEADER < lower <= upper <= size and lower % 2 == 0)
            count = (lower - PAGE_HEADER) // 2
            _require(count > 1 or kind == LEAF)  # LMDB aborts the process otherwise
            for at in struct.unpack_from(f'={count}H', data, start + PAGE_HEADER):
                _require(upper <= at <= size - NODE_HEADER)
                low, high, node, key = struct.unpack_from('=HHHH', data, start + at)
                end = at + NODE_HEADER + key
                _require(end <= size)
                if kind == BRANCH:
                    below.append(low | high << 16 | node << 32)
                    continue
                _require(node in (0, LARGE_VALUE))
                length = low | high << 16
                _require(end + (8 if node else length) <= size)
                if node:
                    first = struct.unpack_from('=Q', data, start + end)[0]
                    _require(1 < first <= last)
                    pages = -(-(PAGE_HEADER + length) // size)
                    large, stated = struct.unpack_from('=2xHI', data, first * size + 8)
                    _require(large == OVERFLOW and pages <= stated <= last + 1 - first)
        above = below


def _require(sound: bool) -> None:
    if not sound:
        raise _DamagedError


def open_lmdb(folder: str | os.PathLike[str]) -> lmdb.Environment:
    """Open an LMDB for reading, without locks, after `check_lmdb`.

    Raises:
        UserError: it is not an LMDB, truncated, or damaged.
    """
    check_lmdb(folder)
    try:
        # Read-ahead does not help random crops of a large set.
        return lmdb.open(os.fspath(folder), readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise UserError(f'the LMDB {folder} cannot be opened ({error}); {AGAIN}') from None


_open: dict[str, tuple[tuple[int, ...], lmdb.Environment]] = {}
"""LMDBs opened by `environment`, by absolute path, with the identity of the file."""


def environment(folder: str) -> lmdb.Environment:
    """The open LMDB, one per file and process: LMDB refuses to open a file twice.

    Forked workers share that of their parent, which without locks is only a memory map.  A folder that was
    replaced is opened again.

    Raises:
        UserError: as `open_lmdb`.
    """
    path = os.path.abspath(folder)
    try:
        file = os.stat(os.path.join(path, 'data.mdb'))
    except OSError:
        file = None
    identity = (file.st_dev, file.st_ino, file.st_mtime_ns) if file else ()
    former = _open.get(path)
    if former is None or former[0] != identity:
        if former is not None:
            del _open[path]
            former[1].close()
        _open[path] = identity, open_lmdb(path)
    return _open[path][1]


def read_value(transaction: Any, key: str, folder: str | os.PathLike[str]) -> Any:
    """The value of a key, as the transaction's buffer.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    try:
        stored = transaction.get(key.encode('utf-8'))
    except lmdb.Error as error:
        raise UserError(f'{folder}: the image {key} cannot be read ({error}); {AGAIN}') from None
    if stored is None:
        raise UserError(f'{folder} has no image {key}, though its meta_info.txt lists it; {AGAIN}')
    if not len(stored):
        raise UserError(f'{folder}: the image {key} is empty; {AGAIN}')
    return stored


def keys_of(folder: str | os.PathLike[str], opened: lmdb.Environment) -> list[str]:
    """All keys of an LMDB, sorted.

    Raises:
        UserError: a key is not a relative path (see `meta_info.check_key`).
    """
    keys = []
    try:
        with opened.begin() as transaction:
            for stored in transaction.cursor().iternext(values=False):
                key = bytes(stored).decode('utf-8', 'backslashreplace')
                check_key(key, str(folder))
                keys.append(key)
    except lmdb.Error as error:
        raise UserError(f'the LMDB {folder} cannot be read ({error}); {AGAIN}') from None
    return sorted(keys)
