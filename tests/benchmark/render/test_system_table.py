"""The README's table is made, not typed."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsgformer_arch import zoo
from dsgformer_arch.benchmark.render import system_table
from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.zoo.systems import Reported

README = Path(__file__).resolve().parents[3] / 'README.md'


def test_a_row_says_what_is_known_of_a_system() -> None:
    cells = dict(zip(system_table.COLUMNS, system_table.row(zoo.get('nafnet32')), strict=True))
    assert cells['system'] == '`nafnet32`'
    assert cells['paper'] == '[Chen et al., ECCV 2022](https://arxiv.org/abs/2204.04676)'
    assert cells['parameters'] == '17.11 M'
    assert cells['pads to multiples of'] == '16'
    assert cells['TLC'] == 'yes'
    assert cells['GoPro'] == '32.85 / 0.960'
    assert cells['Rain100L'] == ''


def test_least_sizes_are_listed_next_to_multiples() -> None:
    assert system_table.padding(zoo.get('convir_s')) == '32, at least 256'
    assert system_table.padding(zoo.get('restormer')) == '8'


def test_results_without_ssim_are_psnr_alone() -> None:
    reported = (Reported('GoPro', 33.19, None, '', 'somewhere'),)
    assert system_table.result(reported, 'GoPro') == '33.19'
    assert system_table.result(reported, 'HIDE') == ''


def test_only_text_between_the_markers_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_table, 'table', lambda: '| new |')
    readme = tmp_path / 'README.md'
    readme.write_text(f'before\n{system_table.BEGIN}\n| old |\n{system_table.END}\nafter\n')
    assert system_table.rewrite(readme)
    assert readme.read_text() == f'before\n{system_table.BEGIN}\n| new |\n{system_table.END}\nafter\n'
    assert not system_table.rewrite(readme)


def test_files_without_markers_are_refused(tmp_path: Path) -> None:
    readme = tmp_path / 'README.md'
    readme.write_text(f'{system_table.END}{system_table.BEGIN}')
    with pytest.raises(UserError, match='in this order'):
        system_table.rewrite(readme)
    with pytest.raises(UserError, match='cannot read'):
        system_table.rewrite(tmp_path / 'absent.md')


@pytest.mark.long
def test_the_readme_has_the_table_as_it_is_made_now() -> None:
    assert f'{system_table.BEGIN}\n{system_table.table()}\n{system_table.END}' in README.read_text('utf-8')
