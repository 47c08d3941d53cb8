"""Calls that the state of the calling thread must not change."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar('T')


def in_new_thread(call: Callable[[], T]) -> T:
    """What `call` returns in a thread of its own, where PyTorch's modes are all at their defaults.

    Those are fake tensors and other dispatch modes, the default device, inference mode and autocast.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()
