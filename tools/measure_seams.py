"""Measure what tiles change: `python tools/measure_seams.py IMAGE... --tlc --tiles 960 512`.

Each image is restored whole and in tiles with the same settings.  The table has the mean and the largest
absolute difference in units of 1/255 for each image, and the cost: pixels that the network computed per pixel
of the images.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from dsgformer_arch import Deblurrer
from dsgformer_arch.utils.arguments import positive
from dsgformer_arch.utils.errors import UserError, guarded


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description='Differences between an image restored in tiles and the same image restored whole.'
    )
    result.add_argument('images', nargs='+', type=Path, metavar='IMAGE')
    result.add_argument(
        '--tiles', nargs='+', type=positive, default=[960, 768, 640, 512, 384, 256], metavar='N'
    )
    result.add_argument(
        '--mosaic', type=positive, default=1, metavar='N', help='N×N copies of an image, each second mirrored'
    )
    result.add_argument('--model', default=None, help='as for `dsgformer deblur`')
    result.add_argument('--tlc', action='store_true', help='local pooling, as for `dsgformer deblur`')
    result.add_argument('--precision', default='fp32', help='as for `dsgformer deblur`; default: fp32')
    return result


class Computed:
    """Counts the pixels that a network is given, from then on."""

    def __init__(self, network: nn.Module) -> None:
        self.pixels = 0
        network.register_forward_pre_hook(self._count)

    def _count(self, network: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.pixels += inputs[0].shape[-2] * inputs[0].shape[-1]


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    images = [_mosaic(_image(path), args.mosaic) for path in args.images]
    deblurrer = Deblurrer(args.model, tile=None, precision=args.precision, tlc=args.tlc)
    whole = [deblurrer.restore(image) for image in images]
    print('| tile | ' + ' | '.join(path.stem for path in args.images) + ' | cost |')
    print('|---:|' + '---:|' * (len(images) + 1))
    for tile in args.tiles:
        tiled = Deblurrer(args.model, tile=tile, precision=args.precision, tlc=args.tlc)
        computed = Computed(tiled.network)
        cells = [_difference(tiled.restore(image), kept) for image, kept in zip(images, whole, strict=True)]
        cost = computed.pixels / sum(image.shape[0] * image.shape[1] for image in images)
        print(f'| {tile} | ' + ' | '.join(cells) + f' | {cost:.2f} |', flush=True)


def _image(path: Path) -> NDArray[np.float32]:
    """(H, W, 3) in [0, 1]: in floating point, so that no rounding adds to the differences."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert('RGB')).astype(np.float32) / 255
    except OSError as error:
        raise UserError(f'{path} cannot be read as an image: {error}') from None


def _mosaic(image: NDArray[np.float32], number: int) -> NDArray[np.float32]:
    row = np.concatenate([image[:, :: 1 - 2 * (i % 2)] for i in range(number)], axis=1)
    return np.concatenate([row[:: 1 - 2 * (i % 2)] for i in range(number)], axis=0)


def _difference(tiled: NDArray[np.float32], whole: NDArray[np.float32]) -> str:
    difference = np.abs(tiled - whole) * 255
    return f'{difference.mean():.2f} / {difference.max():.1f}'


if __name__ == '__main__':
    raise SystemExit(guarded(main))
