"""Calls that are independent of the state of the calling thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar('T')


def in_new_thread(call: Callable[[], T]) -> T:
    """The result of `call` in a new thread, in which all modes of PyTorch have their defaults.

    Those are fake tensors and other dispatch modes, the default device, inference mode and autocast.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()
