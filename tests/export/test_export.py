"""Exported files compute what the networks compute, and nothing is left of those that do not."""

from __future__ import annotations

import itertools
import json
import re
import zipfile
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from spandrel.architectures.FFTformer.__arch.fftformer_arch import DFFN, FSAS
from torch import nn

from dsgformer_arch import export as package
from dsgformer_arch import zoo
from dsgformer_arch.archs.dsgformer_arch import DFGB, LayerNorm
from dsgformer_arch.archs.layers.network import RestorationNetwork
from dsgformer_arch.cli import dsgformer
from dsgformer_arch.cli.commands import export as command
from dsgformer_arch.export import Interface, darktable_file, export, formats, onnx_file, program_file
from dsgformer_arch.export.image_to_image import INPUT, OUTPUT, ImageToImage
from dsgformer_arch.export.substitutes import ExportDFGB, ExportFSAS, ExportLayerNorm
from dsgformer_arch.export.verify import TOLERANCES, VerificationError, verify
from tests.conformance.check import fill_state_dict
from tests.small_systems import small

needs_runtime = pytest.mark.skipif(
    not all(map(formats.importlib.util.find_spec, formats.FORMATS['onnx'].requires)),
    reason='the packages of the extra `export` are not installed',
)


LONGER = [pytest.param(name, marks=pytest.mark.long) for name in ('dsgformer_h', 'fftformer')]
"""Systems whose graphs take longer to make; both have Fourier transforms."""


def network(name: str) -> RestorationNetwork:
    """A small network of a system; `dsgformer_h` for one of DSGformer with patches."""
    if name != 'dsgformer_h':
        return cast(RestorationNetwork, small(name))
    torch.manual_seed(0)
    smallest = zoo.create(name, num_blocks=(1, 1, 1, 1)).eval()
    return cast(RestorationNetwork, fill_state_dict(smallest, seed=3, gain=0.7))


