"""What a training and a test run achieved: one picture and one record of it.

`show` reads what `basicsr train` and `basicsr test` left, compares the restored pictures with the data set
itself, and writes `before_after.png` and `report.json`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from basicsr.data import build_dataset
from basicsr.metrics import calculate_psnr, calculate_ssim
from basicsr.utils import tensor2img
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dsgformer_arch.benchmark.record import environment, write_text
from dsgformer_arch.benchmark.render.output import save_figure
from dsgformer_arch.models import options
from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.progress import track

Image = NDArray[np.uint8]

CROP_WIDTH, CROP_HEIGHT = 184, 138


@dataclass(frozen=True)
class Restoration:
    """One held-out photograph in three versions, H×W×3, RGB, 8 bits."""

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


def show(train_file: Path, test_file: Path, out: Path) -> dict[str, Any]:
    """Write `before_after.png` and `report.json` into `out`.

    The working directory is the one that holds `experiments/` and `results/`, and where relative paths in
    option files start.

    Args:
        train_file: the option file that was trained with; its `name` leads to the training's record.
        test_file: the option file that was tested with; it has one data set and saved its pictures.
        out: the folder to write to; made where it is missing.

    Returns:
        What `report.json` holds.  `psnr_*` and `ssim_*` are means over the held-out photographs.

    Raises:
        UserError: the training's record, the checkpoint, the data set or a restored picture is missing, or
            a picture is older than the checkpoint.
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


# --- what the runs left -------------------------------------------------------------------------------------


def _training_record(train_file: Path) -> dict[str, Any]:
    path = Path('experiments', str(options.read(str(train_file)).get('name')), 'training.json')
    mend = f'run: basicsr train -opt {train_file}'
    try:
        record = json.loads(path.read_text('utf-8'))
        return {'iterations': int(record['iterations']), 'seconds': float(record['seconds'])}
    except FileNotFoundError:
        raise UserError(f'there is no {path}; {mend}') from None
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(f'{path} is no record of a training; {mend}') from None


def _restorations(test_file: Path) -> list[Restoration]:
    """The test set's pairs, with the picture that the test run saved of each."""
    settings = options.read(str(test_file))
    options.check(settings, str(test_file), is_train=False)
    data = {**next(iter(settings['datasets'].values())), 'phase': 'test', 'scale': 1}
    pictures = Path('results', settings['name'], 'visualization', data['name'])
    suffix = settings['val'].get('suffix') or settings['name']
    checkpoint = settings['path'].get('pretrain_network_g')
    if not checkpoint:
        raise UserError(f'{test_file}: path: pretrain_network_g names no checkpoint, so nothing was tested')
    tested = Path(checkpoint).stat().st_mtime
    mend = f'run: basicsr test -opt {test_file}'
    restorations = []
    for pair in build_dataset(data):
        sharp, blurred = (tensor2img([pair[side]], rgb2bgr=False) for side in ('gt', 'lq'))
        name = Path(pair['lq_path']).stem
        path = pictures / f'{name}_{suffix}.png'
        restored = cv2.imread(str(path), cv2.IMREAD_COLOR) if path.is_file() else None
        if restored is None:
            raise UserError(f'there is no picture {path}; {mend}')
        if path.stat().st_mtime < tested or restored.shape != sharp.shape:
            raise UserError(f'{path} is of an earlier checkpoint or data set; {mend}')
        restorations.append(Restoration(name, blurred, np.ascontiguousarray(restored[..., ::-1]), sharp))
    return restorations


# --- the picture --------------------------------------------------------------------------------------------


def _draw(restorations: Sequence[Restoration], measured: Sequence[dict[str, float]]) -> Figure:
    """One row for each photograph: the same detail blurred, restored and sharp, with its values below."""
    figure = Figure(figsize=(9.2, 2.75 * len(restorations)), layout='constrained')
    grid = figure.subplots(len(restorations), 3, squeeze=False)
    for axes, restoration, values in zip(grid, restorations, measured, strict=True):
        window = _detail(restoration.sharp)
        gain = values['psnr_restored'] - values['psnr_blurred']
        labels = (
            f'{values["psnr_blurred"]:.2f} dB, SSIM {values["ssim_blurred"]:.3f}',
            f'{values["psnr_restored"]:.2f} dB ({gain:+.2f}), SSIM {values["ssim_restored"]:.3f}',
            f'{restoration.name} (values of the whole photograph)',
        )
        images = (restoration.blurred, restoration.restored, restoration.sharp)
        for axis, image, label in zip(axes, images, labels, strict=True):
            axis.imshow(image[window], interpolation='bicubic')
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(label, fontsize=9)
            axis.spines[:].set_visible(False)
    for axis, title in zip(grid[0], ('blurred', 'restored', 'sharp'), strict=True):
        axis.set_title(title, fontsize=11)
    return figure


def _detail(sharp: Image) -> tuple[slice, slice]:
    """The window with the most edges: there blur is seen best."""
    height, width = min(CROP_HEIGHT, sharp.shape[0]), min(CROP_WIDTH, sharp.shape[1])
    grey = cv2.cvtColor(sharp, cv2.COLOR_RGB2GRAY).astype(np.float64)
    edges = np.abs(np.gradient(grey, axis=0)) + np.abs(np.gradient(grey, axis=1))
    sums = np.pad(edges.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    inside = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
    top, left = (int(index) for index in np.unravel_index(inside.argmax(), inside.shape))
    return slice(top, top + height), slice(left, left + width)
