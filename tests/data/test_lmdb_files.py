"""LMDBs that are truncated, empty or none are refused before they are mapped into memory."""

from __future__ import annotations

from pathlib import Path

import lmdb
import numpy as np
import pytest

from dsgformer_arch.data import lmdb_files
from dsgformer_arch.utils.errors import UserError
from tests.trees import photograph, write_lmdb


@pytest.fixture
def database(tmp_path: Path) -> Path:
    folder = tmp_path / 'a.lmdb'
    write_lmdb(folder, {f'image-{i}': photograph(i, 64, 64) for i in range(4)})
    return folder


def test_whole_one_is_opened(database: Path) -> None:
    with lmdb_files.open_lmdb(database) as opened:
        assert lmdb_files.keys_of(database, opened) == [f'image-{i}' for i in range(4)]
        with opened.begin() as transaction:
            assert lmdb_files.read_value(transaction, 'image-2', database)[1:4] == b'PNG'


def test_every_truncation_is_refused(database: Path) -> None:
    """Reading the missing pages would end the process with SIGBUS."""
    data = database / 'data.mdb'
    whole = data.read_bytes()
    for length in [*range(0, 200, 7), *range(200, len(whole), 1021), len(whole) - 1]:
        data.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r'empty|truncated|no LMDB'):
            lmdb_files.open_lmdb(database)


def test_newest_meta_page_counts(database: Path) -> None:
    """A commit that only the second meta page knows of makes the file longer."""
    with lmdb.open(str(database), map_size=1 << 26) as opened:
        for number in range(3):
            with opened.begin(write=True) as transaction:
                transaction.put(f'more-{number}'.encode(), bytes(50_000))
            lmdb_files.check_lmdb(database)


@pytest.mark.parametrize('content', [b'x', b'x' * 20_000, bytes(20_000), b'\x89PNG' * 9000])
def test_garbage(content: bytes, database: Path) -> None:
    (database / 'data.mdb').write_bytes(content)
    with pytest.raises(UserError, match='no LMDB'):
        lmdb_files.open_lmdb(database)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='no finished LMDB'):
        lmdb_files.open_lmdb(tmp_path)


def test_empty_and_missing_values(database: Path) -> None:
    with lmdb.open(str(database), map_size=1 << 26) as opened, opened.begin(write=True) as transaction:
        transaction.put(b'nothing', b'')
    with lmdb_files.open_lmdb(database) as opened, opened.begin() as transaction:
        with pytest.raises(UserError, match='nothing is empty'):
            lmdb_files.read_value(transaction, 'nothing', database)
        with pytest.raises(UserError, match='has no image other'):
            lmdb_files.read_value(transaction, 'other', database)


@pytest.mark.parametrize('key', ['/etc/passwd', '../up', 'a/../../b', 'a\\b'])
def test_keys_that_lead_elsewhere(key: str, database: Path) -> None:
    with lmdb.open(str(database), map_size=1 << 26) as opened, opened.begin(write=True) as transaction:
        transaction.put(key.encode(), np.zeros(9).tobytes())
    with lmdb_files.open_lmdb(database) as opened, pytest.raises(UserError, match='no relative path'):
        lmdb_files.keys_of(database, opened)
