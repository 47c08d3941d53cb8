"""Folders and repositories of Hugging Face: what is saved is loaded, and contradictions are refused."""

from __future__ import annotations

import http.server
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from dsgformer_arch import zoo
from dsgformer_arch.archs.dsgformer_arch import DSGformer
from dsgformer_arch.archs.layers.network import RestorationNetwork
from dsgformer_arch.archs.nafnet_arch import NAFNet
from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.zoo import hub, model_card, registry
from dsgformer_arch.zoo.checkpoint import CheckpointError
from tests.small_systems import SMALL, outputs, small

needs_hub = pytest.mark.skipif(
    importlib.util.find_spec('huggingface_hub') is None, reason='huggingface_hub is not installed'
)


def network(name: str = 'dsgformer', **overrides: Any) -> RestorationNetwork:
    return cast(RestorationNetwork, small(name, **overrides))


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)


def change(folder: Path, **entries: Any) -> None:
    """Change entries of a `config.json`; None removes one."""
    path = folder / 'config.json'
    config = {**json.loads(path.read_text(encoding='utf-8')), **entries}
    path.write_text(
        json.dumps({key: value for key, value in config.items() if value is not None}), encoding='utf-8'
    )


@pytest.mark.parametrize('name', SMALL)
def test_a_folder_gives_the_network_back(name: str, tmp_path: Path) -> None:
    saved = network(name)
    assert saved.save_pretrained(tmp_path / 'net') == tmp_path / 'net'
    assert sorted(path.name for path in (tmp_path / 'net').iterdir()) == [
        'README.md', 'config.json', 'model.safetensors',
    ]  # fmt: skip
    loaded = type(saved).from_pretrained(tmp_path / 'net')
    assert type(loaded) is type(saved)
    assert json.dumps(loaded.settings) == json.dumps(saved.settings)
    assert same(loaded, saved)
    assert not loaded.training


def test_the_class_the_zoo_and_the_file_give_the_same_network(tmp_path: Path) -> None:
    saved = network()
    saved.save_pretrained(tmp_path)
    image = torch.rand(1, 3, 40, 48, generator=torch.Generator().manual_seed(0))
    for loaded in (
        zoo.from_pretrained(str(tmp_path)),
        RestorationNetwork.from_pretrained(tmp_path),
        zoo.load(tmp_path / 'model.safetensors'),
    ):
        assert type(loaded) is DSGformer
        with torch.no_grad():
            assert all(map(torch.equal, outputs(loaded.eval(), image), outputs(saved, image)))


@pytest.mark.parametrize(
    'settings',
    [{'score': 'softmax'}, {'gate': 'simplegate'}, {'ratios': ('1/8', '1/4', '1/3', '1/2')}, {'patch': 2}],
)
def test_settings_that_leave_no_trace_in_the_weights_are_kept(settings: Any, tmp_path: Path) -> None:
    saved = network(**settings)
    saved.save_pretrained(tmp_path)
    loaded = DSGformer.from_pretrained(tmp_path)
    assert {key: loaded.settings[key] for key in settings} == settings
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded(image), saved(image), rtol=0, atol=0)
    config = json.loads((tmp_path / 'config.json').read_text(encoding='utf-8'))
    assert config['architectures'] == ['DSGformer']
    assert set(saved.settings) <= config.keys()


def test_systems_by_name_and_weights_of_the_package(tmp_path: Path) -> None:
    saved = zoo.create('dsgformer_h', pretrained=True)
    saved.save_pretrained(tmp_path)
    assert json.loads((tmp_path / 'config.json').read_text(encoding='utf-8'))['system'] == 'dsgformer_h'
    assert same(DSGformer.from_pretrained(tmp_path), saved)


def test_local_pooling_leaves_no_trace(tmp_path: Path) -> None:
    plain = network()
    pooled = registry._build('DSGformer', SMALL['dsgformer'], 64)
    pooled.load_state_dict(plain.state_dict())
    pooled.save_pretrained(tmp_path)
    assert same(zoo.from_pretrained(tmp_path), plain)


