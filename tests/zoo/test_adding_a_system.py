"""A system is one class in `archs/`, one entry in the table and one option file; everything else finds it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from basicsr.archs import build_network
from basicsr.utils.registry import ARCH_REGISTRY
from spandrel import MAIN_REGISTRY, ModelLoader, ModelTiling

from dsgformer_arch import zoo
from dsgformer_arch.archs.tlc import LocalAvgPool2d
from dsgformer_arch.benchmark import commands
from dsgformer_arch.benchmark.measure import complexity, training
from dsgformer_arch.benchmark.render import report, system_table
from dsgformer_arch.restore import restore
from dsgformer_arch.zoo import registry, spandrel_support
from dsgformer_arch.zoo.systems import Reported, System
from tests.trees import write_pairs

MODULE = '''
import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn

from dsgformer_arch.archs.layers.network import RestorationNetwork


@ARCH_REGISTRY.register()
class Toy(RestorationNetwork):
    """Returns the image at half the size, then the restored one; around zero inside."""

    pad_multiple = 4
    min_size = 12
    input_offset = 0.5
    final_output = 1
    channel_settings = ('colours',)
    width_settings = ('features',)
    depth_settings = ('layers',)

    def __init__(self, features=8, layers=2, colours=3, slope=0.1):
        super().__init__()
        self.first = nn.Conv2d(colours, features, 3, padding=1)
        self.body = nn.ModuleList(nn.Conv2d(features, features, 3, padding=1) for _ in range(layers))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.last = nn.Conv2d(features, colours, 3, padding=1)
        self.slope = slope

    def forward_padded(self, x):
        assert x.shape[-2] % 4 == x.shape[-1] % 4 == 0 and min(x.shape[-2:]) >= 12
        y = self.first(x)
        for layer in self.body:
            y = nn.functional.leaky_relu(layer(y), self.slope)
        y = self.last(y * torch.sigmoid(self.pool(y)))
        return [x[..., ::2, ::2], y + x]

    @classmethod
    def recognises(cls, state):
        return {'first.weight', 'body.0.weight', 'last.bias'} <= state.keys()

    @classmethod
    def settings_from_state(cls, state):
        features, colours = state['first.weight'].shape[:2]
        layers = sum(key.startswith('body.') for key in state) // 2
        return {'features': features, 'colours': colours, 'layers': layers}
'''

ENTRY = System(
    name='toy',
    architecture='Toy',
    settings={'features': 4, 'layers': 1, 'slope': 0.2},
    task='deblurring',
    title='A Toy',
    authors='Nobody',
    venue='',
    year=2026,
    url='',
    release='this test',
    licence='none',
    parameters=371,
    tlc=True,
    reported=(Reported('GoPro', 12.34, 0.5, 'table 9', 'this test'),),
)

OPTIONS = """
network_g:
  type: Toy
  features: 4
  layers: 1
  slope: 0.2
"""


@pytest.fixture(autouse=True)
def _toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The three steps."""
    (tmp_path / 'toy_arch.py').write_text(MODULE, encoding='utf-8')
    (tmp_path / 'toy.yml').write_text(OPTIONS, encoding='utf-8')
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(registry._BY_NAME, 'toy', ENTRY)
    __import__('toy_arch')
    spandrel_support.register()
    yield
    del ARCH_REGISTRY._obj_map['Toy'], sys.modules['toy_arch']
    MAIN_REGISTRY._architectures = [
        found for found in MAIN_REGISTRY._architectures if found.architecture.id != 'Toy'
    ]
    MAIN_REGISTRY._by_id.pop('Toy', None)


def test_the_zoo_and_the_option_file_build_it(tmp_path: Path) -> None:
    assert 'toy' in zoo.names()
    network = zoo.create('toy')
    assert sum(p.numel() for p in network.parameters()) == ENTRY.parameters
    options = yaml.safe_load((tmp_path / 'toy.yml').read_text(encoding='utf-8'))
    built = build_network(options['network_g'])
    assert type(built) is type(network)
    assert built.settings == network.settings == {'features': 4, 'layers': 1, 'colours': 3, 'slope': 0.2}


def test_it_takes_images_of_any_size() -> None:
    network = zoo.create('toy')
    half, full = network(torch.rand(1, 3, 5, 15))
    assert (half.shape, full.shape) == ((1, 3, 3, 8), (1, 3, 5, 15))
    image = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(restore(network, image), network(image - 0.5)[1].detach() + 0.5)
    assert isinstance(zoo.create('toy', tlc=16).pool, LocalAvgPool2d)


def test_its_checkpoints_are_identified_loaded_and_converted(tmp_path: Path) -> None:
    network = zoo.create('toy', features=6)
    torch.save(network.state_dict(), tmp_path / 'toy.pth')
    assert zoo.identify(zoo.create('toy').state_dict()) == ('toy', {**ENTRY.settings, 'colours': 3})
    zoo.convert(tmp_path / 'toy.pth', tmp_path / 'toy.safetensors')
    for path in (tmp_path / 'toy.pth', tmp_path / 'toy.safetensors'):
        loaded = zoo.load(path)
        assert loaded.settings == network.settings
        image = torch.rand(1, 3, 8, 8)
        assert torch.equal(loaded(image)[1], network(image)[1])


def test_spandrel_opens_its_files(tmp_path: Path) -> None:
    torch.save(zoo.create('toy').state_dict(), tmp_path / 'toy.pth')
    model = ModelLoader().load_from_file(tmp_path / 'toy.pth')
    assert (model.architecture.id, model.tiling) == ('Toy', ModelTiling.SUPPORTED)


def test_the_benchmark_counts_scales_and_scores_it(tmp_path: Path) -> None:
    convolutions = 256**2 * 9 * (3 * 4 + 4 * 4 + 4 * 3)
    assert complexity.count('toy').convolutions == convolutions
    assert training.matched('toy', 'toy') == {}
    found = zoo.network_class('Toy').scaled_widths(ENTRY.settings, 9)
    assert found == {'features': 9}
    write_pairs(tmp_path / 'sample', 'test', 2)
    torch.save(zoo.create('toy').state_dict(), tmp_path / 'toy.pth')
    out = tmp_path / 'quality'
    weights = [('toy', tmp_path / 'toy.pth')]
    data = str(tmp_path / 'sample' / 'test')
    assert commands.run('quality', ['toy'], data=data, protocol='gopro', weights=weights, out=out) == 0
    assert '| toy | 2 |' in (tmp_path / 'quality.md').read_text(encoding='utf-8')


def test_tables_and_the_report_have_it() -> None:
    cells = dict(zip(system_table.COLUMNS, system_table.row(zoo.get('toy')), strict=True))
    assert 'toy' in str(cells)
    assert system_table.padding(zoo.get('toy')) == '4, at least 12'
    (table, sources) = report.table_one([]).elements
    assert '12.34' in str(table)
    assert 'toy: A Toy, 2026; this test, table 9' in str(sources)
