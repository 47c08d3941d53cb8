from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dsgformer_arch import zoo
from dsgformer_arch.benchmark import commands
from dsgformer_arch.benchmark.measure import pairs as image_pairs
from dsgformer_arch.benchmark.measure import quality
from dsgformer_arch.benchmark.record import Record
from dsgformer_arch.benchmark.render import quality as render_quality
from dsgformer_arch.benchmark.render import report
from dsgformer_arch.metrics import perceptual
from dsgformer_arch.metrics.protocols import protocol, to_uint8
from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.zoo.checkpoint import CheckpointError
from tests.benchmark.conftest import Greedy, Hollow, make, quality_row, weights
from tests.trees import SHARED, random_image, write_lmdb, write_pairs


def rows_of(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    with open(path, newline='') as file:
        return {(row['model'], row['image']): row for row in csv.DictReader(file)}


def record_of(out: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(out.with_suffix('.json').read_text())
    return record


def measure(sample: Path, out: Path, *names: str, **more: Any) -> int:
    """Run on the two test pairs of the sample."""
    settings: dict[str, Any] = {'data': str(sample / 'test'), 'protocol': 'gopro', 'out': out}
    settings['weights'] = weights(out.parent / 'weights', *names)
    return commands.run('quality', list(names), **{**settings, **more})


def pair(index: int) -> tuple[np.ndarray, np.ndarray]:
    """A pair of the sample's test set, RGB: blurred and sharp."""
    sharp = random_image(50 + index, 40, 48)
    return cv2.blur(sharp, (7, 1))[..., ::-1], sharp[..., ::-1]


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put other networks behind the names of systems."""

    def put(**networks: nn.Module) -> None:
        monkeypatch.setattr(quality, 'load', lambda models, w, tlc: {name: networks[name] for name in models})

    return put


def test_every_number_equals_an_independent_computation(sample: Path, tmp_path: Path) -> None:
    out = tmp_path / 'r' / 'quality'
    assert measure(sample, out, 'tiny', 'tiny_nafnet') == 0
    rows = rows_of(out.with_suffix('.csv'))
    assert [*rows] == [(m, f'test-{i}') for m in ('blurred', 'tiny', 'tiny_nafnet') for i in range(2)]
    rules = protocol('gopro')
    for name in ('blurred', 'tiny', 'tiny_nafnet'):
        expected = []
        for i in range(2):
            blurred, sharp = pair(i)
            restored = blurred
            if name != 'blurred':
                network = zoo.load(tmp_path / 'r' / 'weights' / f'{name}.pth', name).eval()
                with torch.no_grad():
                    output = network(torch.from_numpy(blurred.copy()).permute(2, 0, 1)[None] / 255)
                restored = to_uint8(output)
            expected.append(rules.evaluate(restored, np.ascontiguousarray(sharp)))
            for column, value in expected[-1].items():
                assert float(rows[name, f'test-{i}'][column]) == pytest.approx(value, abs=1e-4)
        mean = next(row for row in record_of(out)['rows'] if row['model'] == name)
        for column in rules.columns:
            assert mean[column] == pytest.approx(np.mean([e[column] for e in expected]), abs=1e-4)
        assert (mean['images'], mean['failed'], mean['identical']) == (2, 0, 0)
    assert '| blurred | 2 |' in out.with_suffix('.md').read_text()
    assert cv2.imread(str(out.with_suffix('.png'))) is not None


def test_the_gain_is_over_the_blurred_images(sample: Path, tmp_path: Path) -> None:
    measure(sample, tmp_path / 'q', 'tiny')
    blurred, tiny = record_of(tmp_path / 'q')['rows']
    assert tiny['gain'] == pytest.approx(tiny['psnr'] - blurred['psnr'])
    assert tiny['gain_p10'] <= tiny['gain'] <= tiny['gain_p90']


def test_all_systems_get_bit_identical_inputs_and_cannot_spoil_them(
    sample: Path, tmp_path: Path, replaced: Any
) -> None:
    seen: dict[str, list[Tensor]] = {'tiny': [], 'tiny_nafnet': []}

    class Vandal(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: Tensor) -> Tensor:
            seen[self.name].append(x.clone())
            return x.mul_(0.5)

    replaced(**{name: Vandal(name) for name in seen})
    measure(sample, tmp_path / 'q', *seen)
    for i, (a, b) in enumerate(zip(*seen.values(), strict=True)):
        assert torch.equal(a, b)
        assert torch.equal(a[0], torch.from_numpy(pair(i)[0].copy()).permute(2, 0, 1) / 255)


def test_the_final_output_counts(sample: Path, tmp_path: Path, replaced: Any) -> None:
    class Stages(nn.Module):
        final_output = 0

        def forward(self, x: Tensor) -> list[Tensor]:
            return [x, torch.zeros_like(x), torch.ones_like(x)]

    replaced(tiny=Stages())
    measure(sample, tmp_path / 'q', 'tiny')
    blurred, stages = record_of(tmp_path / 'q')['rows']
    assert stages['psnr'] == blurred['psnr']


def test_real_gopro_data_in_its_own_layout(tmp_path: Path, replaced: Any) -> None:
    source = SHARED / 'data' / 'gopro_pair'
    if not source.is_dir():
        pytest.skip('the shared GoPro pair does not lie beside this checkout')
    for side in ('blur', 'sharp'):
        folder = tmp_path / 'GOPRO_Large' / 'test' / 'GOPR0000' / side
        folder.mkdir(parents=True)
        (folder / '000001.png').write_bytes((source / side / 'istanbul.png').read_bytes())
    replaced(tiny=nn.Identity())
    out = tmp_path / 'q'
    commands.run(
        'quality',
        ['tiny'],
        str(tmp_path / 'GOPRO_Large' / 'test'),
        'gopro',
        weights(tmp_path / 'w', 'tiny'),
        out=out,
    )
    blurred, same = record_of(out)['rows']
    assert round(blurred['psnr'], 2) == 24.05
    assert same['psnr'] == blurred['psnr']
    assert record_of(out)['settings']['data'] == 'GOPRO_Large/test'


def test_a_network_without_weights_is_refused(sample: Path, tmp_path: Path) -> None:
    given = weights(tmp_path / 'w', 'tiny')
    with pytest.raises(UserError, match='tiny_nafnet has no weights; give --weights tiny_nafnet=PATH'):
        commands.run(
            'quality', ['tiny', 'tiny_nafnet'], str(sample / 'test'), 'gopro', given, out=tmp_path / 'q'
        )
    with pytest.raises(UserError, match='names tiny, which is not among --models'):
        commands.run('quality', [], str(sample / 'test'), 'gopro', given, out=tmp_path / 'q')
    assert not (tmp_path / 'q.csv').exists()


def test_the_weights_of_another_system_are_refused(
    sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zoo, 'nearest', lambda state: ('tiny', 1.0))  # comparing with all takes long
    (_, path), *_ = weights(tmp_path / 'w', 'tiny')
    with pytest.raises(CheckpointError, match=r'tiny\.pth does not fit tiny_nafnet'):
        commands.run(
            'quality',
            ['tiny_nafnet'],
            str(sample / 'test'),
            'gopro',
            [('tiny_nafnet', path)],
            out=tmp_path / 'q',
        )


def test_other_bad_input(sample: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match='no protocol x'):
        measure(sample, tmp_path / 'q', 'tiny', protocol='x')
    with pytest.raises(UserError, match='--tile is 32'):
        measure(sample, tmp_path / 'q', 'tiny', tile=32)
    with pytest.raises(UserError, match='--device'):
        measure(sample, tmp_path / 'q', 'tiny', device='cuda:99')


def test_sizes_that_differ_are_found_before_anything_is_restored(tmp_path: Path, replaced: Any) -> None:
    class Never(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError('restored')

    replaced(tiny=Never())
    images = {f'{i}': random_image(i, 20, 20) for i in range(3)}
    write_lmdb(tmp_path / 'test_lq.lmdb', images)
    write_lmdb(tmp_path / 'test_gt.lmdb', {**images, '2': random_image(2, 20, 21)})
    with pytest.raises(UserError, match='image 2 has 20×20 pixels and its sharp partner 21×20'):
        measure(tmp_path, tmp_path / 'q', 'tiny')


def test_nan_fails_its_image_and_the_run_continues(
    tmp_path: Path, replaced: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    dark, light = (np.full((20, 24, 3), value, np.uint8) for value in (20, 200))
    write_lmdb(tmp_path / 'test_lq.lmdb', {'dark': dark, 'light': light})
    write_lmdb(tmp_path / 'test_gt.lmdb', {'dark': dark + 10, 'light': light + 10})
    replaced(tiny=Hollow(), tiny_nafnet=nn.Identity())
    assert measure(tmp_path, tmp_path / 'q', 'tiny', 'tiny_nafnet') == 1
    rows = rows_of(tmp_path / 'q.csv')
    assert 'NaN' in rows['tiny', 'dark']['error']
    assert rows['tiny', 'dark']['psnr'] == ''
    expected = 20 * math.log10(255 / 10)
    assert float(rows['tiny', 'light']['psnr']) == pytest.approx(expected)
    _, tiny, other = record_of(tmp_path / 'q')['rows']
    assert (tiny['images'], tiny['failed']) == (1, 1)
    assert tiny['psnr'] == pytest.approx(expected)
    assert (other['images'], other['failed']) == (2, 0)
    assert 'tiny, dark: ' in capsys.readouterr().err
    assert '1 failed: ' in (tmp_path / 'q.md').read_text()


def test_a_system_that_does_not_fit_in_memory_is_reported(
    sample: Path, tmp_path: Path, replaced: Any
) -> None:
    greedy = Greedy()
    replaced(tiny=greedy, tiny_nafnet=nn.Identity())
    calls = []
    greedy.register_forward_hook(lambda *_: calls.append(1), always_call=True)
    assert measure(sample, tmp_path / 'q', 'tiny', 'tiny_nafnet') == 1
    _, tiny, other = record_of(tmp_path / 'q')['rows']
    assert (tiny['images'], tiny['failed'], tiny['error']) == (0, 2, 'does not fit in memory')
    assert tiny['psnr'] is None
    assert tiny['gain'] is None
    assert (other['images'], other['failed']) == (2, 0)
    assert len(calls) == 1, 'an image of the same size is not tried again'


def test_equal_images_have_infinite_psnr_and_leave_the_mean_as_it_is(tmp_path: Path, replaced: Any) -> None:
    images = {'a': random_image(0, 20, 24), 'b': random_image(1, 20, 24)}
    write_lmdb(tmp_path / 'test_lq.lmdb', {'a': images['a'], 'b': cv2.blur(images['b'], (5, 1))})
    write_lmdb(tmp_path / 'test_gt.lmdb', images)
    replaced(tiny=nn.Identity())
    assert measure(tmp_path, tmp_path / 'q', 'tiny') == 0
    rows = rows_of(tmp_path / 'q.csv')
    assert rows['tiny', 'a']['psnr'] == 'inf'
    for row in record_of(tmp_path / 'q')['rows']:
        assert row['identical'] == 1
        assert row['psnr'] == pytest.approx(float(rows['tiny', 'b']['psnr']))
    assert 'infinite PSNR' in (tmp_path / 'q.md').read_text()


def test_resume_continues_where_the_run_was_interrupted(
    sample: Path, tmp_path: Path, replaced: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = nn.Identity()
    seen = []
    network.register_forward_hook(lambda *_: seen.append(1))
    replaced(tiny=network)
    out = tmp_path / 'q'
    whole = quality.measure

    def interrupted(*arguments: Any) -> Any:
        for count, row in enumerate(whole(*arguments), 1):
            yield row
            if count == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(quality, 'measure', interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(sample, out, 'tiny')
    monkeypatch.setattr(quality, 'measure', whole)
    with open(out.with_suffix('.csv'), 'a') as file:
        file.write('test-1,blurred,40,48,False,99')  # a line that was not written to its end
    assert measure(sample, out, 'tiny', resume=True) == 0
    assert len(seen) == 2
    rows = rows_of(out.with_suffix('.csv'))
    assert len(rows) == 4
    assert float(rows['blurred', 'test-1']['psnr']) < 60
    assert measure(sample, out, 'tiny', resume=True) == 0
    assert len(seen) == 2, 'nothing is restored again'
    assert measure(sample, out, 'tiny') == 0
    assert len(seen) == 4, 'without --resume it begins anew'


def test_resume_tries_again_what_failed(sample: Path, tmp_path: Path, replaced: Any) -> None:
    replaced(tiny=Greedy())
    assert measure(sample, tmp_path / 'q', 'tiny') == 1
    replaced(tiny=nn.Identity())
    assert measure(sample, tmp_path / 'q', 'tiny', resume=True) == 0
    assert record_of(tmp_path / 'q')['rows'][1]['images'] == 2


def test_resume_with_other_settings_is_refused(sample: Path, tmp_path: Path, replaced: Any) -> None:
    replaced(tiny=nn.Identity())
    measure(sample, tmp_path / 'q', 'tiny')
    with pytest.raises(UserError, match=r'other settings \(tile\)'):
        measure(sample, tmp_path / 'q', 'tiny', tile=64, resume=True)
    with pytest.raises(UserError, match=r'other settings \(data_sha256, images\)'):
        measure(sample, tmp_path / 'q', 'tiny', limit=1, resume=True)


def test_tiles_only_when_asked_and_then_reported(sample: Path, tmp_path: Path, replaced: Any) -> None:
    sizes: list[tuple[int, ...]] = []
    network = nn.Identity()
    network.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[-2:])))
    replaced(tiny=network)
    measure(sample, tmp_path / 'q', 'tiny')
    assert {*sizes} == {(40, 48)}
    assert record_of(tmp_path / 'q')['rows'][1]['in_tiles'] == 0
    sizes.clear()
    measure(sample, tmp_path / 'q', 'tiny', tile=40)
    assert {*sizes} == {(40, 40)}
    assert record_of(tmp_path / 'q')['rows'][1]['in_tiles'] == 2
    text = (tmp_path / 'q.md').read_text()
    assert '2 in tiles' in text
    assert 'tiles of 40×40 that overlap by 32' in text


def test_local_pooling_where_a_system_has_it(sample: Path, tmp_path: Path) -> None:
    measure(sample, tmp_path / 'a', 'tiny_nafnet')
    measure(sample, tmp_path / 'b', 'tiny_nafnet', tlc=16)
    without, pooled = (record_of(tmp_path / name)['rows'][1] for name in 'ab')
    assert pooled['tlc'] == 16
    assert without['tlc'] is None
    assert pooled['psnr'] != without['psnr']
    with pytest.raises(UserError, match='none of stripformer has local pooling'):
        quality.load(['stripformer'], {'stripformer': Path('x')}, tlc=16)


def test_images_are_kept_and_the_numbers_choose_what_the_report_shows(tmp_path: Path, replaced: Any) -> None:
    class Lift(nn.Module):
        """Right for image 1, far off for image 2, in between for image 0."""

        def forward(self, x: Tensor) -> Tensor:
            return x + 10 / 255

    sharp = {str(i): random_image(i, 300, 330) // 2 + 60 for i in range(3)}
    offsets = {'0': 12, '1': 10, '2': 3}
    write_lmdb(tmp_path / 'test_gt.lmdb', sharp)
    write_lmdb(tmp_path / 'test_lq.lmdb', {key: sharp[key] - offsets[key] for key in sharp})
    replaced(tiny=Lift())
    out = tmp_path / 'r' / 'quality'
    measure(tmp_path, out, 'tiny', save_images=True)
    kept = cv2.imread(str(out / 'tiny' / '0.png'))
    np.testing.assert_array_equal(kept, sharp['0'] - 2)
    assert rows_of(out.with_suffix('.csv'))['tiny', '1']['psnr'] == 'inf'
    examples = record_of(out)['extra']['examples']
    assert [(e['image'], e['why'].split(' of ')[0]) for e in examples] == [
        ('2', 'least gain'), ('0', 'median gain'), ('1', 'largest gain'),
    ]  # fmt: skip
    assert [*examples[0]['files']] == ['blurred', 'sharp', 'tiny']
    crops: Any = {v: cv2.imread(str(out.parent / file)) for v, file in examples[0]['files'].items()}
    assert {crop.shape for crop in crops.values()} == {(240, 320, 3)}
    np.testing.assert_array_equal(crops['sharp'] - 3, crops['blurred'])
    np.testing.assert_array_equal(crops['sharp'] + 7, crops['tiny'])


def test_metrics_of_pyiqa(
    sample: Path, tmp_path: Path, replaced: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, 'pyiqa', None)
    perceptual.create.cache_clear()
    with pytest.raises(UserError, match='pip install pyiqa'):
        measure(sample, tmp_path / 'q', 'tiny', metrics=['lpips'])

    class Darkness:
        metric_mode = 'NR'
        lower_better = True

        def __call__(self, image: Tensor) -> float:
            return 1 - float(image.mean())

    monkeypatch.setattr(perceptual, 'create', lambda name: Darkness())
    replaced(tiny=nn.Identity())
    measure(sample, tmp_path / 'q', 'tiny', metrics=['darkness'])
    row = record_of(tmp_path / 'q')['rows'][1]
    assert row['darkness'] == pytest.approx(
        1 - np.mean([pair(i)[0].mean() for i in range(2)]) / 255, abs=1e-5
    )
    assert 'darkness ↓' in (tmp_path / 'q.md').read_text()


def test_a_mean_over_nothing_is_an_empty_cell() -> None:
    record = make('quality')
    row = quality_row('tiny', None, images=0, failed=2, error='does not fit in memory', gain=None)
    record.rows = [quality_row('blurred', 25.0), row]
    line = render_quality.RENDERING.table(record).splitlines()[-1]
    assert line.startswith('| tiny | 0 |  | 0.9')
    assert '2 failed: does not fit in memory' in line


def test_scores_are_printed_as_the_tables_of_the_field_have_them() -> None:
    assert render_quality.formatted('psnr', 33.716) == '33.72'
    assert render_quality.formatted('ssim', 0.96581) == '0.9658'
    assert render_quality.formatted('gain', 0.5) == '+0.50'
    assert render_quality.formatted('ecc_converged', 0.995) == '100 %'


# Several sets.

RAIN = {'Rain100H': 3, 'Rain100L': 1, 'Test100': 2, 'Test1200': 1, 'Test2800': 1}
"""MHNet's five test sets, with few images, and not equally many."""


@pytest.fixture
def five_sets(tmp_path: Path) -> list[str]:
    for i, (name, count) in enumerate(RAIN.items()):
        write_pairs(tmp_path / 'rain', name, count, seed=10 * i)
    return [str(tmp_path / 'rain' / name) for name in RAIN]


def test_each_set_and_the_mean_over_sets(five_sets: list[str], tmp_path: Path) -> None:
    out = tmp_path / 'q'
    assert measure(tmp_path, out, 'tiny_nafnet', data=five_sets, protocol='rain') == 0
    record = record_of(out)
    images = rows_of(out.with_suffix('.csv'))
    assert len(images) == 2 * sum(RAIN.values())
    assert [(row['model'], row['set'], row['images']) for row in record['rows']] == [
        (model, *item) for model in ('blurred', 'tiny_nafnet') for item in RAIN.items()
    ]
    for mean in record['extra']['means']:
        own = [row for row in record['rows'] if row['model'] == mean['model']]
        for column in ('psnr', 'ssim'):
            sets = [
                np.mean([float(images[mean['model'], f'{name}/{name}-{i}'][column]) for i in range(count)])
                for name, count in RAIN.items()
            ]
            assert [row[column] for row in own] == pytest.approx(sets)
            assert mean[column] == pytest.approx(np.mean(sets), abs=1e-12)
        everything = np.mean([float(row['psnr']) for key, row in images.items() if key[0] == mean['model']])
        assert abs(mean['psnr'] - everything) > 1e-3, 'not the mean over images'
        assert (mean['set'], mean['images'], mean['failed']) == ('mean', sum(RAIN.values()), 0)
    blurred, restored = record['extra']['means']
    assert restored['gain'] == pytest.approx(restored['psnr'] - blurred['psnr'])
    page = out.with_suffix('.md').read_text()
    assert '| system | set | images | PSNR | SSIM |' in page
    assert '| blurred | Test2800 | 1 |' in page
    section = report.own_section(report.Result(out.with_suffix('.json'), Record(**record)))
    assert section is not None
    assert 'Test2800' in section.html('')
    assert f'| tiny_nafnet | **mean** | 8 | {restored["psnr"]:.2f} | {restored["ssim"]:.4f} |' in page
    assert cv2.imread(str(out.with_suffix('.png'))) is not None


def test_several_sets_are_resumed(five_sets: list[str], tmp_path: Path, replaced: Any) -> None:
    seen: list[int] = []

    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(1)
            return x * 0.9

    replaced(tiny=Counting())
    settings: dict[str, Any] = {'data': five_sets, 'protocol': 'mhnet', 'limit': 1, 'save_images': True}
    assert measure(tmp_path, tmp_path / 'q', 'tiny', **settings) == 0
    first = record_of(tmp_path / 'q')
    assert len(seen) == len(RAIN), 'the limit is for each set'
    assert (tmp_path / 'q' / 'tiny' / 'Test100' / 'Test100-0.png').is_file()
    assert measure(tmp_path, tmp_path / 'q', 'tiny', **settings, resume=True) == 0
    assert len(seen) == len(RAIN)
    assert record_of(tmp_path / 'q') == first


def test_a_set_without_a_score_leaves_no_mean(five_sets: list[str], tmp_path: Path, replaced: Any) -> None:
    class Fussy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            dark = torch.from_numpy(dark_pair[0].copy()).permute(2, 0, 1)[None].float() / 255
            return x * float('nan') if torch.equal(x, dark) else x

    dark_pair = image_pairs.find(five_sets[1], 'rain').images('Rain100L-0')
    replaced(tiny=Fussy())
    assert measure(tmp_path, tmp_path / 'q', 'tiny', data=five_sets, protocol='rain') == 1
    mean = record_of(tmp_path / 'q')['extra']['means'][1]
    assert (mean['psnr'], mean['failed'], mean['images']) == (None, 1, 7)
    assert '1 failed: ' in (tmp_path / 'q.md').read_text().split('**mean**')[-1].splitlines()[0]


def test_sets_of_the_same_name_are_distinguished(tmp_path: Path, replaced: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ('a', 'b'):
        write_pairs(Path(folder), 'test', 1, seed=ord(folder))
    replaced(tiny=nn.Identity())
    assert measure(tmp_path, tmp_path / 'q', 'tiny', data=['a/test', 'b/test']) == 0
    assert [row['set'] for row in record_of(tmp_path / 'q')['rows']] == ['a-test', 'b-test'] * 2
    with pytest.raises(UserError, match='a/test and a/test cannot be distinguished'):
        measure(tmp_path, tmp_path / 'q', 'tiny', data=['a/test', 'a/test'])
