"""Python's garbage collector during the start of a program."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from dsgformer_arch.utils.collection import without_collection


@pytest.fixture(autouse=True)
def _thawed() -> Iterator[None]:
    yield
    gc.enable()
    gc.unfreeze()


def test_what_was_made_is_exempt_from_collection() -> None:
    with without_collection():
        assert not gc.isenabled()
        made = [[] for _ in range(1000)]
    assert gc.isenabled()
    later: list[object] = []
    collected = {id(one) for one in gc.get_objects()}
    assert id(later) in collected
    assert not collected & {id(one) for one in made}


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    with without_collection():
        pass
    assert not gc.isenabled()


def test_an_error_ends_the_pause() -> None:
    with pytest.raises(KeyError), without_collection():
        raise KeyError
    assert gc.isenabled()
