"""The checkpoints that the authors of the systems publish: a table, a cache and a downloader.

A checkpoint is named `SYSTEM/TRAINED_FOR`, such as `restormer/motion`.  Its file is read as data, never
executed, and must hold the weights of that system before it enters the cache.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from filelock import FileLock
from tqdm import tqdm

from dsgformer_arch import zoo
from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.files import read_json, sha256, write_text
from dsgformer_arch.utils.text import did_you_mean
from dsgformer_arch.zoo.checkpoint import CheckpointError, read_checkpoint

BLOCK = 1 << 16
"""Bytes that are read at a time; a broken connection costs no more than one block."""

TIMEOUT = (15, 60)
"""Seconds to connect, and between two blocks."""

ATTEMPTS = 5
"""Connections that are opened for one file before giving up."""

RETRY_SECONDS = 1.0
"""Unit of the waiting times between two connections."""

GOOGLE_DRIVE = 'https://drive.usercontent.google.com/download?export=download&confirm=t&id='
"""Address that returns a file of Google Drive directly, whatever its size."""


@dataclass(frozen=True)
class OfficialWeights:
    """One published checkpoint.

    Attributes:
        system: the name in the zoo.
        name: what it was trained for: `motion`, `deraining`, `denoising`, `defocus`, or a data set.
        trained_on: the training set.
        page: the web page with the file.
        url: the address of the file itself; None where no program can download it.
        licence: of the official repository.
        sha256: as published; None where it is not: then that of the first download is recorded.
    """

    system: str
    name: str
    trained_on: str
    page: str
    url: str | None = None
    licence: str = ''
    sha256: str | None = None

    @property
    def key(self) -> str:
        """`SYSTEM/NAME`, as command lines take it."""
        return f'{self.system}/{self.name}'


def _drive(identity: str) -> dict[str, str]:
    """Page and address of a file of Google Drive."""
    return {'page': f'https://drive.google.com/file/d/{identity}/view', 'url': f'{GOOGLE_DRIVE}{identity}'}


def _release(repository: str, tag: str, file: str) -> dict[str, str]:
    """Page and address of an asset of a release on GitHub."""
    base = f'https://github.com/{repository}/releases'
    return {'page': f'{base}/tag/{tag}', 'url': f'{base}/download/{tag}/{file}'}


def _folder(identity: str) -> dict[str, str]:
    """Page of a folder of Google Drive; the addresses of its files are not published."""
    return {'page': f'https://drive.google.com/drive/folders/{identity}'}


RESTORMER = 'swz30/Restormer', 'v1.0'
FFTFORMER = 'kkkls/FFTformer', 'pretrain_model'
STRIPFORMER = _folder('18kx_JTj8SzsQk0Wxnkn5_gg_d_iK_LKZ')
CONVIR = _folder('1_5fO2p5xoWO5cUEVoXJ7x3Uhg1AP18FQ')
MHNET = _folder('1qBC3mUoLoCuMyuiseYoZWzvyvImG98TW')
MB_TAYLORFORMER = {'page': 'https://pan.baidu.com/s/11V-wD01rPTHMFFJyjB0R0w (password: pami)'}

TABLE = tuple(
    OfficialWeights(system, name, trained_on, licence=zoo.get(system).licence, **where)
    for system, name, trained_on, where in (
        ('restormer', 'motion', 'GoPro', _release(*RESTORMER, 'motion_deblurring.pth')),
        ('restormer', 'deraining', 'Rain13K', _release(*RESTORMER, 'deraining.pth')),
        ('restormer', 'defocus', 'DPDD', _release(*RESTORMER, 'single_image_defocus_deblurring.pth')),
        ('restormer', 'denoising', 'SIDD', _release(*RESTORMER, 'real_denoising.pth')),
        ('mprnet', 'motion', 'GoPro', _drive('1QwQUVbk6YVOJViCsOKYNykCsdJSVGRtb')),
        ('mprnet', 'deraining', 'Rain13K', _drive('1O3WEJbcat7eTY6doXWeorAbQ1l_WmMnM')),
        ('mprnet', 'denoising', 'SIDD', _drive('1LODPt9kYmxwU98g96UrRA0_Eh5HYcsRw')),
        ('nafnet32', 'motion', 'GoPro', _drive('1Fr2QadtDCEXg6iwWX8OzeZLbHOx2t5Bj')),
        ('nafnet32', 'denoising', 'SIDD', _drive('1lsByk21Xw-6aW7epCwOQxvm6HYCQZPHZ')),
        ('nafnet64', 'motion', 'GoPro', _drive('1S0PVRbyTakYY9a82kujgZLbMihfNBLfC')),
        ('nafnet64', 'reds', 'REDS with JPEG artefacts', _drive('14D4V4raNYIOhETfcuuLI3bGLB-OYIv6X')),
        ('nafnet64', 'denoising', 'SIDD', _drive('14Fht1QQJ2gMlk4N1ERCRuElg8JfjrWWR')),
        ('stripformer', 'motion', 'GoPro', STRIPFORMER),
        ('stripformer', 'realblur_j', 'RealBlur-J', STRIPFORMER),
        ('stripformer', 'realblur_r', 'RealBlur-R', STRIPFORMER),
        ('convir_l', 'motion', 'GoPro', CONVIR),
        ('convir_l', 'rsblur', 'RSBlur', CONVIR),
        ('convir_l', 'deraining', 'Rain13K', CONVIR),
        ('mb_taylorformer_v2_b', 'motion', 'GoPro', MB_TAYLORFORMER),
        ('mb_taylorformer_v2_l', 'motion', 'GoPro', MB_TAYLORFORMER),
        ('mhnet', 'motion', 'GoPro', MHNET),
        ('mhnet', 'deraining', 'Rain13K', MHNET),
        ('drsformer', 'rain200l', 'Rain200L', _drive('1Mm6hWdpjo9eEoNlCHAxd03etY3ks-zyy')),
        ('drsformer', 'rain200h', 'Rain200H', _drive('1mt8ydHE540_qtytger4dVcv6xqZ5YMhh')),
        ('drsformer', 'did', 'DID-Data', _drive('1U_UEGPhYRJ-G10-Dypr7FbwDRGmroAHC')),
        ('drsformer', 'ddn', 'DDN-Data', _drive('1kwPOfufdUf9bCZ-OvwIziw-6ZRdcT2RX')),
        ('drsformer', 'spa', 'SPA-Data', _drive('1i33Zmb1YXdLcalJOIP7YTegjnuTsVcC1')),
        (
            'fftformer',
            'motion',
            'GoPro',
            _release(*FFTFORMER, 'fftformer_GoPro.pth'),
        ),
        ('fftformer', 'realblur', 'RealBlur', _folder('1l_R8_2UKfiQP_BYrgcQrmCBSe_ogwL41')),
        ('ipt', 'denoising50', 'ImageNet', _drive('1KFnYnSxXnXwmEB80pM79qi8Pr_vqkWYZ')),
        ('ipt', 'deraining', 'ImageNet, Rain100L', _folder('1MVSdUX0YBExauG0fFz4ANiWTrq9xZEj7')),
    )
)
"""All published checkpoints.

