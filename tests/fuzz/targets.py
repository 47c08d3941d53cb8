"""What is fuzzed: the readers of files that strangers supply, each with seeds and the error it may raise."""

from __future__ import annotations

import io
import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import lmdb
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

import dsgformer_arch  # noqa: F401  (fixes BasicSR)
from dsgformer_arch.data import image_files, lmdb_files, meta_info, paired_images, png_crop
from dsgformer_arch.inference import images
from dsgformer_arch.models import options
from dsgformer_arch.utils import safe_yaml
from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.zoo import checkpoint
from tests.fuzz.containers import Mutate, mutate_png, mutate_safetensors, mutate_zip
from tests.fuzz.limits import examine
from tests.trees import ROOT, random_image, tiny_options, write_lmdb

PIXELS = 1 << 22
"""Bound of decoded pixels while fuzzing, in place of 2^28: the same code, in less time and memory."""


@dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
        read: reads one input, given as bytes.
        seeds: inputs to begin with, most of them sound.
        allowed: the documented error.
        mutate: changes the inside of a container with check sums; by default only bytes are changed.
        most: bytes of the largest input.
    """

    read: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    allowed: type[Exception] = UserError
    mutate: Callable[[bytes, random.Random, Mutate], bytes] | None = None
    most: int = 16 << 10

    def examine(self, data: bytes) -> None:
        """Read one input within the limits.

        Raises:
            limits.FindingError: the reader crashed, or took too much time or memory.
        """
        with _bounds():
            examine(self.read, data, self.allowed)


@cache
def _folder() -> Path:
    """A folder for the files of this process, in memory where the system has such a place."""
    shared = Path('/dev/shm')
    folder = tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None)
    _kept.append(folder)
    return Path(folder.name)


_kept: list[Any] = []


@contextmanager
def _bounds() -> Iterator[None]:
    former = image_files.MAX_PIXELS, Image.MAX_IMAGE_PIXELS, images.LARGE
    image_files.MAX_PIXELS, Image.MAX_IMAGE_PIXELS, images.LARGE = PIXELS, PIXELS // 2, PIXELS // 2
    try:
        yield
    finally:
        image_files.MAX_PIXELS, Image.MAX_IMAGE_PIXELS, images.LARGE = former


# Option files.


def read_options(data: bytes) -> None:
    path = _folder() / 'options.yml'
    path.write_bytes(data)
    found = options.read(str(path))
    for is_train in (True, False):
        options.check(found, 'fuzzed.yml', is_train)


def option_seeds() -> list[bytes]:
    tiny = json.dumps(tiny_options())
    files = ['train_sample.yml', 'test_sample.yml', 'finetune.yml', 'train_gopro_restormer.yml']
    return [
        tiny.encode(),
        *((ROOT / 'options' / name).read_bytes() for name in files),
        b'a: &a {b: 1}\nc: *a\nd: {<<: *a}\n',
        b'network_g: {type: NAFNet, width: 8, enc_blk_nums: [1], dec_blk_nums: [1]}\nscale: 1\n',
    ]


def read_yaml(data: bytes) -> None:
    try:
        value = safe_yaml.load(data.decode('utf-8', 'replace'))
    except safe_yaml.yaml.YAMLError as error:
        safe_yaml.describe(error)
        return
    assert json.loads(json.dumps(value)) == value, 'no plain data'
    changed = tiny_options()
    options.force(changed, [data.decode('utf-8', 'replace')])


# meta_info.txt.


def read_meta_info(data: bytes) -> None:
    (_folder() / meta_info.NAME).write_bytes(data)
    for key, entry in meta_info.read(_folder()).items():
        assert not os.path.isabs(key)
        assert '..' not in key.split('/')
        assert entry.height * entry.width * entry.channels > 0


def meta_info_seeds() -> list[bytes]:
    return [
        b'0001.png (720,1280,3) 1\n0002.png (720,1280,3) 1\n',
        b'scene/0001.png (64,64,1) 9\n',
        'Straße.png (1,65536,4) 0\n'.encode(),
        b'../0001.png (64,64,3) 1\n',
        b'a.png (999999,0,99) 999\r\n',
    ]


# Checkpoints.


def read_checkpoint(data: bytes) -> None:
    path = _folder() / 'weights.pth'
    path.write_bytes(data)
    found = checkpoint.read_checkpoint(path)
    found.described()
    assert found.state
    for tensor in found.state.values():
        assert bool(tensor.float().isfinite().all())
        assert tensor.numel() * tensor.element_size() <= checkpoint.ALIASES * len(data)


def _saved(content: Any, **how: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **how)
    return buffer.getvalue()


STATE = {'body.weight': torch.arange(6.0).reshape(2, 3), 'body.bias': torch.tensor([1.0, -1.0])}


def pickle_seeds() -> list[bytes]:
    whole = torch.arange(8.0)
    contents: list[Any] = [
        STATE,
        {'params': STATE, 'params_ema': STATE, 'network': {'type': 'NAFNet', 'width': 8}},
        {'state_dict': {'module.a': whole[2:5], 'b': whole.half()}, 'psnr': np.float64(33.0), 'epoch': 3},
        {'a': torch.nn.Parameter(whole.reshape(2, 4).T), 'b': torch.zeros(2, dtype=torch.int64)},
    ]
    return [
        *(_saved(content) for content in contents),
        *(_saved(content, _use_new_zipfile_serialization=False) for content in contents),
    ]


def mutate_checkpoint(data: bytes, rng: random.Random, mutate: Mutate) -> bytes:
    return mutate_zip(data, rng, mutate) if data.startswith(b'PK') else mutate(data)


def safetensors_seeds() -> list[bytes]:
    settings = json.dumps({'width': 8})
    return [
        save(STATE),
        save(STATE, {'system': 'nafnet32', 'settings': settings}),
        save({'a': torch.zeros(3, dtype=torch.bfloat16), 'b': torch.tensor(1, dtype=torch.int64)}),
        save({'a': torch.zeros(2, dtype=torch.float8_e4m3fn), 'b': torch.zeros(0)}),
    ]


# Images.


def read_image(data: bytes) -> None:
    opened = images.open_image(data)
    height, width = opened.size
    assert height > 0
    assert width > 0
    assert opened.channels in (1, 2, 3, 4)
    if opened.bytes > 8 * PIXELS:
        opened.rows(0, 1)
        return
    read = opened.rows(0, height)
    assert read.shape == (height, width, opened.channels)
    assert read.dtype == opened.dtype
    if height * width <= 1 << 16:  # what the file carries is written again: EXIF, profiles, texts
        output = images.Output(opened, None, opened.format)
        output.write(read)
        output.finish()
        assert images.open_image(output.content).size == opened.size


def image_seeds(*formats: str) -> Callable[[], list[bytes]]:
    """Small images of some formats: grey and colour, with and without transparency, EXIF and profile."""

    def seeds() -> list[bytes]:
        return [data for name in formats for data in _encoded(name)]

    return seeds


def _encoded(name: str) -> list[bytes]:
    pixels = random_image(0, 9, 14)
    colour = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, 'Maker'
    exif.get_ifd(0x8769)[0x9003] = '2024:01:01 00:00:00'
    made: list[bytes] = []

    def add(image: Image.Image, **how: Any) -> None:
        buffer = io.BytesIO()
        image.save(buffer, name, **how)
        made.append(buffer.getvalue())

    if name == 'JPEG':
        add(colour, exif=exif, icc_profile=_profile(), dpi=(72, 72), xmp=b'<x:xmpmeta/>')
        add(colour.convert('L'), progressive=True)
        add(colour.convert('CMYK'), comment=b'a comment')
    elif name == 'PNG':
        add(colour, exif=exif, dpi=(72, 72))
        for mode in ('1', 'L', 'LA', 'P', 'RGBA'):
            add(colour.convert(mode))
        add(colour.convert('P'), transparency=3)
        made.append(cv2.imencode('.png', pixels.astype(np.uint16) * 257)[1].tobytes())
    elif name == 'TIFF':
        add(colour, exif=exif, compression='tiff_deflate', dpi=(72, 72))
        add(colour.convert('L'))
        add(colour.convert('RGBA'), compression='tiff_lzw')
        add(colour, compression='jpeg')
        arrays = (pixels.astype(np.uint16) * 257, pixels.astype(np.float32) / 255)
        made += [cv2.imencode('.tiff', array)[1].tobytes() for array in arrays]
    elif name == 'WEBP':
        add(colour, lossless=True, exif=exif)
        add(colour.convert('RGBA'), quality=50)
    else:
        add(colour)
        add(colour.convert('P'))
        add(colour.convert('1'))
    return made


def _profile() -> bytes:
    from PIL import ImageCms

    return ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()


# Images as training reads them: files and LMDB values.


def read_stored(data: bytes) -> None:
    try:
        shape = image_files.header_shape(data)
    except image_files.BadImageError:
        shape = None
    if shape is not None and min(shape.size) >= 4:
        found = png_crop.read_crop(data, shape.height - 4, shape.width - 4, 4)
        assert found is None or found.shape == (4, 4, 3)
    decoded = image_files.decode(data)
    assert shape is not None
    assert decoded.shape == (*shape.size, 3)


def stored_seeds() -> list[bytes]:
    raw = image_files.raw_image(random_image(0, 6, 5))
    return [*_encoded('PNG')[:7], *_encoded('JPEG'), raw]


def mutate_stored(data: bytes, rng: random.Random, mutate: Mutate) -> bytes:
    return mutate_png(data, rng, mutate)


# LMDBs.


def read_lmdb(data: bytes) -> None:
    folder = _folder() / 'fuzzed.lmdb'
    folder.mkdir(exist_ok=True)
    (folder / lmdb_files.DATA).write_bytes(data)
    with lmdb_files.open_lmdb(folder) as opened:
        keys = lmdb_files.keys_of(folder, opened)
        with opened.begin(buffers=True) as transaction:
            for key in keys:
                stored = lmdb_files.read_value(transaction, key, folder)
                assert len(stored) <= len(data)
                with suppress(UserError):
                    paired_images.check_size(stored, (9, 14), key, str(folder))
                bytes(stored)


def lmdb_seeds() -> list[bytes]:
    made = []
    with tempfile.TemporaryDirectory() as name:
        for count, side in ((1, 4), (2, 40), (60, 4)):
            folder = Path(name) / f'{count}.lmdb'
            write_lmdb(folder, {f'image-{i}': random_image(i, side, side) for i in range(count)})
            made.append((folder / lmdb_files.DATA).read_bytes())
        folder = Path(name) / 'deep.lmdb'
        with lmdb.open(str(folder), map_size=1 << 22) as opened, opened.begin(write=True) as transaction:
            for i in range(20):
                transaction.put(b'%0500d' % i, b'x')
        made.append((folder / lmdb_files.DATA).read_bytes())
    return made


TARGETS = {
    'options': Target(read_options, option_seeds),
    'yaml': Target(read_yaml, option_seeds),
    'meta_info': Target(read_meta_info, meta_info_seeds, most=4096),
    'checkpoint': Target(
        read_checkpoint, pickle_seeds, checkpoint.CheckpointError, mutate_checkpoint
    ),
    'safetensors': Target(
        read_checkpoint, safetensors_seeds, checkpoint.CheckpointError, mutate_safetensors
    ),
    'png': Target(read_image, image_seeds('PNG'), images.ImageError, mutate_png),
    'jpeg': Target(read_image, image_seeds('JPEG'), images.ImageError),
    'tiff': Target(read_image, image_seeds('TIFF'), images.ImageError),
    'webp_bmp': Target(read_image, image_seeds('WEBP', 'BMP'), images.ImageError),
    'stored': Target(read_stored, stored_seeds, image_files.BadImageError, mutate_stored),
    'lmdb': Target(read_lmdb, lmdb_seeds, most=1 << 17),
}  # fmt: skip
"""By name, as `python -m tests.fuzz NAME` takes them."""
