"""The results of a training and a test run, as a figure and a record.

`show` reads the output of `basicsr train` and `basicsr test`, compares the restored images with the data set,
and writes `before_after.png` and `report.json`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from basicsr.data import build_dataset
from basicsr.metrics import calculate_psnr, calculate_ssim
from basicsr.utils import tensor2img
from matplotlib.figure import Figure
from torch import nn

from dsgformer_arch import zoo
from dsgformer_arch.benchmark.measure import crops
from dsgformer_arch.benchmark.record import environment, write_text
from dsgformer_arch.benchmark.render.output import save_figure
from dsgformer_arch.metrics.metric import Image
from dsgformer_arch.models import options
from dsgformer_arch.restore import restore
from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.progress import track

CROP_WIDTH, CROP_HEIGHT = 184, 138


@dataclass(frozen=True)
class Restoration:
    """One held-out image in three versions, H×W×3, RGB, 8 bits."""

    name: str
    blurred: Image
    restored: Image
    sharp: Image

    def measure(self) -> dict[str, float]:
        """PSNR in dB and SSIM, as BasicSR computes them on RGB without a border, by `report.json`'s names."""
        return {
            f'{metric}_{version}': float(calculate(image, self.sharp, crop_border=0))
            for metric, calculate in (('psnr', calculate_psnr), ('ssim', calculate_ssim))
            for version, image in (('blurred', self.blurred), ('restored', self.restored))
        }


def show_pretrained(test_file: Path, out: Path) -> dict[str, float]:
    """Restore the held-out images with the weights in the package and write `pretrained.png` into `out`.

    Args:
        test_file: an option file of `basicsr test`; its data set is restored.
        out: the folder to write to; made where it is missing.

    Returns:
        Means of `psnr_*` and `ssim_*` over the images, as in `report.json`.

    Raises:
        UserError: the data set is missing.
    """
    network = zoo.create(zoo.shipped()[0], pretrained=True).eval()
    restorations = [
        Restoration(name, blurred, _restored(network, blurred), sharp)
        for name, blurred, sharp in track(_pairs(_data(test_file)), 'restoring')
    ]
    measured = [restoration.measure() for restoration in restorations]
    save_figure(_draw(restorations, measured), out / 'pretrained.png')
    return {name: float(np.mean([values[name] for values in measured])) for name in measured[0]}


def show(train_file: Path, test_file: Path, out: Path) -> dict[str, Any]:
    """Write `before_after.png` and `report.json` into `out`.

    The working directory is the one that holds `experiments/` and `results/`, and where relative paths in
    option files start.

    Args:
        train_file: the option file that was trained with; its `name` leads to the training's record.
        test_file: the option file that was tested with; it has one data set and saved its images.
        out: the folder to write to; made where it is missing.

    Returns:
        What `report.json` holds.  `psnr_*` and `ssim_*` are means over the held-out images.

    Raises:
        UserError: the training's record, the checkpoint, the data set or a restored image is missing, or
            one is older than the checkpoint.
    """
    training = _training_record(train_file)
    restorations = _restorations(test_file)
    measured = [restoration.measure() for restoration in track(restorations, 'measuring')]
    report = {
        **{name: float(np.mean([values[name] for values in measured])) for name in measured[0]},
        'iterations': training['iterations'],
        'seconds_training': training['seconds'],
        'images': [
            {'image': restoration.name, **values}
            for restoration, values in zip(restorations, measured, strict=True)
        ],
        'environment': environment(),
    }
    save_figure(_draw(restorations, measured), out / 'before_after.png')
    write_text(out / 'report.json', json.dumps(report, indent=2) + '\n')
    return report


# --- output of the runs -------------------------------------------------------------------------------------


