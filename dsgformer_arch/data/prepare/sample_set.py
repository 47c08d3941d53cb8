"""The sample set: a few real photographs, blurred as by an unsteady hand, for runs of minutes.

The photographs come with scikit-image, inside its wheel.  Only PNGs are taken, whose pixels do not depend on
the decoder, so a seed gives the same pixels on every machine.  The held-out photographs show other things
than the training photographs, and meet other camera paths.

What is written can be read by BasicSR's `PairedImageDataset`: `{train,test}_{lq,gt}.lmdb`, with training
crops and whole held-out photographs.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dsgformer_arch.data.image_files import read_image
from dsgformer_arch.data.prepare.layouts import Pair, Split
from dsgformer_arch.data.prepare.lmdb_writer import RECORD as LMDB_RECORD
from dsgformer_arch.data.prepare.lmdb_writer import CropGrid, create_lmdbs
from dsgformer_arch.data.prepare.motion_blur import blur_kernel, blurred_pair, hand_shake_path
from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.files import cannot_write, locked, read_json
from dsgformer_arch.utils.progress import track

TRAINING_PHOTOGRAPHS = ('chelsea', 'ihc', 'motorcycle_left', 'motorcycle_right')
HELD_OUT_PHOTOGRAPHS = ('astronaut', 'coffee')
TRAINING_TAKES = 12
"""How often each training photograph is blurred, each time with another camera path."""
PATH_LENGTHS = (6.0, 18.0)
"""Shortest and longest camera path in pixels."""
SHOT_NOISE, READ_NOISE = 1e-4, 1e-6
"""About 1 of the 255 levels (standard deviation) at mid-grey; see `motion_blur.blurred_pair`."""
CROPS = CropGrid(size=128, step=112)

FORMAT = 1
PRESET = 'sample'
LMDBS = tuple(f'{split}_{side}.lmdb' for split in ('train', 'test') for side in ('lq', 'gt'))
RECORD = 'sample_set.json'
PARTIAL = '.create_sample_set.partial'


def create_sample_set(out: Path, seed: int = 0, say: Callable[[str], None] = print) -> None:
    """Write the sample set into `out`, all four LMDBs of it or none.

    A complete set of the same seed is kept; one of another seed, or an interrupted run's, is replaced.

    Args:
        out: the folder for the LMDBs; made where it is missing.
        seed: what camera paths and noise follow from, 0 to 2^32 - 1.
        say: takes one line on what was done.

    Raises:
        UserError: `out` holds other LMDBs, scikit-image lacks a photograph, another run is at work, or
            the folder cannot be written.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f'the seed {seed} is out of range; give a whole number from 0 to {2**32 - 1}')
    out = out.absolute()
    if is_complete(out, seed):
        say(f'kept {out}, complete already')
        return
    _refuse_to_replace(out)
    try:
        with _workspace(out) as folder:
            (out / RECORD).unlink(missing_ok=True)
            train = _write_pairs(folder / 'train', TRAINING_PHOTOGRAPHS, TRAINING_TAKES, seed, CROPS)
            test = _write_pairs(folder / 'test', HELD_OUT_PHOTOGRAPHS, 1, seed, None)
            create_lmdbs([Split('train', train), Split('test', test)], out, PRESET, force=True, say=say)
            record = {**_settings(seed), 'bytes': _data_bytes(out)}
            (folder / RECORD).write_text(json.dumps(record, indent=1) + '\n', 'ascii')
            os.replace(folder / RECORD, out / RECORD)
    except OSError as error:
        raise cannot_write(f'the sample set to {out}', error) from error


def is_complete(out: Path, seed: int) -> bool:
    """Does `out` hold the whole sample set of this seed?"""
    try:
        record = read_json(out / RECORD)
        return bool(record) and record == {**_settings(seed), 'bytes': _data_bytes(out)}
    except OSError:
        return False


