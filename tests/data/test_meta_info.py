"""meta_info.txt: one parser, which refuses what would be read or written elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsgformer_arch.data import meta_info
from dsgformer_arch.data.meta_info import Entry
from dsgformer_arch.utils.errors import UserError

KEYS = st.text(st.sampled_from('abzAZ019_-'), min_size=1, max_size=40)


def test_what_basicsr_writes_is_read() -> None:
    lines = ['baboon.png (120,125,3) 1', 'sub/folder_2.png (480,500,1) 9']
    assert meta_info.parse(lines, 'meta_info.txt') == {
        'baboon': Entry('baboon', 120, 125, 3, 1),
        'sub/folder_2': Entry('sub/folder_2', 480, 500, 1, 9),
    }


@given(
    st.lists(
        st.builds(
            Entry, KEYS, st.integers(1, 2**16), st.integers(1, 2**16), st.integers(1, 4), st.integers(0, 9)
        ),
        unique_by=lambda entry: entry.key,
    )
)
def test_round_trip(entries: list[Entry]) -> None:
    text = ''.join(entry.line() for entry in entries)
    assert list(meta_info.parse(text.splitlines(), 'x').values()) == entries


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        entries = meta_info.parse(text.splitlines(), 'x')
    except UserError:
        return
    assert len(entries) == len(text.splitlines())


@given(st.text(st.sampled_from('a./\\:~ \n\0é'), min_size=1, max_size=9))
def test_no_key_leads_out_of_a_folder(key: str) -> None:
    try:
        entries = meta_info.parse([f'{key}.png (4,4,3) 1'], 'x')
    except UserError:
        return
    folder = Path('/data/results')
    for accepted in entries:
        assert (folder / f'{accepted}.png').resolve().is_relative_to(folder)


@pytest.mark.parametrize(
    ('line', 'word'),
    [
        ('/etc/passwd.png (4,4,3) 1', 'not a relative path'),
        ('a/../../b.png (4,4,3) 1', 'unreadable'),
        ('a//b.png (4,4,3) 1', 'not a relative path'),
        ('a\\b.png (4,4,3) 1', 'not a relative path'),
        ('C:/b.png (4,4,3) 1', 'not a relative path'),
        ('a\x07.png (4,4,3) 1', 'not a relative path'),
        (f'{"a" * 600}.png (4,4,3) 1', 'not a relative path'),
        ('a.png (0,4,3) 1', 'impossible size'),
        ('a.png (4,999999,3) 1', 'impossible size'),
        ('a.png (4,4,9) 1', 'impossible size'),
        (f'a.png ({"9" * 5000},4,3) 1', 'unreadable'),
        ('a.png (4,4) 1', 'unreadable'),
        ('a.png (4,4,3)', 'unreadable'),
        ('a (4,4,3) 1', 'unreadable'),
        ('', 'unreadable'),
    ],
)
def test_refused_lines(line: str, word: str) -> None:
    with pytest.raises(UserError, match=f'x, line 2.*{word}'):
        meta_info.parse(['ok.png (4,4,3) 1', line], 'x')


def test_key_that_occurs_twice() -> None:
    with pytest.raises(UserError, match='second time'):
        meta_info.parse(['a.png (4,4,3) 1', 'a.png (4,4,3) 1'], 'x')


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='cannot be read'):
        meta_info.read(tmp_path)
    (tmp_path / meta_info.NAME).write_bytes(b'\xff\xfe\x00')
    with pytest.raises(UserError, match='not text'):
        meta_info.read(tmp_path)