@pytest.fixture
def tracing_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail at once where the first exporter fails."""
    monkeypatch.delitem(onnx_file.EXPORTERS, 'torch.export')


def test_dfgb_for_export_equals_the_fourier_transform_at_any_size() -> None:
    torch.manual_seed(0)
    gate = DFGB(6)
    nn.init.normal_(gate.mask)
    for height, width in ((8, 16), (13, 9), (3, 40)):
        U = torch.randn(2, 6, height, width)
        torch.testing.assert_close(ExportDFGB(gate)(U), gate(U), rtol=1e-5, atol=1e-5)


def test_fftformer_for_export_equals_its_fourier_transforms() -> None:
    """Filters and products of spectra, with masks and kernels that are not symmetric."""
    found = network('fftformer')
    image = torch.rand(2, 3, 32, 64)
    with torch.no_grad():
        expected = found(image)
        restored = ImageToImage(found, exported=True)(image)
    assert not any(isinstance(module, (DFFN, FSAS)) for module in ImageToImage(found, True).modules())
    torch.testing.assert_close(restored, expected, rtol=0, atol=2e-5)


def test_layer_norm_for_export_equals_the_reference() -> None:
    norm = cast(LayerNorm, fill_state_dict(LayerNorm(5), seed=1, gain=1))
    x = torch.randn(2, 5, 3, 4)
    torch.testing.assert_close(ExportLayerNorm(norm)(x), norm(x))


def test_the_network_that_is_exported_is_a_copy() -> None:
    original = network('dsgformer')
    before = [type(module) for module in original.modules()]
    module = ImageToImage(original, exported=True)
    assert [type(entry) for entry in original.modules()] == before
    assert not any(isinstance(entry, DFGB) for entry in module.modules())
    assert all(parameter.requires_grad for parameter in original.parameters())


@pytest.mark.parametrize('name', ['mprnet', 'stripformer'])
def test_the_interface_hides_how_a_network_returns_and_takes_images(name: str) -> None:
    """MPRNet returns three images, Stripformer takes them less 0.5."""
    found = network(name)
    image = torch.rand(1, 3, found.min_size, found.min_size)
    with torch.no_grad():
        outputs: Any = found(image - found.input_offset)
        expected = outputs if isinstance(outputs, torch.Tensor) else outputs[found.final_output]
        restored = ImageToImage(found, exported=True)(image)
    torch.testing.assert_close(restored, expected + found.input_offset, rtol=1e-4, atol=1e-5)


def test_sizes_of_the_verification_differ_from_those_of_the_export_and_suit_the_network() -> None:
    for multiple, least, block in (
        (1, 1, 0),
        (8, 8, 0),
        (8, 8, 64),
        (16, 16, 128),
        (16, 64, 0),
        (128, 256, 0),
    ):
        interface = Interface('system', {}, 'fp32', multiple, least, block)
        exported = interface.export_shape()
        assert len(interface.verification_shapes()) == 2
        for shape in interface.verification_shapes():
            assert not set(shape[2:]) & set(exported[2:])
            assert all(side % multiple == 0 and side >= least for side in shape[2:])
        assert all(
            side > block for shape in (exported, interface.verification_shapes()[1]) for side in shape[2:]
        )


def test_verification_finds_a_wrong_size_a_wrong_value_nan_and_a_runtime_that_fails() -> None:
    found = network('nafnet32')
    interface = Interface.of(found, 'nafnet32', 'fp32')
    right = ImageToImage(found, exported=False)

    def run(image: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return cast(np.ndarray, right(torch.from_numpy(image)).numpy())

    def at_one_pixel(image: np.ndarray, error: float) -> np.ndarray:
        restored = run(image)
        restored[0, 1, 2, 3] += error
        return restored

    def refuses(image: np.ndarray) -> np.ndarray:
        raise RuntimeError('no such operator')

    assert verify(run, found, interface, 'it') == 0
    assert 0 < verify(lambda image: at_one_pixel(image, 5e-5), found, interface, 'it') < 1e-4
    with pytest.raises(VerificationError, match=r'differs from PyTorch by 0[.]0002'):
        verify(lambda image: at_one_pixel(image, 2e-4), found, interface, 'it')
    with pytest.raises(VerificationError, match='nan'):
        verify(lambda image: at_one_pixel(image, np.nan), found, interface, 'it')
    with pytest.raises(VerificationError, match=r'returns \(1, 3'):
        verify(lambda image: run(image)[..., 1:], found, interface, 'it')
    with pytest.raises(VerificationError, match='no such operator'):
        verify(refuses, found, interface, 'it')


@needs_runtime
@pytest.mark.usefixtures('tracing_only')
@pytest.mark.parametrize('name', ['nafnet32', *LONGER])
def test_onnx_of_any_size_with_metadata(name: str, tmp_path: Path) -> None:
    import onnx

    found = network(name)
    path = tmp_path / 'network.onnx'
    done = export(found, path, name)
    assert done.difference <= 1e-4
    model = onnx.load(path)
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert [axis.dim_param or axis.dim_value for axis in shape] == ['batch', 3, 'height', 'width']
    assert not [node.op_type for node in model.graph.node if 'DFT' in node.op_type]
    assert {node.domain for node in model.graph.node} <= {'', 'ai.onnx'}
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata['system'] == name
    assert (metadata['color_order'], metadata['layout']) == ('RGB', 'NCHW')
    assert metadata['pad_multiple'] == str(found.pad_multiple)
    again = zoo.create(name, **json.loads(metadata['settings']))
    assert {key: value.shape for key, value in again.state_dict().items()} == {
        key: value.shape for key, value in found.state_dict().items()
    }
    size = 3 * found.pad_multiple
    image = np.random.default_rng(1).random((1, 3, size, 2 * size), np.float32)
    with torch.no_grad():
        expected = found(torch.from_numpy(image)).numpy()
    np.testing.assert_allclose(onnx_file.runtime(str(path))(image), expected, rtol=0, atol=1e-4)


@needs_runtime
@pytest.mark.usefixtures('tracing_only')
def test_float16_halves_the_file_and_keeps_the_interface(tmp_path: Path) -> None:
    import onnx

    found = network('nafnet32')
    export(found, tmp_path / 'wide.onnx', 'nafnet32')
    done = export(found, tmp_path / 'half.onnx', 'nafnet32', 'fp16')
    assert 0 < done.difference <= TOLERANCES['fp16']
    wide, half = (onnx.load(tmp_path / f'{name}.onnx') for name in ('wide', 'half'))

    def weights(model: Any) -> int:
        return sum(len(entry.raw_data) for entry in model.graph.initializer)

    assert weights(half) < 0.55 * weights(wide)
    kinds = {entry.type.tensor_type.elem_type for entry in [*half.graph.input, *half.graph.output]}
    assert kinds == {onnx.TensorProto.FLOAT}


@needs_runtime
def test_the_second_exporter_is_tried_and_a_file_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = network('nafnet32')
    tracing = onnx_file.EXPORTERS['torchscript']
    path = tmp_path / 'network.onnx'

    def of_another_network(module: ImageToImage, interface: Interface, file: str) -> None:
        other = ImageToImage(fill_state_dict(network('nafnet32'), seed=4, gain=0.7), exported=True).eval()
        tracing(other, interface, file)

    def raises(module: ImageToImage, interface: Interface, file: str) -> None:
        raise RuntimeError('this operator has no form in ONNX\nand much more')

    monkeypatch.setitem(onnx_file.EXPORTERS, 'torchscript', of_another_network)
    monkeypatch.setitem(onnx_file.EXPORTERS, 'torch.export', tracing)
    assert export(found, path, 'nafnet32').exporter == 'torch.export'
    path.write_bytes(b'of before')
    monkeypatch.setitem(onnx_file.EXPORTERS, 'torch.export', raises)
    with pytest.raises(VerificationError, match=r'differs from PyTorch.*no form in ONNX\)$'):
        export(found, path, 'nafnet32')
    assert path.read_bytes() == b'of before'
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.long
@needs_runtime
@pytest.mark.usefixtures('tracing_only')
@pytest.mark.parametrize(
    ('name', 'precision'),
    [
        *itertools.product(
            ['dsgformer', 'dsgformer_h', 'nafnet32', 'restormer', 'mprnet', 'fftformer'], ['fp32', 'fp16']
        ),
        *itertools.product(['mhnet', 'stripformer', 'drsformer'], ['fp32']),
    ],
)
def test_small_networks_of_every_supported_system(name: str, precision: Any, tmp_path: Path) -> None:
    found = network(name)
    if precision == 'fp16':
        # Random weights amplify their own rounding to 0.02 in DSGformer: here the arithmetic alone counts.
        for parameter in found.parameters():
            parameter.data = parameter.data.half().float()
    done = export(found, tmp_path / 'network.onnx', name, precision)
    assert done.difference <= TOLERANCES[done.interface.precision]


@pytest.mark.long
@needs_runtime
@pytest.mark.usefixtures('tracing_only')
def test_float16_keeps_the_selection_of_the_weights_in_the_package(tmp_path: Path) -> None:
    """They are stored in float16: what remains is the arithmetic, of which only convolutions are rounded."""
    found = cast(RestorationNetwork, zoo.create('dsgformer_h', pretrained=True).eval())
    assert export(found, tmp_path / 'network.onnx', 'dsgformer_h', 'fp16').difference <= 2e-4


@needs_runtime
def test_float16_spectra_do_not_overflow(tmp_path: Path) -> None:
    """Products of two spectra of up to 1e6, beyond float16's 65504, before FFTformer's norm."""
    import onnx

    attention = cast(FSAS, fill_state_dict(FSAS(4, bias=False), seed=1, gain=1)).eval()
    attention.to_hidden_dw.weight.data *= 30
    x = torch.rand(1, 4, 16, 16)
    with torch.no_grad():
        q, k, _ = attention.to_hidden_dw(attention.to_hidden(x)).chunk(3, dim=1)
        assert torch.fft.rfft2(q).abs().max() * torch.fft.rfft2(k).abs().max() > 65504
        expected = attention(x).numpy()
        path = str(tmp_path / 'attention.onnx')
        names = {'input_names': [INPUT], 'output_names': [OUTPUT]}
        torch.onnx.export(ExportFSAS(attention), (x,), path, dynamo=False, opset_version=17, **names)
    half = onnx_file.in_float16(onnx.load(path))
    restored = onnx_file.runtime(half.SerializeToString())(x.numpy())
    np.testing.assert_allclose(restored, expected, rtol=0.02, atol=0.02 * float(np.abs(expected).max()))


@needs_runtime
@pytest.mark.usefixtures('tracing_only')
def test_float16_is_for_convolutions_alone_and_nothing_else_is_rounded(tmp_path: Path) -> None:
    import onnx

    export(network('nafnet32'), tmp_path / 'half.onnx', 'nafnet32', 'fp16')
    graph = onnx.load(tmp_path / 'half.onnx').graph
    made_by = {name: node for node in graph.node for name in node.output}
    kinds = {entry.name: entry.data_type for entry in graph.initializer}
    for node in graph.node:
        halves = [name for name in node.input if kinds.get(name) == onnx.TensorProto.FLOAT16]
        assert not halves or node.op_type == 'Conv', node.name
        if node.op_type == 'Cast' and node.attribute[0].i == onnx.TensorProto.FLOAT:
            before = made_by.get(node.input[0])
            assert before is None or before.op_type != 'Cast', f'{node.name} only rounds'


@pytest.mark.long
@needs_runtime
@pytest.mark.parametrize(
    'name',
    ['dsgformer', 'dsgformer_s', 'dsgformer_t', 'nafnet32', 'nafnet64', 'restormer', 'mprnet', 'fftformer'],
)
def test_systems_at_their_own_size(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    assert export(zoo.create(name).eval(), tmp_path / 'network.onnx', name).difference <= 1e-4


@pytest.mark.long
@pytest.mark.usefixtures('tracing_only')
@pytest.mark.skipif(
    not all(map(formats.importlib.util.find_spec, formats.FORMATS['openvino'].requires)),
    reason='the packages of the extra `export` are not installed',
)
@pytest.mark.parametrize('name', ['dsgformer', 'nafnet32', 'restormer', 'mprnet', 'fftformer'])
def test_openvino_files(name: str, tmp_path: Path) -> None:
    path = tmp_path / 'network.xml'
    assert export(network(name), path, name).difference <= 1e-4
    assert sorted(file.name for file in tmp_path.iterdir()) == ['network.bin', 'network.xml']


@pytest.mark.long
@pytest.mark.parametrize('name', ['nafnet32', 'dsgformer_h'])
def test_torch_export_programs(name: str, tmp_path: Path) -> None:
    path = tmp_path / 'network.pt2'
    done = export(network(name), path, name)
    assert done.difference <= 1e-4
    extra = {'dsgformer.json': ''}
    torch.export.load(path, extra_files=extra)
    assert json.loads(extra['dsgformer.json'])['system'] == name


@pytest.mark.long
@pytest.mark.parametrize(
    ('name', 'settings', 'multiple'),
    [
        ('nafnet32', {'width': 8, 'enc_blk_nums': (1,), 'dec_blk_nums': (1,)}, 2),
        ('dsgformer_h', {'num_blocks': (1, 1, 1, 1)}, 16),
    ],
)
def test_aotinductor_packages(name: str, settings: dict[str, Any], multiple: int, tmp_path: Path) -> None:
    """Networks of few blocks: g++ takes minutes for more.

    DSGformer's package once computed what one block of DFGB needs, whatever the image.
    """
    smallest = zoo.create(name, **settings).eval()
    path = tmp_path / 'network.pt2'
    done = export(fill_state_dict(smallest, seed=3, gain=0.7), path, name, format='aoti')
    assert done.exporter == 'aotinductor'
    assert 0 < done.difference <= 1e-4
    metadata = torch._inductor.aoti_load_package(str(path)).get_metadata()
    assert (metadata['system'], metadata['pad_multiple']) == (name, str(multiple))


@pytest.mark.parametrize(
    ('call', 'reason'),
    [
        ('import os, signal; os.kill(os.getpid(), signal.SIGSEGV)', 'the compiled code ends with SIGSEGV'),
        ('raise ValueError("not this size")', 'ValueError: not this size'),
    ],
)
def test_compiled_code_that_crashes_fails_the_verification(
    call: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program_file, 'CALL', call)
    found = network('nafnet32')
    with pytest.raises(VerificationError, match=f'a file does not run at .* pixels: RuntimeError: {reason}'):
        verify(program_file.aot_runtime('a.pt2'), found, Interface.of(found, 'nafnet32', 'fp32'), 'a file')


def test_aotinductor_needs_a_compiler(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('CXX', 'no-such-compiler')
    message = refused(capsys, 'dsgformer_h', '-o', tmp_path / 'a.pt2', '--format', 'aoti')
    assert 'there is no no-such-compiler; install g++' in message


@needs_runtime
@pytest.mark.usefixtures('tracing_only')
@pytest.mark.parametrize('precision', ['fp32', 'fp16'])
def test_a_darktable_package_holds_its_graph_and_description(precision: Any, tmp_path: Path) -> None:
    import onnx

    path = tmp_path / 'network.dtmodel'
    done = export(network('nafnet32'), path, 'nafnet32', precision)
    assert done.difference <= TOLERANCES[done.interface.precision]
    assert list(tmp_path.iterdir()) == [path]
    with zipfile.ZipFile(path) as archive:
        assert sorted(archive.namelist()) == [
            'denoise-nafnet32/config.json', 'denoise-nafnet32/model.onnx',
        ]  # fmt: skip
        config = json.loads(archive.read('denoise-nafnet32/config.json'))
        graph = onnx.load_from_string(archive.read('denoise-nafnet32/model.onnx')).graph
    assert (config['id'], config['task'], config['backend']) == ('denoise-nafnet32', 'denoise', 'onnx')
    assert config['num_inputs'] == len(graph.input) == 1
    assert config['dsgformer']['precision'] == precision
    # darktable fixes these axes by their names when it loads a graph.
    axes = [axis.dim_param or axis.dim_value for axis in graph.input[0].type.tensor_type.shape.dim]
    assert axes == ['batch', 3, 'height', 'width']


def test_darktable_s_tiles_suit_the_network() -> None:
    for multiple, least in ((8, 8), (16, 16), (128, 512), (3, 3)):
        config: Any = darktable_file.config_of(Interface('system', {}, 'fp32', multiple, least))
        tiles = config['attributes']['input_sizes']
        assert all(tile % multiple == 0 and tile >= least for tile in tiles)
        assert tiles == sorted(tiles, reverse=True)
        assert len(tiles) >= 2


def test_the_command_knows_every_format() -> None:
    assert set(command.FORMATS) == {*formats.FORMATS, command.HUGGING_FACE}


def test_the_command_writes_a_folder_for_the_hub(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ['export', 'dsgformer_h', '-o', str(tmp_path / 'net'), '--format', 'huggingface']
    assert dsgformer.main(arguments) == 0
    assert 'model.safetensors' in capsys.readouterr().out
    found = zoo.from_pretrained(tmp_path / 'net')
    expected = zoo.create('dsgformer_h', pretrained=True)
    assert torch.equal(found.tail.weight, expected.tail.weight)  # type: ignore[union-attr]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    with pytest.raises(SystemExit) as status:
        dsgformer.main(['export', *map(str, arguments)])
    assert status.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


@needs_runtime
def test_wrong_usage_is_reported_in_one_sentence_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / 'a.onnx'
    assert "no system 'dsgformer_x'" in refused(capsys, 'dsgformer_x', '-o', target)
    assert 'no folder' in refused(capsys, 'dsgformer_h', '-o', tmp_path / 'none' / 'a.onnx')
    assert '.onnx or .xml or .pt2 or .dtmodel' in refused(capsys, 'dsgformer_h', '-o', tmp_path / 'a.engine')
    wrong = refused(capsys, 'dsgformer_h', '-o', target, '--format', 'aoti')
    assert wrong.endswith('choose a name that ends with .pt2')
    hub = ('--format', 'huggingface', '--precision', 'fp16')
    assert 'keeps the type' in refused(capsys, 'dsgformer_h', '-o', tmp_path / 'net', *hub)
    assert '--weights FILE' in refused(capsys, 'dsgformer_t', '-o', target)
    assert 'no such file' in refused(capsys, 'dsgformer_h', '-o', target, '--weights', tmp_path / 'w.pth')
    assert 'fp32 only' in refused(capsys, 'dsgformer_h', '-o', tmp_path / 'a.pt2', '--precision', 'fp16')
    (tmp_path / 'b.onnx').mkdir()
    assert 'cannot be written' in refused(capsys, 'dsgformer_h', '-o', tmp_path / 'b.onnx')
    find = formats.importlib.util.find_spec
    monkeypatch.setattr(
        formats.importlib.util, 'find_spec', lambda name: None if name == 'onnxruntime' else find(name)
    )
    assert "pip install 'dsgformer[export]'" in refused(capsys, 'dsgformer_h', '-o', target)
    assert not target.exists()


@needs_runtime
@pytest.mark.usefixtures('tracing_only')
def test_the_command_exports_the_weights_of_the_package(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / 'network.onnx'
    assert dsgformer.main(['export', 'dsgformer_h', '-o', str(path)]) == 0
    assert 'multiples of 16' in capsys.readouterr().out
    found = zoo.create('dsgformer_h', pretrained=True).eval()
    image = np.random.default_rng(1).random((1, 3, 32, 64), np.float32)
    with torch.no_grad():
        expected = found(torch.from_numpy(image)).numpy()
    assert np.abs(expected - image).max() > 1e-3
    np.testing.assert_allclose(onnx_file.runtime(str(path))(image), expected, rtol=0, atol=1e-4)


def test_the_extra_lists_the_packages_of_every_format() -> None:
    setup = (Path(__file__).resolve().parents[2] / 'setup.py').read_text(encoding='utf-8')
    extra = re.search(r"'export': \[(.*?)\]", setup)
    assert extra is not None
    listed = set(re.findall(r"'([\w-]+)'", extra[1]))
    assert {package for entry in formats.FORMATS.values() for package in entry.requires} <= listed


def test_the_public_names_exist() -> None:
    assert all(hasattr(package, name) for name in package.__all__)