Addresses are those of the official repositories' READMEs, read on 2026-11-21.  The assets of Restormer's and
FFTformer's releases and IPT's single file are named in the tests of spandrel 0.4.2.  No SHA-256 is published.
"""

Progress = Callable[[int, int | None], None]
"""Called with the bytes downloaded so far and those of the whole file, None where that is unknown."""


def find(key: str) -> OfficialWeights:
    """The checkpoint of a key.

    Args:
        key: `SYSTEM/NAME`, or `SYSTEM` for its first one.

    Raises:
        UserError: there is no such checkpoint; the message names the nearest keys.
    """
    for weights in TABLE:
        if key in (weights.key, weights.system):
            return weights
    keys = [weights.key for weights in TABLE]
    own = [name for name in keys if name.startswith(f'{key.partition("/")[0]}/')]
    hint = f'; there are {", ".join(own)}' if own else did_you_mean(key, keys)
    raise UserError(f'there are no official weights {key!r}{hint or "; see dsgformer weights list"}')


def home() -> Path:
    """The cache folder: `$DSGFORMER_HOME`, else `dsgformer` in the user's cache folder."""
    chosen = os.environ.get('DSGFORMER_HOME')
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'dsgformer'


def place(weights: OfficialWeights) -> Path:
    """The path of a checkpoint in the cache, whether it exists or not."""
    return home() / 'weights' / weights.system / f'{weights.name}.pth'


