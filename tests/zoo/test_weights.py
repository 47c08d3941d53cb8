"""The weights in the package: those that ship, and what is done about damaged ones."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from dsgformer_arch import zoo
from dsgformer_arch.data.image_files import read_image
from dsgformer_arch.restore import restore
from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.zoo import registry
from dsgformer_arch.zoo.checkpoint import CheckpointError
from dsgformer_arch.zoo.systems import DSGFORMER, Weights
from tests.trees import SHARED, random_image

LARGEST = 6_000_000
"""Bytes of a file."""


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system `tiny` whose weights, in float16, are in a folder of their own."""
    settings = {'width': 4, 'num_blocks': (1, 1, 1, 1), 'heads': (1, 1, 1, 1), 'patch': 2}
    system = replace(DSGFORMER, name='tiny', settings=settings, reported=())
    monkeypatch.setitem(registry._BY_NAME, 'tiny', system)
    torch.manual_seed(3)
    torch.save(zoo.create('tiny').state_dict(), tmp_path / 'net.pth')
    path = tmp_path / 'tiny.safetensors'
    zoo.convert(tmp_path / 'net.pth', path, 'tiny', torch.float16)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    complete = replace(system, weights=Weights(path.name, digest))
    monkeypatch.setitem(registry._BY_NAME, 'tiny', complete)
    monkeypatch.setattr(registry, 'WEIGHTS', tmp_path)
    return path


def test_pretrained_loads_the_weights_as_float32(published: Path) -> None:
    torch.manual_seed(3)
    expected = zoo.create('tiny').state_dict()
    found = zoo.create('tiny', pretrained=True).state_dict()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name].half().float()), name
    fresh = zoo.create('tiny').state_dict()
    assert not all(torch.equal(fresh[name], found[name]) for name in found)


def test_float16_halves_the_file(published: Path) -> None:
    whole = published.with_name('whole.safetensors')
    zoo.convert(published.with_name('net.pth'), whole, 'tiny')
    assert published.stat().st_size < 0.75 * whole.stat().st_size


def test_a_changed_file_is_refused(published: Path) -> None:
    content = bytearray(published.read_bytes())
    content[-1] ^= 1
    published.write_bytes(content)
    with pytest.raises(CheckpointError, match='has the SHA-256'):
        zoo.create('tiny', pretrained=True)
    published.unlink()
    with pytest.raises(UserError, match=r'tiny\.safetensors.*install the package again'):
        zoo.create('tiny', pretrained=True)


def test_settings_that_do_not_fit_are_refused(published: Path) -> None:
    with pytest.raises(CheckpointError, match=r'tiny\.safetensors'):
        zoo.create('tiny', pretrained=True, width=8)


def test_a_system_without_weights_says_which_have_some() -> None:
    with pytest.raises(UserError, match='no weights of restormer'):
        zoo.create('restormer', pretrained=True)


@pytest.mark.parametrize('name', zoo.shipped())
def test_shipped_weights_are_small_whole_and_keep_flat_areas(name: str) -> None:
    """Under 6 MB, of the digest in the table, and the flat half of an image comes back flat."""
    weights = zoo.get(name).weights
    assert weights is not None
    path = registry.WEIGHTS / weights.file
    assert path.stat().st_size < LARGEST
    network = zoo.create(name, pretrained=True).eval()
    image = torch.from_numpy(cv2.blur(random_image(3, 256, 320), (9, 1))).permute(2, 0, 1)[None].float() / 255
    image[..., :128, :] = 0.5
    with torch.no_grad():
        change = (network(image) - image).abs()
    assert change[..., :112, :].max() < 0.01
    assert change[..., 128:, :].max() > 0.01
    assert zoo.load(path).settings == network.settings


@pytest.mark.skipif(not (SHARED / 'data' / 'gopro_pair').is_dir(), reason='the GoPro pair is not here')
def test_shipped_weights_sharpen_a_real_pair_and_leave_its_sharp_frame_alone() -> None:
    """At least 0.5 dB on a real GoPro frame, and 40 dB of the sharp frame against itself (issue 11)."""
    network = zoo.create('dsgformer_h', pretrained=True).eval()
    blurred, sharp = (
        read_image(SHARED / 'data' / 'gopro_pair' / kind / 'istanbul.png') for kind in ('blur', 'sharp')
    )

    def restored(image: np.ndarray) -> np.ndarray:
        tensor = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
        return (restore(network, tensor)[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()

    assert psnr(restored(blurred), sharp) >= psnr(blurred, sharp) + 0.5
    assert psnr(restored(sharp), sharp) >= 40


def psnr(image: np.ndarray, sharp: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean(((image.astype(float) - sharp) / 255) ** 2) + 1e-12))