def test_types_of_weights_are_kept_in_the_file_and_loaded_in_float32(tmp_path: Path) -> None:
    network().half().save_pretrained(tmp_path)
    stored = load_file(tmp_path / 'model.safetensors')
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    loaded = zoo.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


# What is refused.


def refused(folder: Path, kind: type[RestorationNetwork] = DSGformer) -> str:
    with pytest.raises(UserError) as caught:
        kind.from_pretrained(folder)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def test_contradictions_are_refused(tmp_path: Path) -> None:
    folder = network().save_pretrained(tmp_path / 'net')
    other = network('nafnet32').save_pretrained(tmp_path / 'other')
    assert 'of a NAFNet, not of a DSGformer' in refused(other)
    assert 'of a DSGformer, not of a NAFNet' in refused(folder, NAFNet)
    for entries in ({'width': 32}, {'score': 'softmax'}, {'ratios': ['1/2']}, {'num_blocks': [1, 1, 1, 1]}):
        shutil.copytree(folder, tmp_path / 'copy', dirs_exist_ok=True)
        change(tmp_path / 'copy', **entries)
        key = next(iter(entries))
        assert f'config.json states that {key} is' in refused(tmp_path / 'copy')
    shutil.copytree(folder, tmp_path / 'copy', dirs_exist_ok=True)
    shutil.copy(other / 'model.safetensors', tmp_path / 'copy')
    assert 'of a DSGformer, but' in refused(tmp_path / 'copy')
    # Without metadata the weights themselves contradict.
    shutil.copytree(folder, tmp_path / 'copy', dirs_exist_ok=True)
    save_file(load_file(folder / 'model.safetensors'), tmp_path / 'copy' / 'model.safetensors')
    change(tmp_path / 'copy', width=32, system=None)
    assert 'contradict its weights' in refused(tmp_path / 'copy')


def test_what_is_no_folder_of_a_network_is_refused(tmp_path: Path) -> None:
    folder = network().save_pretrained(tmp_path / 'net')
    assert 'there is no folder' in refused(tmp_path / 'none')
    (tmp_path / 'empty').mkdir()
    assert 'has no config.json' in refused(tmp_path / 'empty')
    shutil.copy(folder / 'config.json', tmp_path / 'empty')
    assert 'has no model.safetensors' in refused(tmp_path / 'empty')
    # A pickle is never read in its place.
    torch.save(network().state_dict(), tmp_path / 'empty' / 'pytorch_model.bin')
    assert 'has no model.safetensors' in refused(tmp_path / 'empty')
    for text in ('{', '[]', '[' * 100_000, '"DSGformer"', '\xff', ' ' * 2_000_000):
        (tmp_path / 'empty' / 'config.json').write_text(text, encoding='latin-1')
        assert 'not a JSON object' in refused(tmp_path / 'empty')
    change_to = {'architectures': ['torch.nn.Module']}
    shutil.copytree(folder, tmp_path / 'copy')
    change(tmp_path / 'copy', **change_to)
    assert "no architecture 'torch.nn.Module'" in refused(tmp_path / 'copy')
    change(tmp_path / 'copy', architectures=['DSGformer'], widht=16)
    assert 'states that widht' in refused(tmp_path / 'copy')
    for entries in ({'width': 'wide'}, {'num_blocks': [10**9] * 4}, {'num_blocks': 3}):
        shutil.copytree(folder, tmp_path / 'copy', dirs_exist_ok=True)
        save_file(load_file(folder / 'model.safetensors'), tmp_path / 'copy' / 'model.safetensors')
        change(tmp_path / 'copy', system=None, **entries)
        refused(tmp_path / 'copy')
    (folder / 'model.safetensors').write_bytes(b'\x08' + b'\0' * 7 + b'{}      ')
    refused(folder)


