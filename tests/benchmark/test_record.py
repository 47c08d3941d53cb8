from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from dsgformer_arch.benchmark import record as records
from dsgformer_arch.benchmark.render import output
from dsgformer_arch.utils.errors import UserError
from tests.benchmark.conftest import make


def test_a_record_reads_back_as_it_was_written(tmp_path: Path) -> None:
    record = make('speed')
    record.save(tmp_path / 'new' / 'speed.json')
    assert records.Record.load(tmp_path / 'new' / 'speed.json') == record
    assert os.listdir(tmp_path / 'new') == ['speed.json']


def test_what_json_cannot_hold_is_not_written(tmp_path: Path) -> None:
    record = make('speed')
    record.save(tmp_path / 'speed.json')
    before = (tmp_path / 'speed.json').read_text()
    record.rows[0]['latency_ms'] = float('nan')
    with pytest.raises(ValueError, match='JSON'):
        record.save(tmp_path / 'speed.json')
    assert (tmp_path / 'speed.json').read_text() == before


@pytest.mark.parametrize('content', ['', '{', '[]', '{"kind": "speed"}', '3'])
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / 'x.json'
    path.write_text(content)
    with pytest.raises(UserError, match=r'x\.json is not a result'):
        records.Record.load(path)
    with pytest.raises(UserError, match=r'cannot read .*none\.json'):
        records.Record.load(tmp_path / 'none.json')


def test_resume_takes_up_the_rows_of_the_same_settings_only(tmp_path: Path) -> None:
    path = tmp_path / 'r.json'
    first = records.start('speed', {'models': ['a'], 'sizes': [(1, 2)]}, 'p', path, resume=True)
    assert first.rows == []
    first.rows.append({'model': 'a'})
    first.save(path)
    again = records.start('speed', {'models': ['a'], 'sizes': [(1, 2)]}, 'p', path, resume=True)
    assert again.rows == [{'model': 'a'}]
    assert records.start('speed', {'models': ['a'], 'sizes': [(1, 2)]}, 'p', path, resume=False).rows == []
    with pytest.raises(UserError, match=r'other settings \(models\)'):
        records.start('speed', {'models': ['b'], 'sizes': [(1, 2)]}, 'p', path, resume=True)
    with pytest.raises(UserError, match=r'other settings \(training\)'):
        records.start('training', {'models': ['a'], 'sizes': [(1, 2)]}, 'p', path, resume=True)


def test_what_failed_is_forgotten_on_request() -> None:
    record = make('speed', rows=[{'model': 'a', 'error': 'x'}, {'model': 'b', 'error': None}, {'model': 'c'}])
    record.drop_failed()
    assert [row['model'] for row in record.rows] == ['b', 'c']
    assert record.find(model='c') == {'model': 'c'}
    assert record.find(model='a') is None


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match=r'cannot write .*--out'):
        records.start('speed', {}, 'p', tmp_path / 'file' / 'r.json', resume=False)
    (tmp_path / 'folder.md').mkdir()
    with pytest.raises(UserError, match=r'cannot write .*folder\.md'):
        records.write_text(tmp_path / 'folder.md', 'x')


def test_the_command_can_be_typed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, 'argv', ['/some/where/tools/benchmark.py', 'speed', '--out', "a b's"])
    command = records.command_line()
    assert command.startswith('python tools/benchmark.py speed --out ')
    import shlex

    assert shlex.split(command)[2:] == ['speed', '--out', "a b's"]


def test_a_page_states_how_the_numbers_were_made() -> None:
    page = output.markdown_page('Title', make('speed'), ['part'])
    assert page.startswith('# Title\n\npart\n\n')
    for fact in (
        '--x',
        'protocol of speed',
        'Imaginary <9000>',
        '2026-01-02',
        'torch 2.9',
        'commit abc',
        'avx2',
    ):
        assert fact in page


def test_cells_without_a_value_stay_empty() -> None:
    table = output.markdown_table({'a': 'A', 'b': 'B'}, [{'a': 'x'}, {'a': 'y', 'b': '0'}])
    assert table.splitlines() == ['| A | B |', '|---|---:|', '| x |  |', '| y | 0 |']


def test_names_of_results_and_data() -> None:
    assert records.beside(Path('r/v1.2'), '.json') == Path('r/v1.2.json')
    assert records.data_name('/data/GOPRO_Large/test') == 'GOPRO_Large/test'
    assert records.data_name('/sample') == 'sample'
    assert records.data_name('../x') == 'x'


def test_the_environment_can_be_stored() -> None:
    environment = records.environment()
    assert json.loads(json.dumps(environment)) == environment
    assert environment['packages']['torch']
    assert environment['threads'] >= 1
