"""Systems by name: sizes they take, settings they refuse, checkpoints they recognise."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

from dsgformer_arch import zoo
from dsgformer_arch.restore import final_output, restore
from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.zoo import registry
from dsgformer_arch.zoo.checkpoint import CheckpointError, read_checkpoint
from tests.conformance.check import fill_state_dict
from tests.small_systems import SMALL, TRACELESS, outputs, small

NAMES = [
    'dsgformer', 'dsgformer_s', 'dsgformer_t', 'dsgformer_h', 'mhnet', 'mprnet', 'restormer', 'stripformer',
    'convir_s', 'convir_b', 'convir_l', 'mb_taylorformer_v2_b', 'mb_taylorformer_v2_l',
    'mb_taylorformer_v2_xl', 'nafnet32', 'nafnet64', 'drsformer', 'fftformer', 'ipt',
]  # fmt: skip

IMAGE = torch.from_numpy(np.random.default_rng(0).random((1, 3, 17, 33), dtype=np.float32))


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def save(tmp_path: Path, state: Any, name: str = 'net.pth') -> Path:
    torch.save(state, tmp_path / name)
    return tmp_path / name


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(map(torch.equal, outputs(a, IMAGE), outputs(b, IMAGE)))


# Names and what is known of them.


def test_the_names_are_those_of_the_comparison() -> None:
    assert zoo.names() == NAMES


def test_an_unknown_name_lists_the_nearest() -> None:
    with pytest.raises(zoo.UnknownSystemError, match="no system 'restomer'; did you mean restormer"):
        zoo.get('restomer')
    with pytest.raises(zoo.UnknownSystemError, match='convir_s') as caught:
        zoo.create('convir')
    assert isinstance(caught.value, UserError)
    with pytest.raises(zoo.UnknownSystemError, match='dsgformer, dsgformer_s'):
        zoo.get('')


@pytest.mark.parametrize('name', NAMES)
def test_each_system_has_its_parameters_and_its_source(name: str) -> None:
    system = zoo.get(name)
    network = zoo.create_on_meta(name)
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == system.parameters
    assert isinstance(network, ARCH_REGISTRY.get(system.architecture))
    assert all((system.title, system.authors, system.year, system.release, system.licence))
    assert system.task in ('deblurring', 'deraining')
    assert all(entry.source and 20 < entry.psnr < 50 for entry in system.reported)
    assert len({entry.dataset for entry in system.reported}) == len(system.reported)


def test_reported_numbers_are_those_of_dsgformer_s_table() -> None:
    table = {
        'mprnet': (32.66, 0.959), 'restormer': (32.92, 0.961), 'stripformer': (33.08, 0.962),
        'convir_l': (33.28, 0.963), 'mb_taylorformer_v2_l': (33.24, 0.963), 'dsgformer': (33.72, 0.966),
    }  # fmt: skip
    for name, numbers in table.items():
        gopro = next(entry for entry in zoo.get(name).reported if entry.dataset == 'GoPro')
        assert (gopro.psnr, gopro.ssim) == numbers


# Sizes.


def reflected(image: Tensor, height: int, width: int) -> Tensor:
    below, right = height - image.shape[-2], width - image.shape[-1]
    return torch.from_numpy(np.pad(image.numpy(), ((0, 0), (0, 0), (0, below), (0, right)), mode='reflect'))


@pytest.mark.parametrize('size', [(16, 16), (17, 33)])
@pytest.mark.parametrize('name', SMALL)
def test_any_size_is_padded_by_reflection_and_cropped(name: str, size: tuple[int, int]) -> None:
    network: Any = small(name)
    bare = zoo.network_class(zoo.get(name).architecture)(**{**zoo.get(name).settings, **SMALL[name]}).eval()
    bare.load_state_dict(network.state_dict())
    image = IMAGE[..., : size[0], : size[1]]
    height, width = (
        max(-(-side // network.pad_multiple) * network.pad_multiple, network.min_size) for side in size
    )
    found, expected = outputs(network, image), outputs(bare, reflected(image, height, width))
    assert len(found) == len(expected)
    for output, larger in zip(found, expected, strict=True):
        scale = height // larger.shape[-2]
        crop = larger[..., : -(-size[0] // scale), : -(-size[1] // scale)]
        torch.testing.assert_close(output, crop, rtol=1e-5, atol=1e-6)
    assert final_output(network, found).shape == image.shape


@pytest.mark.parametrize('name', SMALL)
def test_a_system_has_the_keys_of_its_architecture(name: str) -> None:
    network = small(name)
    bare = zoo.network_class(zoo.get(name).architecture)(**{**zoo.get(name).settings, **SMALL[name]})
    assert list(network.state_dict()) == list(bare.state_dict())


@pytest.mark.long
@pytest.mark.parametrize('name', NAMES)
def test_every_system_takes_the_smallest_and_odd_sizes(name: str) -> None:
    network = zoo.create(name).eval()
    for size in ((16, 16), (17, 33)):
        image = IMAGE[..., : size[0], : size[1]]
        assert restore(network, image).shape == image.shape


def test_images_of_other_channels_are_refused_in_one_sentence() -> None:
    network = small('restormer')
    for shape in ((1, 1, 16, 16), (1, 4, 16, 16), (3, 16, 16)):
        with pytest.raises(UserError, match=r'Restormer takes images as \(N, 3, H, W\), not'):
            network(torch.zeros(shape))
    assert small('restormer', inp_channels=6, dual_pixel_task=True)(torch.zeros(1, 6, 9, 9)).shape[1] == 3


@pytest.mark.parametrize('name', SMALL)
def test_systems_can_be_copied_and_pickled(name: str) -> None:
    network = small(name)
    assert same(copy.deepcopy(network), network)
    assert same(pickle.loads(pickle.dumps(network)), network)


@pytest.mark.parametrize('name', ['nafnet32', pytest.param('convir_s', marks=pytest.mark.long)])
def test_padding_compiles_without_a_break(name: str) -> None:
    network = small(name)
    compiled = torch.compile(network, backend='aot_eager', fullgraph=True)
    for found, expected in zip(outputs(compiled, IMAGE), outputs(network, IMAGE), strict=True):
        torch.testing.assert_close(found, expected)


# Settings.


def test_overrides_change_the_system() -> None:
    assert zoo.create('nafnet64', width=8, enc_blk_nums=(1, 1)).intro.out_channels == 8
    assert zoo.create('mprnet', **SMALL['mprnet'], in_c=1).image_channels == 1


def test_settings_that_the_architecture_does_not_have_are_refused() -> None:
    with pytest.raises(UserError, match="NAFNet has no setting 'widht'; did you mean width"):
        zoo.create('nafnet32', widht=8)
    with pytest.raises(UserError, match="MPRNet has no setting 'n_feats'; did you mean n_feat"):
        zoo.create('mprnet', n_feats=8)
    with pytest.raises(UserError, match=r'DSGformer cannot be built .* choose one of relu2'):
        zoo.create('dsgformer', score='tanh')


# Local pooling.


def test_local_pooling_keeps_keys_and_changes_only_larger_images() -> None:
    plain = small('nafnet32')
    local = zoo.create('nafnet32', tlc=32, **SMALL['nafnet32']).eval()
    local.load_state_dict(plain.state_dict())
    larger = torch.rand(1, 3, 61, 90, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(local(IMAGE), plain(IMAGE))
    assert (local(larger) - plain(larger)).abs().max() > 1e-3


def test_local_pooling_is_refused_where_nothing_is_global() -> None:
    with pytest.raises(UserError, match=r'ConvIR has no local pooling; .* nafnet64'):
        zoo.create('convir_s', tlc=256)


@pytest.mark.parametrize('name', SMALL)
def test_systems_state_correctly_whether_local_pooling_applies(name: str) -> None:
    if zoo.get(name).tlc:
        small(name, tlc=(32, 48))
    else:
        with pytest.raises(UserError, match='no local pooling'):
            small(name, tlc=(32, 48))


# Checkpoints.


@pytest.mark.parametrize('name', SMALL)
def test_a_checkpoint_identifies_the_system_and_its_sizes(name: str, tmp_path: Path) -> None:
    network = small(name)
    state = network.state_dict()
    architecture, settings = zoo.identify(state)
    assert architecture == zoo.get(name).architecture
    told = {**settings, **TRACELESS.get(name, {})}
    for key, value in SMALL[name].items():
        assert np.array_equal(told[key], value), key
    path = save(tmp_path, {'params_ema': {f'module.{key}': tensor for key, tensor in state.items()}})
    loaded = zoo.load(path, **TRACELESS.get(name, {})).eval()
    assert type(loaded) is type(network)
    assert same(loaded, network)


@pytest.mark.parametrize('name', [name for name in NAMES if name != 'ipt'])
def test_the_published_sizes_are_recognised_by_name(name: str) -> None:
    found, settings = zoo.identify(zoo.create_on_meta(name).state_dict())
    assert found == name
    assert (
        settings.items()
        >= {
            key: value
            for key, value in zoo.get(name).settings.items()
            if not isinstance(value, (tuple, list))
        }.items()
    )


@pytest.mark.long
def test_ipt_is_recognised_by_name() -> None:
    assert zoo.identify(zoo.create('ipt').state_dict())[0] == 'ipt'


def test_settings_without_a_trace_are_those_of_the_nearest_system() -> None:
    state = small('mb_taylorformer_v2_b').state_dict()
    assert tuple(zoo.identify(state)[1]['offset_clamp']) == (-3, 3)


def test_weights_of_a_preset_alone_rebuild_it_with_its_own_k_n(tmp_path: Path) -> None:
    """`ratios` leave no trace in the weights: they are those of the system of these sizes."""
    network = zoo.create('dsgformer_h', output_init='random').eval()
    loaded: Any = zoo.load(save(tmp_path, network.state_dict())).eval()
    assert loaded.settings['ratios'] == ('1/8', '1/4', '1/3', '1/2')
    assert same(loaded, network)
    state = zoo.create('dsgformer_t').state_dict()
    assert zoo.load(save(tmp_path, state)).settings['ratios'] == ('1/2', '2/3', '3/4', '4/5')


def test_half_precision_weights_are_loaded_as_float32(tmp_path: Path) -> None:
    network = small('dsgformer')
    path = save(tmp_path, {key: tensor.bfloat16() for key, tensor in network.state_dict().items()})
    loaded = zoo.load(path)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}


def test_a_checkpoint_of_another_system_is_refused_with_the_nearest(tmp_path: Path) -> None:
    path = save(tmp_path, zoo.create('dsgformer_t').state_dict())
    expected = (
        r'net.pth does not fit dsgformer_s: encoder.2.4.norm.weight is missing; .* and \d+ more; '
        r'the nearest system is dsgformer_t with 100% of the entries in common'
    )
    with pytest.raises(CheckpointError, match=expected):
        zoo.load(path, 'dsgformer_s')
    with pytest.raises(
        CheckpointError, match=r'does not fit nafnet32: intro.weight is missing; .* dsgformer_t'
    ):
        zoo.load(path, 'nafnet32')


def test_loading_what_fits(tmp_path: Path) -> None:
    network = small('nafnet32')
    state = network.state_dict()
    del state['ending.bias']
    path = save(tmp_path, state)
    with pytest.raises(CheckpointError, match=r'does not fit NAFNet: ending.bias is missing; the nearest'):
        zoo.load(path)
    loaded = zoo.load(path, strict=False)
    assert torch.equal(loaded.state_dict()['intro.weight'], state['intro.weight'])
    with pytest.raises(CheckpointError, match='does not fit mhnet'):
        zoo.load(path, 'mhnet', strict=False)


def test_weights_of_no_system_are_refused_with_the_nearest_and_the_first_keys(tmp_path: Path) -> None:
    state = {key: tensor for key, tensor in small('nafnet32').state_dict().items() if 'encoders' not in key}
    path = save(tmp_path, {f'generator.{key}': tensor for key, tensor in state.items()})
    with pytest.raises(
        CheckpointError, match=r'net.pth: these are the weights of no system known here'
    ) as caught:
        zoo.load(path)
    assert 'the nearest is' in str(caught.value)
    assert 'is missing' in str(caught.value)


def test_weights_without_the_layers_that_tell_sizes_are_refused(tmp_path: Path) -> None:
    state = small('drsformer').state_dict()
    del state['latent.0.ffn.project_out.weight']
    with pytest.raises(CheckpointError, match=r"net.pth: these are weights of DRSformer, but 'latent.0"):
        zoo.load(save(tmp_path, state))


@pytest.mark.parametrize(
    ('name', 'overrides', 'told'),
    [
        ('restormer', {'inp_channels': 1, 'out_channels': 1}, 'takes images of 1 channels'),
        ('nafnet32', {'img_channel': 4}, 'takes images of 4 channels'),
        ('restormer', {'inp_channels': 6, 'dual_pixel_task': True}, 'takes images of 6 channels'),
        ('mprnet', {'in_c': 3, 'out_c': 1}, 'returns images of 1 channels'),
    ],
)
def test_weights_for_other_channels_are_refused(
    name: str, overrides: dict[str, Any], told: str, tmp_path: Path
) -> None:
    path = save(tmp_path, zoo.create(name, **{**SMALL[name], **overrides}).state_dict())
    with pytest.raises(CheckpointError, match=f'net.pth: its network {told} .*, not the 3 of RGB'):
        zoo.load(path)


def test_grey_weights_of_a_network_for_rgb_only_are_refused(tmp_path: Path) -> None:
    state = small('dsgformer').state_dict()
    state['head.weight'] = state['head.weight'][:, :1]
    state['tail.weight'] = state['tail.weight'][:1]
    with pytest.raises(CheckpointError, match='takes images of 1 channels'):
        zoo.load(save(tmp_path, state))


# Safetensors that say whose they are.


def test_converting_keeps_weights_and_states_system_and_settings(tmp_path: Path) -> None:
    network = zoo.create('dsgformer_t')
    path = save(tmp_path, {'params': network.state_dict(), 'iter': 7})
    target = tmp_path / 'net.safetensors'
    assert zoo.convert(path, target)[0] == 'dsgformer_t'
    checkpoint = read_checkpoint(target)
    assert checkpoint.metadata['system'] == 'dsgformer_t'
    assert checkpoint.metadata['format'] == 'pt'
    assert json.loads(checkpoint.metadata['settings'])['num_blocks'] == [1, 2, 4, 4]
    assert same(zoo.load(target), network)
    assert sorted(file.name for file in tmp_path.iterdir()) == ['net.pth', 'net.safetensors']


def test_settings_in_the_metadata_come_before_the_nearest_system_s(tmp_path: Path) -> None:
    network = small('dsgformer', score='softmax')
    path = save(tmp_path, network.state_dict())
    target = tmp_path / 'net.safetensors'
    zoo.convert(path, target)
    assert not same(zoo.load(target), network)
    from safetensors.torch import save_file

    settings = {**zoo.identify(network.state_dict())[1], 'score': 'softmax'}
    for name in ('DSGformer', 'dsgformer'):
        metadata = {'system': name, 'settings': json.dumps(settings)}
        save_file(network.state_dict(), target, metadata)
        assert same(zoo.load(target), network)
    assert same(zoo.load(target, 'dsgformer'), network)
    with pytest.raises(CheckpointError, match='does not fit restormer'):
        zoo.load(target, 'restormer')


@pytest.mark.parametrize(
    ('metadata', 'told'),
    [
        (
            {'system': 'gsdformer', 'settings': '{}'},
            "by its metadata, there is no system 'gsdformer'; did you mean",
        ),
        ({'system': 'dsgformer', 'settings': '[1]'}, 'settings that are no JSON object'),
        ({'system': 'dsgformer', 'settings': '{'}, 'settings that are no JSON object'),
        ({'system': 'dsgformer', 'settings': '{"depth": 3}'}, "no setting 'depth'"),
    ],
)
def test_wrong_metadata_are_refused(metadata: dict[str, str], told: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(small('dsgformer').state_dict(), tmp_path / 'net.safetensors', metadata)
    with pytest.raises(UserError, match=told):
        zoo.load(tmp_path / 'net.safetensors')


def test_converting_refuses_what_loading_refuses_and_leaves_nothing(tmp_path: Path) -> None:
    path = save(tmp_path, {**small('nafnet32').state_dict(), 'extra': torch.zeros(1)})
    for target in ('net.safetensors', 'net.pth2', 'absent/net.safetensors'):
        with pytest.raises(UserError):
            zoo.convert(path, tmp_path / target)
    clean = save(tmp_path, small('nafnet32').state_dict(), 'clean.pth')
    with pytest.raises(UserError, match='cannot write'):
        zoo.convert(clean, tmp_path / 'absent' / 'net.safetensors')
    with pytest.raises(CheckpointError, match='does not fit fftformer'):
        zoo.convert(clean, tmp_path / 'net.safetensors', 'fftformer')
    assert sorted(file.name for file in tmp_path.iterdir()) == ['clean.pth', 'net.pth']


# Settings that travel with the weights.


def written(tmp_path: Path, network: Any, name: str = 'net.pth', **stated: Any) -> Path:
    """A checkpoint as training writes it."""
    settings = {'type': type(network).__name__, **network.settings, **stated}
    return save(tmp_path, {'params': network.state_dict(), 'network': settings}, name)


@pytest.mark.parametrize('variant', [{'score': 'softmax'}, {'score': 'relu'}, {'gate': 'simplegate'}])
def test_variants_that_leave_no_trace_are_loaded_as_trained(tmp_path: Path, variant: dict[str, Any]) -> None:
    network = small('dsgformer', **variant)
    path = written(tmp_path, network)
    assert same(zoo.load(path), network)
    assert not same(zoo.load(save(tmp_path, network.state_dict(), 'bare.pth')), network)
    assert zoo.identify(path)[1].items() >= variant.items()
    zoo.convert(path, tmp_path / 'net.safetensors')
    assert same(zoo.load(tmp_path / 'net.safetensors'), network)
    assert same(zoo.load(written(tmp_path, zoo.load(path), 'again.pth')), network)


def test_stated_settings_must_be_those_of_the_system_that_is_asked_for(tmp_path: Path) -> None:
    network = zoo.create('dsgformer_t', score='softmax')
    path = written(tmp_path, network)
    assert same(zoo.load(path, 'dsgformer_t'), network)
    with pytest.raises(CheckpointError, match='does not fit dsgformer_s: it states that num_blocks is'):
        zoo.load(path, 'dsgformer_s')
    with pytest.raises(CheckpointError, match='does not fit nafnet32: it states that it is a DSGformer'):
        zoo.load(path, 'nafnet32')


@pytest.mark.parametrize(
    ('stated', 'told'),
    [
        (
            {'width': 8},
            r'net.pth: the settings that it states contradict its weights: head.weight is 16×3×3×3',
        ),
        ({'attention': 'mdta'}, 'contradict its weights: .* is not expected'),
        ({'gate': 'gelu'}, 'contradict its weights: .*mask is not expected'),
        ({'type': 'NAFNet', 'width': 16}, 'NAFNet has no setting'),
        ({'type': 'Absent'}, r"net.pth: by its metadata, there is no system 'Absent'"),
        ({'heads': [0, 0, 0, 0]}, 'DSGformer cannot be built'),
        ({'width': 10**12}, 'DSGformer cannot be built|contradict its weights'),
        ({'width': 'wide'}, 'DSGformer cannot be built'),
        ({'num_blocks': [10**9, 1, 1, 1]}, 'its settings ask for 1000000003 blocks'),
        ({'num_blocks': [1] * 10**4}, 'its settings ask for 10000 blocks'),
        ({'num_blocks': None}, 'DSGformer cannot be built'),
    ],
)
def test_stated_settings_that_contradict_the_weights_are_refused(
    stated: dict[str, Any], told: str, tmp_path: Path
) -> None:
    path = written(tmp_path, small('dsgformer'), **stated)
    for use in (zoo.load, zoo.identify, lambda path: zoo.convert(path, tmp_path / 'net.safetensors')):
        with pytest.raises(UserError, match=told) as caught:
            use(path)
        assert '\n' not in str(caught.value)
    assert not (tmp_path / 'net.safetensors').exists()


@pytest.mark.parametrize(
    'key', ['encoder.0.30000.norm.weight', f'encoder.0.{10**30}.norm.weight', 'encoder.0.x.norm.weight']
)
def test_names_of_blocks_that_are_not_there_are_refused_at_once(key: str, tmp_path: Path) -> None:
    state = {**small('dsgformer').state_dict(), key: torch.ones(16)}
    with pytest.raises(CheckpointError, match=r'net.pth: these are'):
        zoo.load(save(tmp_path, state))
    network = small('nafnet32').state_dict()
    with pytest.raises(CheckpointError, match=r'net.pth: these are'):
        zoo.load(save(tmp_path, {**network, 'encoders.999999999.0.beta': torch.ones(1)}))


def test_loading_in_part_does_not_allocate_what_the_file_does_not_hold(tmp_path: Path) -> None:
    network = small('dsgformer')
    state = {'head.bias': torch.zeros(4096), 'tail.bias': torch.zeros(3)}
    settings = {'type': 'DSGformer', **network.settings, 'width': 4096, 'num_blocks': [1, 1, 0, 0]}
    path = save(tmp_path, {'params': state, 'network': settings})
    with pytest.raises(CheckpointError, match=r'ask for .* parameters, but it holds 4,099'):
        zoo.load(path, strict=False)


def test_a_key_of_the_file_can_be_chosen(tmp_path: Path) -> None:
    networks = {'params': small('nafnet32'), 'best': fill_state_dict(small('nafnet32'), 9, 0.7)}
    path = save(tmp_path, {key: network.state_dict() for key, network in networks.items()})
    for key, network in networks.items():
        assert same(zoo.load(path, param_key=key), network)
    with pytest.raises(CheckpointError, match="no entry 'parms'; it has best, params"):
        zoo.load(path, param_key='parms')


# Weights that the package ships.


def test_shipped_weights_are_verified_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = zoo.create('dsgformer_t', score='softmax')
    path = written(tmp_path, network, 'tiny.pth')
    weights = zoo.Weights('tiny.pth', hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(registry, 'WEIGHTS', tmp_path)
    monkeypatch.setitem(registry._BY_NAME, 'dsgformer_t', replace(zoo.get('dsgformer_t'), weights=weights))
    assert same(zoo.create('dsgformer_t', pretrained=True), network)
    path.write_bytes(path.read_bytes()[:-1] + b'!')
    with pytest.raises(CheckpointError, match=r'tiny.pth has the SHA-256 .* install the package again'):
        zoo.create('dsgformer_t', pretrained=True)
    path.unlink()
    with pytest.raises(UserError, match='cannot read'):
        zoo.create('dsgformer_t', pretrained=True)
    with pytest.raises(UserError, match=r'the package has no weights of ipt, but of .*dsgformer_t'):
        zoo.create('ipt', pretrained=True)


def test_every_shipped_checkpoint_is_the_published_one() -> None:
    for name in zoo.names():
        if zoo.get(name).weights:
            zoo.create(name, pretrained=True)
