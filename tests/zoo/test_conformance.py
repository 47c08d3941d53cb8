"""Every system of the zoo computes what its authors' release computes.

The bare architectures are checked in `tests/archs`; here it is the systems as `zoo.create` makes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from dsgformer_arch import zoo
from tests.conformance.check import check

FIXTURES = Path(__file__).parents[1] / 'conformance'

NAMES = {
    'mbt_b': 'mb_taylorformer_v2_b',
    'mbt_l': 'mb_taylorformer_v2_l',
    'mbt_xl': 'mb_taylorformer_v2_xl',
    'mhnet_tlc': 'mhnet',
    'nafnet32_tlc': 'nafnet32',
}
"""Systems of the fixtures that are named otherwise."""

TLC_TRAIN_SIZE = 256
"""What the releases' local pooling was trained at."""

LONG = {'convir_l', 'drsformer', 'mbt_l', 'mbt_xl', 'mhnet_tlc', 'mprnet', 'nafnet32_tlc'}
"""More than ten seconds of double precision on one core."""


def fixtures() -> list[object]:
    found = sorted(path.stem for path in FIXTURES.glob('*.npz'))
    return [pytest.param(name, marks=pytest.mark.long if name in LONG else []) for name in found]


def system(fixture: str) -> nn.Module:
    return zoo.create(NAMES.get(fixture, fixture), tlc=TLC_TRAIN_SIZE if fixture.endswith('_tlc') else None)


@pytest.fixture
def _threads(fixture: str) -> Iterator[None]:
    """MB-TaylorFormer's fixtures were made with two threads, and it amplifies how sums are split."""
    before = torch.get_num_threads()
    torch.set_num_threads(2 if fixture.startswith('mbt') else before)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures('_threads')
@pytest.mark.parametrize('fixture', fixtures())
def test_the_release_and_the_system_agree(fixture: str) -> None:
    assert check(system(fixture), str(FIXTURES / f'{fixture}.npz')) == []