def test_a_folder_that_cannot_be_written_and_a_network_of_no_system_are_refused(tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('', encoding='utf-8')
    with pytest.raises(UserError, match='cannot write a network'):
        network().save_pretrained(tmp_path / 'file')

    class Other(RestorationNetwork):
        pass

    with pytest.raises(UserError, match='Other is not a network of the zoo'):
        Other().save_pretrained(tmp_path / 'other')


def test_the_hub_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(UserError, match=r"pip install 'dsgformer\[hub\]'"):
        zoo.from_pretrained('owner/name')


# The model card.


@pytest.mark.parametrize('name', zoo.names())
def test_every_system_has_a_card(name: str) -> None:
    system = zoo.get(name)
    card = model_card.text(system, name, {'width': 1}, system.parameters, 'owner/name', None)
    _, front, body = card.split('---\n', 2)
    metadata = yaml.safe_load(front)
    assert metadata['library_name'] == 'dsgformer'
    assert metadata['pipeline_tag'] == 'image-to-image'
    assert {system.task, name} <= set(metadata['tags'])
    if metadata['license'] == 'other':
        assert metadata['license_name'] == system.licence
    else:
        assert metadata['license'] in ('mit', 'apache-2.0')
    assert system.title in body
    assert "zoo.from_pretrained('owner/name')" in body
    assert all(f'{one.psnr:.2f}' in body for one in system.reported)


def test_the_card_s_usage_runs_and_an_edited_card_is_kept(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    saved = network()
    saved.save_pretrained('net', licence='cc-by-4.0')
    card = Path('net/README.md').read_text(encoding='utf-8')
    assert 'license: cc-by-4.0' in card
    names: dict[str, Any] = {}
    exec(card.split('```python\n')[1].split('```')[0], names)
    assert same(names['network'], saved)
    assert names['restored'].shape == (1, 3, 256, 256)
    Path('net/README.md').write_text('mine', encoding='utf-8')
    saved.save_pretrained('net')
    assert Path('net/README.md').read_text(encoding='utf-8') == 'mine'


# huggingface_hub's own mixin.


@needs_hub
def test_files_are_those_of_the_mixin_in_both_directions(tmp_path: Path) -> None:
    from huggingface_hub import PyTorchModelHubMixin

    class Mixed(PyTorchModelHubMixin, DSGformer):
        pass

    ours = network(score='relu')
    ours.save_pretrained(tmp_path / 'ours')
    theirs = Mixed.from_pretrained(tmp_path / 'ours', strict=True)
    assert type(theirs) is Mixed
    assert same(theirs, ours)
    assert theirs.settings['score'] == 'relu'
    theirs.save_pretrained(tmp_path / 'theirs')
    again = DSGformer.from_pretrained(tmp_path / 'theirs')
    assert same(again, ours)
    assert again.settings['score'] == 'relu'
    with pytest.raises(CheckpointError, match='names no architecture'):
        zoo.from_pretrained(tmp_path / 'theirs')


# A repository, on a server of this machine.


class Hub(http.server.BaseHTTPRequestHandler):
    """The routes of the hub for reading files and for one commit, for repositories in a folder."""

    protocol_version = 'HTTP/1.1'
    root: Path
    requests: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.requests.append(f'{self.command} {self.path}')
        owner, name, route, revision, *file = [*self.path.lstrip('/').split('/'), '', '', '']
        path = self.root / owner / name / '/'.join(file).rstrip('/')
        if route != 'resolve' or revision not in ('main', 'v1') or not (self.root / owner / name).is_dir():
            self.answer(404, b'', {'X-Error-Code': 'RepoNotFound'})
        elif not path.is_file():
            self.answer(404, b'', {'X-Error-Code': 'EntryNotFound', 'X-Repo-Commit': 'c' * 40})
        else:
            content = path.read_bytes()
            self.answer(200, content, {'ETag': f'"{hash(content):x}"', 'X-Repo-Commit': 'c' * 40})

    def do_POST(self) -> None:
        self.requests.append(f'{self.command} {self.path}')
        size = self.headers.get('Content-Length')
        body = self.rfile.read(int(size)) if size else b''.join(self.chunks())
        if self.path == '/api/repos/create':
            self.json({'url': f'http://{self.headers["Host"]}/owner/{json.loads(body)["name"]}'})
        elif self.path == '/api/validate-yaml':
            self.json({'errors': [], 'warnings': []})
        elif self.path.endswith('/preupload/main'):
            files = [{'path': entry['path'], 'uploadMode': 'regular'} for entry in json.loads(body)['files']]
            self.json({'files': [{**entry, 'shouldIgnore': False} for entry in files]})
        elif self.path.endswith('/commit/main'):
            import base64

            owner, name = self.path.split('/')[3:5]
            (self.root / owner / name).mkdir(parents=True)
            for line in body.splitlines():
                entry = json.loads(line)
                if entry['key'] == 'file':
                    content = base64.b64decode(entry['value']['content'])
                    (self.root / owner / name / entry['value']['path']).write_bytes(content)
            url = f'http://{self.headers["Host"]}/{owner}/{name}/commit/{"c" * 40}'
            self.json({'commitUrl': url, 'commitOid': 'c' * 40, 'success': True})
        else:
            self.answer(404, b'', {})

    def chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def json(self, content: Any) -> None:
        self.answer(200, json.dumps(content).encode(), {'Content-Type': 'application/json'})

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, 'Content-Length': str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, type[Hub]]]:
    (tmp_path / 'repositories').mkdir()
    routes = type('Routes', (Hub,), {'root': tmp_path / 'repositories', 'requests': []})
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), routes) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f'http://127.0.0.1:{running.server_port}', routes
        running.shutdown()
        thread.join()