def cached(weights: OfficialWeights) -> Path | None:
    """The file of a checkpoint, where it is in the cache."""
    path = place(weights)
    return path if path.is_file() else None


def remove(weights: OfficialWeights) -> bool:
    """Delete a checkpoint and any partial download from the cache.

    Returns:
        Whether there was one.
    """
    path = place(weights)
    there = path.is_file()
    for file in (path, _part(path), _about(path)):
        file.unlink(missing_ok=True)
    return there


def get(weights: OfficialWeights, progress: Progress | None = None) -> Path:
    """The file of a checkpoint, downloaded if it is missing, and checked.

    An interrupted download is resumed.  Broken connections are opened again.

    Args:
        weights: an entry of `TABLE`.
        progress: called after each block.

    Returns:
        The file, in the cache.

    Raises:
        UserError: the file cannot be downloaded by a program (the message names the page and the place),
            the network failed, the disk is full, the SHA-256 differs, or the file holds another network.
    """
    path = place(weights)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f'{path}.lock'):
            if not path.is_file():
                _download(weights, path, progress)
                os.replace(_part(path), path)
            _check(weights, path)
    except OSError as error:
        raise UserError(
            f'cannot keep {weights.key} below {home()}: {error.strerror or error}; '
            'set DSGFORMER_HOME to a folder with enough space'
        ) from None
    return path


