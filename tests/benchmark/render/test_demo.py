"""The figure and the record at the end of `make demo`, against independent metrics."""

from __future__ import annotations

import json
import os
import runpy
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from skimage.metrics import structural_similarity

from dsgformer_arch import zoo
from dsgformer_arch.benchmark.render.demo import show, show_pretrained
from dsgformer_arch.utils.errors import UserError
from tests.trees import ROOT, random_image, write_lmdb, write_pairs

TRAIN, TEST = Path('options/train_sample.yml'), Path('options/test_sample.yml')
NAMES = ['test-0', 'test-1']
HEIGHT, WIDTH = 64, 72


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `basicsr train` and `basicsr test` leave behind, with restored images of known error."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'options').mkdir()
    for file in (TRAIN, TEST):
        (tmp_path / file).write_text((ROOT / file).read_text())
    for split in ('train', 'test'):
        write_pairs(tmp_path / 'datasets' / 'sample', split, len(NAMES), HEIGHT, WIDTH)
    experiment = tmp_path / 'experiments' / 'train_sample'
    (experiment / 'models').mkdir(parents=True)
    weights = {'params_ema': zoo.create('dsgformer_t').state_dict()}
    torch.save(weights, experiment / 'models' / 'net_g_latest.pth')
    (experiment / 'training.json').write_text(json.dumps({'iterations': 1234, 'seconds': 56.5}))
    for name in NAMES:
        path = restored_file(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), restored(name))
    return tmp_path


def restored_file(name: str) -> Path:
    return Path('results', 'test_sample', 'visualization', 'sample', f'{name}_test_sample.png')


def sharp(name: str) -> np.ndarray:
    return random_image(NAMES.index(name), HEIGHT, WIDTH)


def restored(name: str) -> np.ndarray:
    noise = np.random.RandomState(1).randint(-6, 7, (HEIGHT, WIDTH, 3))
    return (sharp(name).astype(int) + noise).clip(0, 255).astype(np.uint8)


def drawn_in(out: Path) -> np.ndarray:
    image = cv2.imread(str(out / 'before_after.png'))
    assert image is not None
    return image


def psnr(image: np.ndarray, reference: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((image.astype(float) - reference) ** 2)))


def ssim(image: np.ndarray, reference: np.ndarray) -> float:
    """Wang et al.'s, with another library; BasicSR's leaves out the 5 pixels where the window is cut."""
    values = structural_similarity(
        image, reference, data_range=255, channel_axis=2, full=True, sigma=1.5,
        gaussian_weights=True, use_sample_covariance=False,
    )[1]  # fmt: skip
    return float(values[5:-5, 5:-5].mean())


def test_report_holds_means_and_each_image(project: Path) -> None:
    report = show(TRAIN, TEST, Path('results/demo'))
    assert json.loads((project / 'results/demo/report.json').read_text()) == report
    assert report['iterations'] == 1234
    assert report['seconds_training'] == 56.5
    assert [image['image'] for image in report['images']] == NAMES
    for values in report['images']:
        reference = sharp(values['image'])
        blurred = cv2.blur(reference, (7, 1))
        assert values['psnr_blurred'] == pytest.approx(psnr(blurred, reference), abs=1e-9)
        assert values['psnr_restored'] == pytest.approx(psnr(restored(values['image']), reference), abs=1e-9)
        assert values['ssim_blurred'] == pytest.approx(ssim(blurred, reference), abs=1e-4)
        assert values['ssim_restored'] == pytest.approx(ssim(restored(values['image']), reference), abs=1e-4)
    for name in ('psnr_blurred', 'psnr_restored', 'ssim_blurred', 'ssim_restored'):
        assert report[name] == pytest.approx(np.mean([values[name] for values in report['images']]))
    assert report['environment']['packages']['torch'] == torch.__version__
    assert {'processor', 'cores', 'date', 'python'} <= report['environment'].keys()