CLIENT = """
import torch
from dsgformer_arch import zoo
from dsgformer_arch.archs.dsgformer_arch import DSGformer
from dsgformer_arch.utils.errors import UserError

def refused(source, **options):
    try:
        zoo.from_pretrained(source, **options)
    except UserError as error:
        print(str(error).replace(chr(10), ' NEWLINE '))

network = DSGformer.from_pretrained('owner/net')
network.save_pretrained('loaded')
DSGformer.from_pretrained('owner/net', revision='v1', force_download=True)
zoo.from_pretrained('owner/net', local_files_only=True)
refused('owner/none')
refused('owner/net', revision='v2')
refused('owner/pickle')
refused('owner/unseen', local_files_only=True)
print(network.push_to_hub('owner/copy', token='hf_made_up'))
assert torch.equal(DSGformer.from_pretrained('owner/copy').tail.weight, network.tail.weight)
"""


@needs_hub
@pytest.mark.long
def test_a_repository_over_http(server: tuple[str, type[Hub]], tmp_path: Path) -> None:
    endpoint, routes = server
    saved = network(score='softmax')
    saved.save_pretrained(routes.root / 'owner' / 'net')
    saved.save_pretrained(routes.root / 'owner' / 'pickle')
    (routes.root / 'owner' / 'pickle' / 'model.safetensors').unlink()
    torch.save(saved.state_dict(), routes.root / 'owner' / 'pickle' / 'pytorch_model.bin')
    environment = {
        **os.environ, 'HF_ENDPOINT': endpoint, 'HF_HOME': str(tmp_path / 'cache'), 'NO_PROXY': '*',
        'HF_HUB_DISABLE_TELEMETRY': '1', 'PYTHONPATH': os.pathsep.join(sys.path),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, '-c', CLIENT], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert same(DSGformer.from_pretrained(tmp_path / 'loaded'), saved)
    *messages, address = done.stdout.splitlines()
    assert len(messages) == 4
    for message, expected in zip(
        messages,
        ['owner/none', 'owner/net', 'the repository owner/pickle has no model.safetensors', 'owner/unseen'],
        strict=True,
    ):
        assert expected in message
        assert 'NEWLINE' not in message
    assert address.endswith('/owner/copy/commit/' + 'c' * 40)
    assert (routes.root / 'owner' / 'copy' / 'README.md').is_file()
    assert 'GET /owner/net/resolve/main/model.safetensors' in routes.requests
    assert not any('pytorch_model.bin' in request for request in routes.requests)


def test_the_names_are_public() -> None:
    assert {'from_pretrained', 'save_pretrained', 'push_to_hub'} <= set(zoo.__all__)
    assert all(hasattr(zoo, name) for name in zoo.__all__)
    assert RestorationNetwork.hub is cast(Any, hub)
