"""The node package, imported by its path as ComfyUI imports what is in `custom_nodes`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from dsgformer_arch import Deblurrer, zoo
from dsgformer_arch.utils.errors import UserError

FOLDER = Path(__file__).resolve().parents[2] / 'dsgformer_arch' / 'inference' / 'comfyui'


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[ModuleType]:
    linked = tmp_path / 'custom_nodes' / 'dsgformer'
    linked.parent.mkdir()
    linked.symlink_to(FOLDER)
    name = str(linked).replace('.', '_x_')  # the name that ComfyUI gives a package
    spec = importlib.util.spec_from_file_location(name, linked / '__init__.py')
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


def run(nodes: ModuleType, image: torch.Tensor, **changed: object) -> torch.Tensor:
    """Call the node as ComfyUI does: by its `FUNCTION`, with its widgets' defaults."""
    kind = nodes.NODE_CLASS_MAPPINGS['DSGformerDeblur']
    settings: dict[str, object] = {}
    for name, (widget, *options) in kind.INPUT_TYPES()['required'].items():
        if name != 'image':
            settings[name] = widget[0] if isinstance(widget, list) else options[0]['default']
    result = getattr(kind(), kind.FUNCTION)(image=image, **{**settings, **changed})
    assert isinstance(result, tuple)
    assert len(result) == len(kind.RETURN_TYPES) == 1
    return result[0]


def images(count: int = 2, channels: int = 3) -> torch.Tensor:
    return torch.rand(count, 40, 56, channels, generator=torch.Generator().manual_seed(0))


def test_a_batch_is_restored_as_by_the_deblurrer(nodes: ModuleType) -> None:
    batch = images()
    restored = run(nodes, batch)
    assert (restored.shape, restored.dtype) == (batch.shape, torch.float32)
    assert 0 <= restored.min() <= restored.max() <= 1
    for before, after in zip(batch, restored, strict=True):
        expected = Deblurrer('dsgformer_h').restore(before.numpy())
        np.testing.assert_allclose(after.numpy(), expected, atol=1e-5)
        assert np.abs(expected - before.numpy()).max() > 1e-3


def test_strength_tile_and_alpha(nodes: ModuleType) -> None:
    batch = images(1)
    torch.testing.assert_close(run(nodes, batch, strength=0.0), batch)
    half, whole = (run(nodes, batch, strength=strength) for strength in (0.5, 1.0))
    torch.testing.assert_close(half, (batch + whole) / 2, rtol=0, atol=1e-5)
    wide = torch.rand(1, 64, 160, 3, generator=torch.Generator().manual_seed(0))
    expected = Deblurrer('dsgformer_h', tile=64).restore(wide[0].numpy())
    np.testing.assert_allclose(run(nodes, wide, tile=64)[0].numpy(), expected, atol=1e-5)
    with_alpha = images(1, channels=4)
    assert torch.equal(run(nodes, with_alpha)[..., 3], with_alpha[..., 3])


def test_values_outside_the_range_are_clipped_before(nodes: ModuleType) -> None:
    batch = images(1) * 1.2 - 0.1
    torch.testing.assert_close(run(nodes, batch), run(nodes, batch.clamp(0, 1)))


def test_weights_of_your_own_and_the_network_stays_loaded(nodes: ModuleType, tmp_path: Path) -> None:
    network = zoo.create('dsgformer_h', num_blocks=(1, 1, 1, 1)).eval()
    network.save_pretrained(tmp_path / 'net')
    weights = str(tmp_path / 'net' / 'model.safetensors')
    run(nodes, images(1), weights=weights)
    run(nodes, images(1), weights=weights, strength=0.5)
    information = nodes._deblurrer.cache_info()
    assert (information.hits, information.misses) == (1, 1)
    with pytest.raises(UserError, match='no such file of weights'):
        run(nodes, images(1), weights=str(tmp_path / 'none.pth'))


def test_every_model_has_weights(nodes: ModuleType) -> None:
    found = nodes.models()
    assert found[0] == 'dsgformer_h'
    assert len(set(found)) == len(found)
    assert {name.partition('/')[0] for name in found} <= set(zoo.names())
    assert set(nodes.NODE_DISPLAY_NAME_MAPPINGS) == set(nodes.NODE_CLASS_MAPPINGS)
