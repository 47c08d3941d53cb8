"""Small files in place of those that the documentation's readers have."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from dsgformer_arch import zoo
from tests.trees import ROOT, random_image

IMAGES = ('.jpg', '.jpeg', '.png', '.tif', '.tiff', '.webp', '.bmp')
VIDEOS = ('.mp4', '.mkv', '.mov')
WEIGHTS = ('.pth', '.safetensors')
HEIGHT, WIDTH = 49, 65
SMALL_SYSTEM = 'dsgformer_t'

TREES = {
    'my_photos': ['blurred/a.png', 'blurred/b.png', 'sharp/a.png', 'sharp/b.png'],
    'study/train': ['blur/a.png', 'blur/b.png', 'sharp/a.png', 'sharp/b.png'],
    'study/test': ['blur/a.png', 'blur/b.png', 'sharp/a.png', 'sharp/b.png'],
    'my/sharp': ['a.jpg', 'b.jpg'],
    'my/others': ['c.jpg'],
}
"""Folders with more than two images of their own."""


def provide(name: str, side: int | None = None) -> None:
    """Make a file or folder below the working folder, unless it is there, by the suffix of its name.

    Args:
        name: a relative path or pattern; a name without a suffix is a folder of two images.
        side: of square images, for programs that need larger ones.
    """
    name = name.replace('*', '1')
    path = Path(name)
    if path.is_absolute() or path.exists() or glob.glob(name):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = path.suffix.lower()
    if (ROOT / name).is_file():
        path.write_bytes((ROOT / name).read_bytes())
    elif suffix in IMAGES:
        cv2.imwrite(str(path), random_image(len(name), side or HEIGHT, side or WIDTH))
    elif suffix in VIDEOS:
        _clip(path)
    elif suffix in WEIGHTS:
        _weights(path)
    elif name.rstrip('/') in TREES:
        for each in TREES[name.rstrip('/')]:
            provide(f'{name.rstrip("/")}/{each}', side)
    elif not suffix:
        for each in ('a.jpg', 'b.png'):
            provide(f'{name.rstrip("/")}/{each}', side)


def _clip(path: Path) -> None:
    import av

    with av.open(str(path), 'w') as container:
        stream: Any = container.add_stream('libx264', rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, 'yuv420p'
        for number in range(2):
            frame = av.VideoFrame.from_ndarray(random_image(number, 48, 64), format='rgb24')
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _weights(path: Path) -> None:
    network = zoo.create(SMALL_SYSTEM)
    if path.suffix == '.pth':
        torch.save({'params': network.state_dict()}, path)
    else:
        provide(f'{path}.pth')
        zoo.convert(f'{path}.pth', path, SMALL_SYSTEM)


def names() -> dict[str, Any]:
    """Names that Python blocks use without making them: their reader's images."""
    image = random_image(0, HEIGHT, WIDTH)  # uint8 RGB (H, W, 3)
    return {'image': image, 'pil_image': Image.fromarray(image), 'frames': [image, image], 'show': np.shape}