def _training_record(train_file: Path) -> dict[str, Any]:
    path = Path('experiments', str(options.read(str(train_file)).get('name')), 'training.json')
    fix = f'run: basicsr train -opt {train_file}'
    try:
        record = json.loads(path.read_text('utf-8'))
        return {'iterations': int(record['iterations']), 'seconds': float(record['seconds'])}
    except FileNotFoundError:
        raise UserError(f'there is no {path}; {fix}') from None
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(f'{path} is not a record of a training; {fix}') from None


def _data(test_file: Path) -> dict[str, Any]:
    """Options of a test file's data set."""
    data = {**next(iter(options.read(str(test_file))['datasets'].values())), 'phase': 'test', 'scale': 1}
    for key in ('dataroot_gt', 'dataroot_lq'):
        if not Path(data[key]).is_dir():
            raise UserError(f'{test_file}: there is no {data[key]}; run: python tools/create_sample_set.py')
    return data


def _pairs(data: dict[str, Any]) -> list[tuple[str, Image, Image]]:
    """Name, blurred and sharp image of every pair of a data set."""
    pairs = []
    for pair in build_dataset(data):
        sharp, blurred = (tensor2img([pair[side]], rgb2bgr=False) for side in ('gt', 'lq'))
        pairs.append((Path(pair['lq_path']).stem, blurred, sharp))
    return pairs


def _restored(network: nn.Module, blurred: Image) -> Image:
    """An 8-bit RGB image through a network."""
    image = torch.from_numpy(blurred).permute(2, 0, 1)[None].float() / 255
    return tensor2img([restore(network, image)], rgb2bgr=False)


def _restorations(test_file: Path) -> list[Restoration]:
    """The test set's pairs, with the image that the test run saved of each."""
    settings = options.read(str(test_file))
    options.check(settings, str(test_file), is_train=False)
    data = _data(test_file)
    images = Path('results', settings['name'], 'visualization', data['name'])
    suffix = settings['val'].get('suffix') or settings['name']
    tested = Path(settings['path']['pretrain_network_g']).stat().st_mtime
    fix = f'run: basicsr test -opt {test_file}'
    restorations = []
    for name, blurred, sharp in _pairs(data):
        path = images / f'{name}_{suffix}.png'
        restored = cv2.imread(str(path), cv2.IMREAD_COLOR) if path.is_file() else None
        if restored is None:
            raise UserError(f'there is no image {path}; {fix}')
        if path.stat().st_mtime < tested or restored.shape != sharp.shape:
            raise UserError(f'{path} is of an earlier checkpoint or data set; {fix}')
        restorations.append(Restoration(name, blurred, np.ascontiguousarray(restored[..., ::-1]), sharp))
    return restorations


# --- the figure --------------------------------------------------------------------------------------------


def _draw(restorations: Sequence[Restoration], measured: Sequence[dict[str, float]]) -> Figure:
    """One row for each image: the same detail blurred, restored and sharp, with its values below."""
    figure = Figure(figsize=(9.2, 2.75 * len(restorations)), layout='constrained')
    grid = figure.subplots(len(restorations), 3, squeeze=False)
    for axes, restoration, values in zip(grid, restorations, measured, strict=True):
        window = crops.detail(restoration.sharp, CROP_HEIGHT, CROP_WIDTH)
        gain = values['psnr_restored'] - values['psnr_blurred']
        labels = (
            f'{values["psnr_blurred"]:.2f} dB, SSIM {values["ssim_blurred"]:.3f}',
            f'{values["psnr_restored"]:.2f} dB ({gain:+.2f}), SSIM {values["ssim_restored"]:.3f}',
            f'{restoration.name} (values of the whole image)',
        )
        images = (restoration.blurred, restoration.restored, restoration.sharp)
        for axis, image, label in zip(axes, images, labels, strict=True):
            axis.imshow(window.of(image), interpolation='bicubic')
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(label, fontsize=9)
            axis.spines[:].set_visible(False)
    for axis, title in zip(grid[0], ('blurred', 'restored', 'sharp'), strict=True):
        axis.set_title(title, fontsize=11)
    return figure
