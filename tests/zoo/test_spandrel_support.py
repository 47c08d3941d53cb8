"""spandrel opens our files as ours, and its own as its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import spandrel
import torch
from spandrel import ImageModelDescriptor, ModelLoader, ModelTiling

from dsgformer_arch import zoo
from dsgformer_arch.restore import restore
from dsgformer_arch.zoo import spandrel_support
from tests.small_systems import SMALL, small

spandrel_support.register()

OURS = [name for name in SMALL if zoo.get(name).architecture in spandrel_support.own_architectures()]
THEIRS = [name for name in SMALL if name not in OURS]


def opened(state: dict[str, Any]) -> ImageModelDescriptor[Any]:
    found = ModelLoader().load_from_state_dict(state)
    assert isinstance(found, ImageModelDescriptor)
    return found


def test_the_six_networks_that_are_written_here_join_the_registry() -> None:
    assert {zoo.get(name).architecture for name in OURS} == {
        'DSGformer', 'MHNet', 'Stripformer', 'ConvIR', 'MBTaylorFormerV2', 'DRSformer',
    }  # fmt: skip
    assert all(
        architecture in spandrel.MAIN_REGISTRY for architecture in spandrel_support.own_architectures()
    )


def test_registering_again_changes_nothing() -> None:
    before = [support.architecture for support in spandrel.MAIN_REGISTRY]
    spandrel_support.register()
    assert [support.architecture for support in spandrel.MAIN_REGISTRY] == before


@pytest.mark.parametrize('name', OURS)
def test_our_files_are_opened_as_ours(name: str, tmp_path: Path) -> None:
    network = small(name)
    torch.save({'params': network.state_dict()}, tmp_path / 'net.pth')
    model = ModelLoader().load_from_file(tmp_path / 'net.pth')
    architecture = zoo.get(name).architecture
    assert model.architecture.id == architecture
    assert type(model.model) is zoo.network_class(architecture)
    assert all(torch.equal(a, b) for a, b in zip(model.model.parameters(), network.parameters(), strict=True))
    assert (model.purpose, model.scale, model.input_channels, model.output_channels) == (
        'Restoration',
        1,
        3,
        3,
    )


@pytest.mark.parametrize('name', THEIRS)
def test_spandrel_s_networks_stay_spandrel_s(name: str) -> None:
    model = opened(dict(small(name).state_dict()))
    assert model.architecture.id == zoo.get(name).architecture
    assert type(model.model).__module__.split('.')[0] in ('spandrel', 'spandrel_extra_arches')


@pytest.mark.parametrize('name', SMALL)
def test_no_two_architectures_claim_the_same_weights(name: str) -> None:
    state = dict(small(name).state_dict())
    claiming = [s.architecture.id for s in spandrel.MAIN_REGISTRY if s.detect(state)]
    assert claiming == [zoo.get(name).architecture]


@pytest.mark.parametrize('size', [(30, 45), (5, 3)])
@pytest.mark.parametrize('name', [name for name in OURS if name != 'convir_s'])
def test_a_call_restores_images_of_any_size(name: str, size: tuple[int, int]) -> None:
    network = small(name)
    model = opened(dict(network.state_dict()))
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1))
    expected = restore(network, image).clamp(0, 1)
    torch.testing.assert_close(model(image), expected, rtol=1e-4, atol=1e-5)
    assert 0.01 < (expected - image).abs().mean() < 1


@pytest.mark.long
def test_of_several_outputs_a_call_gives_the_final_one() -> None:
    state = dict(small('convir_s').state_dict())
    image = torch.rand(1, 3, 30, 45, generator=torch.Generator().manual_seed(1))
    model = opened(state)
    assert model(image).shape == image.shape


@pytest.mark.parametrize('name', [name for name in OURS if name != 'convir_s'])
def test_bfloat16_models_restore_nearly_the_same(name: str) -> None:
    state = dict(small(name).state_dict())
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected = opened(state)(image)
    found = opened(state).bfloat16()(image.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().mean() < 0.02


def test_a_file_that_states_its_settings_is_opened_with_them(tmp_path: Path) -> None:
    """ModelLoader hands over tensors only, and the score leaves no trace in them."""
    network = small('dsgformer', score='softmax')
    content = {'params': network.state_dict(), 'network': {'type': 'DSGformer', **network.settings}}
    torch.save(content, tmp_path / 'net.pth')
    image = torch.rand(1, 3, 30, 45, generator=torch.Generator().manual_seed(1))
    expected = restore(network, image).clamp(0, 1)
    model = spandrel_support.load_file(tmp_path / 'net.pth')
    assert model.architecture.id == 'DSGformer'
    torch.testing.assert_close(model(image), expected, rtol=1e-4, atol=1e-5)
    without = ModelLoader().load_from_file(tmp_path / 'net.pth')
    assert isinstance(without, ImageModelDescriptor)
    assert (without(image) - expected).abs().max() > 1e-4


def test_descriptors_know_which_networks_see_the_whole_image() -> None:
    tiling = {
        name: opened(dict(small(name).state_dict())).tiling for name in ('restormer', 'convir_s', 'mhnet')
    }
    assert tiling['convir_s'] is ModelTiling.SUPPORTED
    assert tiling['mhnet'] is ModelTiling.DISCOURAGED
