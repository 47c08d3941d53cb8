"""LMDBs that are truncated, empty or none are refused before they are mapped into memory."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import lmdb
import numpy as np
import pytest

from dsgformer_arch.data import lmdb_files
from dsgformer_arch.utils.errors import UserError
from tests.trees import random_image, write_lmdb


@pytest.fixture
def database(tmp_path: Path) -> Path:
    folder = tmp_path / 'a.lmdb'
    write_lmdb(folder, {f'image-{i}': random_image(i, 64, 64) for i in range(4)})
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
        with pytest.raises(UserError, match=r'empty|truncated|not an LMDB'):
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
    with pytest.raises(UserError, match='not an LMDB'):
        lmdb_files.open_lmdb(database)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='not a finished LMDB'):
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
    with lmdb_files.open_lmdb(database) as opened, pytest.raises(UserError, match='not a relative path'):
        lmdb_files.keys_of(database, opened)


def test_a_folder_that_was_replaced_is_opened_again(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another folder has the same relative path, from another working directory."""
    monkeypatch.chdir(database.parent)
    first = lmdb_files.environment(database.name)
    assert lmdb_files.environment(str(database)) is first
    database.rename(database.parent / 'old')
    write_lmdb(database, {'other': np.zeros((8, 8, 3), np.uint8)})
    with lmdb_files.environment(database.name).begin() as transaction:
        assert lmdb_files.read_value(transaction, 'other', database)


def deep(folder: Path) -> Path:
    """An LMDB of three levels of pages: long keys, small values."""
    with lmdb.open(str(folder), map_size=1 << 24) as opened, opened.begin(write=True) as transaction:
        for i in range(400):
            transaction.put(b'%0500d' % i, b'x' * 10)
    return folder


def test_sound_trees_of_any_depth_are_opened(tmp_path: Path) -> None:
    with lmdb_files.open_lmdb(deep(tmp_path / 'deep.lmdb')) as opened:
        assert opened.stat()['depth'] >= 3
        assert len(lmdb_files.keys_of('deep', opened)) == 400
    with lmdb.open(str(tmp_path / 'empty.lmdb'), map_size=1 << 20) as opened:
        pass
    lmdb_files.check_lmdb(tmp_path / 'empty.lmdb')


READ_ALL = """
import sys
from dsgformer_arch.data import lmdb_files
from dsgformer_arch.utils.errors import UserError
for folder in sys.argv[1:]:
    try:
        with lmdb_files.open_lmdb(folder) as opened, opened.begin(buffers=True) as transaction:
            for key in lmdb_files.keys_of(folder, opened):
                bytes(lmdb_files.read_value(transaction, key, folder))
    except UserError:
        pass
print('alive')
"""


def test_damaged_pages_do_not_end_the_process(database: Path, tmp_path: Path) -> None:
    """Found by fuzzing: LMDB believed any page number and offset, and read outside the file."""
    rng = np.random.default_rng(0)
    folders = []
    for source in (database, deep(tmp_path / 'deep.lmdb')):
        whole = (source / 'data.mdb').read_bytes()
        for number in range(60):
            changed = bytearray(whole)
            for at in rng.integers(0, len(whole) // 4096, 3) * 4096 + rng.integers(0, 64, 3):
                changed[at] = rng.choice([0, 1, 2, 127, 255])
            folder = tmp_path / f'{source.stem}-{number}.lmdb'
            folder.mkdir()
            (folder / 'data.mdb').write_bytes(changed)
            folders.append(str(folder))
    done = subprocess.run(
        [sys.executable, '-c', READ_ALL, *folders], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, 'alive\n'), done.stderr[-2000:]


def test_a_page_that_leads_to_itself_is_refused(tmp_path: Path) -> None:
    folder = deep(tmp_path / 'deep.lmdb')
    data = bytearray((folder / 'data.mdb').read_bytes())
    root = max(struct.unpack_from('=QQ', data, page + 128)[0] for page in (0, 4096) if data[page + 144])
    first = struct.unpack_from('=H', data, root * 4096 + 16)[0]
    struct.pack_into('=HHH', data, root * 4096 + first, root, 0, 0)
    (folder / 'data.mdb').write_bytes(data)
    with pytest.raises(UserError, match='damaged: a page of its keys'):
        lmdb_files.check_lmdb(folder)
