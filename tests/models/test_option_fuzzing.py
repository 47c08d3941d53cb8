"""The reader of option files under random input: data or one sentence, never another exception."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dsgformer_arch.models import options
from dsgformer_arch.utils import safe_yaml
from dsgformer_arch.utils.errors import UserError
from tests.trees import ROOT, tiny_options

TEXT = (ROOT / 'options' / 'train_sample.yml').read_text(encoding='utf-8')
PIECES = [
    *'{}[]:,&*!|>%@`"\'#?-~\n\t',
    '<<: *a',
    '&a ',
    '*a',
    '!!int ',
    '!!set ',
    '- ',
    ': ',
    '1e-3',
    'yes',
    '---\n',
    'key',
]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def plain(value: Any) -> bool:
    """Would JSON give it back as it is?"""
    return json.loads(json.dumps(value)) == value


@given(st.text() | st.lists(st.sampled_from(PIECES), max_size=60).map(''.join))
def test_any_text(text: str) -> None:
    try:
        value = safe_yaml.load(text)
    except yaml.YAMLError as error:
        line, problem = safe_yaml.describe(error)
        assert line is None or line >= 1
        assert problem
        return
    assert plain(value)


@given(
    st.integers(0, len(TEXT)), st.integers(0, 30), st.lists(st.sampled_from(PIECES), max_size=6).map(''.join)
)
def test_damaged_option_files(position: int, removed: int, new: str) -> None:
    try:
        value = safe_yaml.load(TEXT[:position] + new + TEXT[position + removed :])
    except yaml.YAMLError:
        return
    assert plain(value)


@given(VALUES)
def test_what_pyyaml_writes_is_read(value: Any) -> None:
    try:
        read = safe_yaml.load(yaml.safe_dump(value, allow_unicode=True))
    except yaml.YAMLError:
        return
    assert plain(read)


@given(st.text(max_size=40))
def test_any_forced_entry(entry: str) -> None:
    changed = tiny_options()
    with contextlib.suppress(UserError):
        options.force(changed, [entry])
    assert plain(changed)


PLACES = [
    (*above, key)
    for above, section in [
        ((), tiny_options()),
        (('train',), tiny_options()['train']),
        (('train', 'optim_g'), tiny_options()['train']['optim_g']),
        (('train', 'scheduler'), tiny_options()['train']['scheduler']),
        (('network_g',), tiny_options()['network_g']),
        (('datasets', 'train'), tiny_options()['datasets']['train']),
        (('val',), tiny_options()['val']),
        (('logger',), tiny_options()['logger']),
        (('path',), tiny_options()['path']),
    ]
    for key in [*section, 'other']
]


@pytest.fixture(scope='module')
def _nowhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp('nowhere'))
        yield


@pytest.mark.usefixtures('_nowhere')
@settings(max_examples=40)
@given(st.lists(st.tuples(st.sampled_from(PLACES), VALUES), min_size=1, max_size=3))
def test_any_values(changes: list[tuple[tuple[str, ...], Any]]) -> None:
    """The check accepts or refuses; nothing else leaves it."""
    changed = deepcopy(tiny_options())
    for place, value in changes:
        section: Any = changed
        for key in place[:-1]:
            section = section.get(key) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section[place[-1]] = value
    with pytest.raises(UserError) as caught:  # the data are missing in any case
        options.check(changed, 'fuzzed.yml', is_train=True)
    assert str(caught.value).startswith('fuzzed.yml')