def get_with_progress(weights: OfficialWeights) -> Path:
    """`get` with a progress bar on standard error; off a terminal, without."""
    with tqdm(desc=weights.key, unit='B', unit_scale=True, disable=None) as bar:

        def show(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return get(weights, show)


def describe(weights: OfficialWeights) -> dict[str, str]:
    """The row of a checkpoint in a list: key, training set, licence, page, state, path."""
    if cached(weights):
        state = f'{place(weights).stat().st_size / 1e6:.0f} MB'
    else:
        state = 'get' if weights.url else 'by hand'
    return {
        'key': weights.key,
        'trained_on': weights.trained_on,
        'state': state,
        'licence': weights.licence,
        'page': weights.page,
        'path': str(place(weights)),
    }


def by_hand(weights: OfficialWeights) -> str:
    """Instructions for a manual download: the page, and the path to save the file at."""
    return f'download it from {weights.page} with a browser and save it as {place(weights)}'


# --- downloading --------------------------------------------------------------------------------------------


def _download(weights: OfficialWeights, path: Path, progress: Progress | None) -> None:
    """Download the whole file to `_part(path)` and check it there."""
    if weights.url is None:
        raise UserError(f'{weights.key} cannot be downloaded by a program; {by_hand(weights)}')
    part, reason = _part(path), ''
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(min(2**attempt, 16) * RETRY_SECONDS)
        try:
            if _fetch(weights.url, part, _about(path), progress):
                break
            reason = 'the connection ended early'
        except _RefusedError as error:
            reason = f'the server answered {error}'
            if error.status not in (408, 429) and error.status < 500:
                raise UserError(f'{weights.key}: {reason}; {by_hand(weights)}') from None
        except requests.RequestException as error:
            reason = f'no connection to {urlsplit(weights.url).hostname} ({type(error).__name__})'
    else:
        raise UserError(f'{weights.key}: {reason}; call the command again, or {by_hand(weights)}')
    with open(part, 'rb') as file:
        head = file.read(512).lstrip().lower()
    if head.startswith((b'<!doctype', b'<html')):
        part.unlink()
        raise UserError(f'{weights.key}: the server sent a page instead of the file; {by_hand(weights)}')
    try:
        _check(weights, part)
    except UserError:
        part.unlink(missing_ok=True)
        _about(path).unlink(missing_ok=True)
        raise


class _RefusedError(Exception):
    """A response with an error status."""

    def __init__(self, response: requests.Response) -> None:
        super().__init__(f'{response.status_code} {response.reason}')
        self.status = response.status_code


def _fetch(url: str, part: Path, about: Path, progress: Progress | None) -> bool:
    """Download the bytes that `part` lacks and append them.

    Returns:
        Whether the file is complete.

    Raises:
        requests.RequestException: no connection.
        _RefusedError: the server answered with an error.
    """
    known = read_json(about)
    have = part.stat().st_size if part.exists() and known.get('url') == url else 0
    headers = {'Accept-Encoding': 'identity'}
    if have:
        headers['Range'] = f'bytes={have}-'
        if known.get('etag'):
            headers['If-Range'] = known['etag']
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code == 416 and have and have == known.get('bytes'):
            return True
        if response.status_code == 416:
            part.unlink(missing_ok=True)
            return False
        if response.status_code >= 400:
            raise _RefusedError(response)
        if response.status_code != 206:
            have = 0  # the file has changed, or the server does not support ranges
        length = response.headers.get('Content-Length')
        total = have + int(length) if length else None
        etag = response.headers.get('ETag', '')
        record = {'url': url, 'bytes': total, 'etag': '' if etag.startswith('W/') else etag}
        _write(about, record)
        if total is not None and shutil.disk_usage(part.parent).free < total - have:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with open(part, 'ab' if have else 'wb') as file:
            for block in response.iter_content(BLOCK):
                file.write(block)
                have += len(block)
                if progress is not None:
                    progress(have, total)
            file.flush()
            os.fsync(file.fileno())
    return total is None or have == total


# --- checking -----------------------------------------------------------------------------------------------


def _check(weights: OfficialWeights, path: Path) -> None:
    """Compare the SHA-256 with the published or recorded one; read a new file as weights of the system.

    Raises:
        UserError: it differs, is damaged, or holds another network.
    """
    digest = sha256(path)
    about = _about(place(weights))
    known = weights.sha256 or read_json(about).get('sha256')
    if known and digest != known:
        raise UserError(
            f'{path} has the SHA-256 {digest[:16]}…, not {known[:16]}… as before; '
            f'call dsgformer weights remove {weights.key} and get it again'
        )
    if known and known == read_json(about).get('checked'):
        return
    try:
        found, _ = zoo.identify(read_checkpoint(path).state)
    except CheckpointError as error:
        raise UserError(f'{weights.key}: {error}') from None
    architecture = zoo.get(weights.system).architecture
    names = {name for name in zoo.names() if zoo.get(name).architecture == architecture}
    if found not in {architecture, *names}:
        raise UserError(f'{weights.key}: the download holds weights of {found}, not of {weights.system}')
    _write(about, {**read_json(about), 'sha256': digest, 'checked': digest})


# --- files of the cache -------------------------------------------------------------------------------------


def _part(path: Path) -> Path:
    return path.with_name(path.name + '.part')


def _about(path: Path) -> Path:
    """The file with the metadata of a download: address, size, ETag, SHA-256."""
    return path.with_name(path.name + '.json')


def _write(path: Path, content: dict[str, Any]) -> None:
    write_text(json.dumps(content, indent=2) + '\n', path)
