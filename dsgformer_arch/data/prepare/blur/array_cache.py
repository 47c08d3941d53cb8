"""A cache of arrays with a bounded size."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, Generic, TypeVar

from numpy.typing import NDArray

from dsgformer_arch.utils.progress import track

Key = TypeVar('Key', bound=Hashable)


class ArrayCache(Generic[Key]):
    """Loads arrays on demand and keeps them until its memory is full; nothing is ever evicted.

    Arrays that are loaded before a data loader forks its workers are shared with them.

    Args:
        load: returns the array of a key.
        megabytes: memory for arrays; those that do not fit are loaded again each time.
    """

    def __init__(self, load: Callable[[Key], NDArray[Any]], megabytes: float) -> None:
        self._load = load
        self._free = megabytes * 2**20
        self._arrays: dict[Key, NDArray[Any]] = {}

    def __getitem__(self, key: Key) -> NDArray[Any]:
        array = self._arrays.get(key)
        if array is None:
            array = self._load(key)
            if array.nbytes <= self._free:
                self._arrays[key] = array
                self._free -= array.nbytes
        return array

    def fill(self, keys: Iterable[Key], what: str) -> None:
        """Load arrays, with a progress bar, until one does not fit."""
        for key in track(list(keys), what):
            self[key]
            if key not in self._arrays:
                break