def photograph(name: str) -> NDArray[np.uint8]:
    """A photograph of scikit-image's wheel, H×W×3, RGB, 8 bits.

    Raises:
        UserError: scikit-image is not installed or does not carry it.
    """
    package = find_spec('skimage')
    if package is None or package.origin is None:
        raise UserError('the sample photographs come with scikit-image: pip install scikit-image')
    path = Path(package.origin).parent / 'data' / f'{name}.png'
    try:
        return read_image(path)
    except UserError as error:
        raise UserError(
            f'scikit-image lacks a sample photograph ({error}); install its version of constraints.txt'
        ) from None


def take(name: str, number: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Blur one photograph with one camera path.

    Args:
        name: one of `TRAINING_PHOTOGRAPHS` or `HELD_OUT_PHOTOGRAPHS`.
        number: which of its takes; each has its own random stream, so none depends on another.
        seed: that of the set.

    Returns:
        The blurred and the sharp photograph of one size, a little smaller than the original.
    """
    position = (TRAINING_PHOTOGRAPHS + HELD_OUT_PHOTOGRAPHS).index(name)
    rng = np.random.RandomState([seed, position, number])
    kernel = blur_kernel(hand_shake_path(rng, rng.uniform(*PATH_LENGTHS)))
    return blurred_pair(photograph(name), kernel, rng, SHOT_NOISE, READ_NOISE)


def _settings(seed: int) -> dict[str, Any]:
    """Everything that the pixels depend on, as it reads back from JSON."""
    return {
        'format': FORMAT,
        'seed': seed,
        'training_photographs': [*TRAINING_PHOTOGRAPHS],
        'held_out_photographs': [*HELD_OUT_PHOTOGRAPHS],
        'training_takes': TRAINING_TAKES,
        'path_lengths': [*PATH_LENGTHS],
        'noise': [SHOT_NOISE, READ_NOISE],
        'crops': [CROPS.size, CROPS.step],
    }


def _data_bytes(out: Path) -> dict[str, int]:
    return {name: (out / name / 'data.mdb').stat().st_size for name in LMDBS}


def _refuse_to_replace(out: Path) -> None:
    for path in (out / name for name in LMDBS):
        if not os.path.lexists(path):
            continue
        made_from = read_json(path / LMDB_RECORD).get('made_from')
        if not isinstance(made_from, dict) or made_from.get('preset') != PRESET:
            raise UserError(f'{path} exists and is not part of the sample set; give another folder')


@contextmanager
def _workspace(out: Path) -> Iterator[Path]:
    """An empty hidden folder in `out` for this process alone; whatever a killed run left in it is removed."""
    out.mkdir(parents=True, exist_ok=True)
    folder = out / PARTIAL
    with locked(out, out):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _write_pairs(
    folder: Path, photographs: tuple[str, ...], takes: int, seed: int, crops: CropGrid | None
) -> list[Pair]:
    """Write blurred and sharp PNGs: of each crop, or of whole photographs where `crops` is None."""
    for side in ('lq', 'gt'):
        (folder / side).mkdir(parents=True)
    pairs = []
    work = [(name, number) for name in photographs for number in range(takes)]
    for name, number in track(work, f'blurring the {folder.name} photographs'):
        blurred, sharp = take(name, number, seed)
        key = name if takes == 1 else f'{name}_{number:02d}'
        images = {key: (blurred, sharp)}
        if crops is not None:
            images = {
                f'{key}_s{index:03d}': (
                    blurred[top : top + crops.size, left : left + crops.size],
                    sharp[top : top + crops.size, left : left + crops.size],
                )
                for index, (top, left) in enumerate(crops.corners(*sharp.shape[:2]), 1)
            }
        for image_key, sides in images.items():
            pair = Pair(image_key, folder / 'lq' / f'{image_key}.png', folder / 'gt' / f'{image_key}.png')
            for path, pixels in zip((pair.lq, pair.gt), sides, strict=True):
                path.write_bytes(_png(pixels))
            pairs.append(pair)
    return pairs


def _png(pixels: NDArray[np.uint8]) -> bytes:
    encoded = cv2.imencode('.png', pixels[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])[1]
    return encoded.tobytes()