def test_figure_shows_blurred_restored_and_sharp_in_this_order(project: Path) -> None:
    """The panels' colours are far apart: each third of the figure must be nearest to its own."""
    colours = {'lq': (250, 10, 10), 'restored': (10, 250, 10), 'gt': (10, 10, 250)}
    (project / 'datasets').rename(project / 'old')
    for side in ('lq', 'gt'):
        image = np.full((HEIGHT, WIDTH, 3), colours[side], np.uint8)
        write_lmdb(project / 'datasets' / 'sample' / f'test_{side}.lmdb', {'test-0': image})
    cv2.imwrite(str(restored_file('test-0')), np.full((HEIGHT, WIDTH, 3), colours['restored'], np.uint8))
    show(TRAIN, TEST, Path('results/demo'))
    drawn = drawn_in(Path('results/demo'))
    middle = drawn[drawn.shape[0] // 2].astype(int)
    for third, colour in zip(np.array_split(middle, 3), colours.values(), strict=True):
        assert np.abs(third[len(third) // 2] - colour).max() <= 1


def test_figure_has_one_row_per_image(project: Path) -> None:
    show(TRAIN, TEST, Path('two'))
    write_pairs(project / 'more', 'test', 3, HEIGHT, WIDTH)
    (project / 'datasets').rename(project / 'old')
    (project / 'datasets').mkdir()
    (project / 'more').rename(project / 'datasets' / 'sample')
    cv2.imwrite(str(restored_file('test-2')), sharp('test-0'))
    show(TRAIN, TEST, Path('three'))
    two, three = drawn_in(Path('two')).shape, drawn_in(Path('three')).shape
    assert two[1] == three[1]
    assert three[0] == pytest.approx(1.5 * two[0], rel=0.01)


def break_(project: Path, what: str) -> str:
    """Take one thing away; returns what the message must say."""
    experiment = project / 'experiments' / 'train_sample'
    if what == 'record':
        (experiment / 'training.json').unlink()
        return 'there is no experiments/train_sample/training.json; run: basicsr train'
    if what == 'record of another program':
        (experiment / 'training.json').write_text('[1]')
        return 'training.json is not a record of a training; run: basicsr train'
    if what == 'checkpoint':
        (experiment / 'models' / 'net_g_latest.pth').unlink()
        return 'there is no file experiments/train_sample/models/net_g_latest.pth'
    if what == 'image':
        restored_file('test-1').unlink()
        return 'there is no image results/.*test-1_test_sample.png; run: basicsr test'
    if what == 'fresh image':
        os.utime(restored_file('test-1'), (1, 1))
        return 'test-1_test_sample.png is of an earlier checkpoint or data set; run: basicsr test'
    if what == 'image of this data set':
        cv2.imwrite(str(restored_file('test-0')), np.zeros((8, 8, 3), np.uint8))
        return 'test-0_test_sample.png is of an earlier checkpoint or data set'
    if what == 'data set':
        (project / 'datasets' / 'sample' / 'test_gt.lmdb').rename(project / 'gone')
        return 'there is no datasets/sample/test_gt.lmdb'
    (project / TEST).unlink()
    return 'cannot read the option file options/test_sample.yml'


@pytest.mark.parametrize(
    'what',
    [
        'record', 'record of another program', 'checkpoint', 'image', 'fresh image',
        'image of this data set', 'data set', 'option file',
    ],
)  # fmt: skip
def test_what_is_missing_is_reported_in_one_sentence(project: Path, what: str) -> None:
    message = break_(project, what)
    with pytest.raises(UserError, match=message):
        show(TRAIN, TEST, Path('results/demo'))
    assert not (project / 'results' / 'demo').exists()


def test_a_test_without_a_checkpoint_is_refused(project: Path) -> None:
    options: dict[str, Any] = yaml.safe_load((project / TEST).read_text())
    options['path']['pretrain_network_g'] = None
    (project / TEST).write_text(yaml.safe_dump(options))
    with pytest.raises(UserError, match='pretrain_network_g: name the checkpoint that is to be tested'):
        show(TRAIN, TEST, Path('results/demo'))


def test_the_tool_prints_the_gain_and_ends_with_status_2_where_something_is_missing(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr('sys.argv', ['demo.py'])
    for expected in (0, 2):
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / 'tools' / 'demo.py'), run_name='__main__')
        assert stop.value.code == expected
        restored_file('test-1').unlink(missing_ok=True)
    output = capsys.readouterr()
    report = json.loads((project / 'results' / 'demo' / 'report.json').read_text())
    assert f'{report["psnr_restored"] - report["psnr_blurred"]:+.2f} dB' in output.out
    assert output.err.splitlines()[-1].startswith('error: there is no image')


def test_the_weights_in_the_package_restore_the_test_images(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []

    class Darker(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(tuple(x.shape))
            return x - 1 / 255

    monkeypatch.setattr(zoo, 'create', lambda name, pretrained: Darker())
    means = show_pretrained(Path('options/test_sample.yml'), Path('out'))
    assert seen == [(1, 3, HEIGHT, WIDTH)] * len(NAMES)
    assert means['psnr_restored'] != means['psnr_blurred']
    assert cv2.imread('out/pretrained.png') is not None
    shutil.rmtree('datasets')
    with pytest.raises(UserError, match=r'run: python tools/create_sample_set\.py'):
        show_pretrained(Path('options/test_sample.yml'), Path('out'))
