"""Safe opening of LMDBs that may be truncated or other files.

LMDB maps `data.mdb` into memory and trusts its first two pages, the meta pages.  If the file is shorter than
they say, reading ends the process with SIGBUS.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import lmdb

from dsgformer_arch.data.meta_info import check_key
from dsgformer_arch.utils.errors import UserError

DATA = 'data.mdb'

# Offsets in a meta page of a 64-bit LMDB (lmdb 0.9, mdb.c: MDB_page, MDB_meta and MDB_db).
MAGIC_AT, PAGE_SIZE_AT, LAST_PAGE_AT = 16, 40, 136
MAGIC = struct.pack('=II', 0xBEEFC0DE, 1)
PAGE_SIZES = [2**power for power in range(9, 17)]
AGAIN = 'make it again with tools/create_lmdb.py'


def check_lmdb(folder: str | os.PathLike[str]) -> None:
    """Check that `data.mdb` is an LMDB's, and as long as its meta pages say.

    Raises:
        UserError: it is not.
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
        raise UserError(f'{folder} is no finished LMDB ({DATA}: {error.strerror}); {AGAIN}') from None
    if size == 0:
        raise UserError(f'the LMDB {folder} is empty; {AGAIN}')
    if len(meta) < 2 or any(part[MAGIC_AT : MAGIC_AT + 8] != MAGIC for part in meta):
        raise UserError(f'{path} is no LMDB, or its beginning is damaged; {AGAIN}')
    if any(len(part) < LAST_PAGE_AT + 16 for part in meta):
        raise UserError(f'{path} is truncated; {AGAIN}')
    last_page, _ = max((struct.unpack_from('=QQ', part, LAST_PAGE_AT) for part in meta), key=lambda m: m[1])
    if (last_page + 1) * page > size:
        whole = (last_page + 1) * page
        raise UserError(f'{path} is truncated: it has {size} of its {whole} bytes; {AGAIN}')


def open_lmdb(folder: str | os.PathLike[str]) -> lmdb.Environment:
    """Open an LMDB for reading, without locks, after `check_lmdb`.

    Raises:
        UserError: it is no LMDB, truncated, or damaged.
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
        UserError: a key is no relative path (see `meta_info.check_key`).
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
