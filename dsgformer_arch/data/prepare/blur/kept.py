"""Arrays that are kept in memory as far as they fit."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, Generic, TypeVar

from numpy.typing import NDArray

from dsgformer_arch.utils.progress import track

Key = TypeVar('Key', bound=Hashable)


class Kept(Generic[Key]):
    """Loads arrays when they are asked for, and keeps them until the memory given is full.

    What is loaded before a data loader starts its workers is shared with them, where workers are made by
    forking.

    Args:
        load: gives the array of a key.
        megabytes: memory for arrays; what does not fit is loaded anew each time.
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
        """Load what fits, with a progress bar.  The first array that does not fit ends it."""
        for key in track(list(keys), what):
            self[key]
            if key not in self._arrays:
                break
