"""Every system of the zoo computes what its official implementation computes.

The bare architectures are checked in `tests/archs`; here it is the systems as `zoo.create` makes them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
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
"""Crop size, in pixels, of the official implementations' local pooling."""

LONG = {'convir_l', 'drsformer', 'ipt', 'mbt_l', 'mbt_xl', 'mhnet_tlc', 'mprnet', 'nafnet32_tlc'}
"""More than ten seconds of double precision on one core."""


def fixtures() -> list[object]:
    found = sorted(path.stem for path in FIXTURES.glob('*.npz'))
    return [pytest.param(name, marks=pytest.mark.long if name in LONG else []) for name in found]


def system(fixture: str) -> nn.Module:
    return zoo.create(NAMES.get(fixture, fixture), tlc=TLC_TRAIN_SIZE if fixture.endswith('_tlc') else None)


@pytest.mark.parametrize('fixture', fixtures())
def test_a_system_conforms_to_its_official_implementation(fixture: str) -> None:
    assert check(system(fixture), str(FIXTURES / f'{fixture}.npz')) == []


def test_every_system_has_a_fixture() -> None:
    """All but DSGformer's, whose official implementation is this one."""
    covered = {NAMES.get(path.stem, path.stem) for path in FIXTURES.glob('*.npz')}
    assert covered == {name for name in zoo.names() if zoo.get(name).architecture != 'DSGformer'}
