"""Logging of training runs to TensorBoard and, optionally, to Weights & Biases.

Both get the same scalars and images.  Only rank 0 writes.  Logging draws no random numbers, so that it does
not change the training.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.text import one_line

SAMPLES = 4
"""Default of `logger: samples`, the number of validation images to log."""
SIDE = 512
"""Largest width and height of a logged image, in pixels; larger ones are scaled down."""
WANDB_ID = 'wandb_id.txt'
"""File in the experiment's folder with the run's id, so that a resumed run continues the same charts."""

Options = dict[str, Any]


def writes_board(opt: Options) -> bool:
    """Whether a run writes TensorBoard events; debug runs do not."""
    return bool(opt['is_train'] and opt['logger'].get('use_tb_logger')) and 'debug' not in opt['name']


def samples(opt: Options) -> int:
    """How many images of each validation set a run logs."""
    return int(opt['logger'].get('samples', SAMPLES)) if writes_board(opt) else 0


def strip(images: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Images of one scene side by side, each scaled to the last one's size and down to `SIDE`.

    Args:
        images: uint8 (H, W, 3), such as blurred, restored, sharp.

    Returns:
        uint8 (h, n w, 3) with h and w of at most `SIDE`.
    """
    height, width = images[-1].shape[:2]
    factor = min(1.0, SIDE / height, SIDE / width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return np.concatenate([cv2.resize(each, size, interpolation=cv2.INTER_AREA) for each in images], axis=1)


def faults(logger: Mapping[str, Any]) -> list[str]:
    """Faults of a valid `logger` section: contradictions and missing packages, as sentences."""
    wandb = (logger.get('wandb') or {}).get('project') is not None
    found = []
    if wandb and not logger.get('use_tb_logger'):
        found.append('logger: wandb: project is set, but use_tb_logger is false; set it to true')
    for wanted, package in ((logger.get('use_tb_logger'), 'tensorboard'), (wandb, 'wandb')):
        if wanted and importlib.util.find_spec(package) is None:
            option = 'wandb: project' if package == 'wandb' else 'use_tb_logger'
            found.append(f'logger: {option} needs {package}: pip install {package}, or switch it off')
    return found


class Board:
    """Writer of scalars and images.

    Args:
        opt: complete options.
        start: iteration from which the run continues.  Events of later iterations, written by an
            interrupted process, are hidden.

    Raises:
        UserError: Weights & Biases refuses the run.
    """

    def __init__(self, opt: Options, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.run = _start_wandb(opt, start) if (opt['logger'].get('wandb') or {}).get('project') else None
        folder = os.path.join(opt['root_path'], 'tb_logger', opt['name'])
        self.writer: Any = SummaryWriter(folder, purge_step=start + 1 if start else None)

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        """Log numbers by name."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, iteration)
        if self.run is not None:
            self.run.log({**values, 'iteration': iteration})

    def image(self, name: str, pixels: NDArray[np.uint8], iteration: int) -> None:
        """Log an image, uint8 RGB (H, W, 3)."""
        self.writer.add_image(name, pixels, iteration, dataformats='HWC')
        if self.run is not None:
            self.run.log({name: importlib.import_module('wandb').Image(pixels), 'iteration': iteration})

    def close(self) -> None:
        """Flush and close."""
        self.writer.close()
        if self.run is not None:
            self.run.finish()


def _start_wandb(opt: Options, start: int) -> Any:
    """Start a run of Weights & Biases, or continue the previous one of this experiment."""
    wandb = importlib.import_module('wandb')
    settings = opt['logger']['wandb']
    file = os.path.join(opt['path']['experiments_root'], WANDB_ID)
    name = settings.get('resume_id')
    if not name and start and os.path.isfile(file):
        with open(file, encoding='utf-8') as stored:
            name = stored.read().strip()
    try:
        run = wandb.init(
            id=name or None,
            resume='allow' if name else None,
            name=opt['name'],
            project=settings['project'],
            config=opt,
            dir=opt['root_path'],
        )
    except Exception as error:  # no key, no network, an invalid id: the classes differ between versions
        raise UserError(
            f'logger: wandb: Weights & Biases does not start ({one_line(error, 200)}); '
            'run `wandb login`, or set WANDB_MODE=offline'
        ) from None
    run.define_metric('iteration')
    run.define_metric('*', step_metric='iteration')
    with open(file, 'w', encoding='utf-8') as stored:
        stored.write(f'{run.id}\n')
    return run
