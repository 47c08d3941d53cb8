"""A pool that reuses the memory of CPU tensors instead of returning it to the system.

Fresh memory has to be mapped and zeroed page by page when it is first written.
For the tensors of a 1280×720 image that takes as long as half of the block's
arithmetic, or more on a virtual machine, and a C library returns tensors of that
size to the system each time.

`dsgformer_arch.utils.allocator.keep_freed_memory` does the same for a whole
process; while it is active, the pool keeps nothing.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsgformer_arch.utils import allocator

LEAST_BYTES = 4 << 20
"""Smaller tensors come from PyTorch: the C library already keeps their memory."""

IDLE_BYTES = 3 << 29
"""Idle memory never exceeds this: 1.5 GiB, a 1280×720 image in float32."""

IDLE_CALLS = 16
"""Blocks that were not used for so many restored batches are freed."""


@dataclass(eq=False)
class _Block:
    memory: NDArray[np.uint8]
    lent: weakref.ref[NDArray[np.uint8]] | None = None
    """The array that only the tensor that uses the memory keeps alive."""
    age: int = 0
    """Calls of `trim` since the block was last lent."""

    @property
    def idle(self) -> bool:
        return self.lent is None or self.lent() is None


class MemoryPool:
    """Allocates CPU tensors from memory that it reuses; thread-safe.

    Idle memory never exceeds `IDLE_BYTES`, and `release` frees all of it.
    """

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._lock = threading.Lock()

    @property
    def bytes(self) -> int:
        """Size of all blocks, lent or idle."""
        return sum(block.memory.nbytes for block in self._blocks)

    @property
    def idle_bytes(self) -> int:
        """Size of the idle blocks."""
        return sum(block.memory.nbytes for block in self._blocks if block.idle)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous CPU tensor of undefined values.

        Its memory is reused only when neither the tensor nor a view of it exists any longer.
        """
        size = math.prod(shape) * dtype.itemsize
        if size < LEAST_BYTES or allocator.keeps_freed_memory():
            return torch.empty(tuple(shape), dtype=dtype, device='cpu')
        with self._lock:
            block = self._idle(size) or self._new(size)
            part = block.memory[:size]
            block.lent, block.age = weakref.ref(part, self._returned), 0
            return torch.from_numpy(part).view(dtype).view(tuple(shape))

    def trim(self) -> None:
        """Free the blocks that were idle for `IDLE_CALLS` calls; called once per restored batch."""
        with self._lock:
            for block in self._blocks:
                block.age += 1
            self._blocks = [block for block in self._blocks if block.age <= IDLE_CALLS or not block.idle]
            self._bound()

    def release(self) -> None:
        """Free all idle memory."""
        with self._lock:
            self._blocks = [block for block in self._blocks if not block.idle]

    def _returned(self, _: weakref.ref[NDArray[np.uint8]]) -> None:
        # Called wherever the last tensor dies, even while this thread holds the lock: then `trim` is next.
        if self._lock.acquire(blocking=False):
            try:
                self._bound()
            finally:
                self._lock.release()

    def _bound(self) -> None:
        """Free idle blocks, least recently used first, until the rest is within `IDLE_BYTES`."""
        excess = self.idle_bytes - IDLE_BYTES
        for block in sorted(self._blocks, key=lambda block: -block.age):
            if excess <= 0:
                break
            if block.idle:
                self._blocks.remove(block)
                excess -= block.memory.nbytes

    def _idle(self, size: int) -> _Block | None:
        # None of more than twice the size, which a larger tensor will need.
        fitting = (block for block in self._blocks if size <= block.memory.nbytes <= 2 * size and block.idle)
        return min(fitting, key=lambda block: block.memory.nbytes, default=None)

    def _new(self, size: int) -> _Block:
        if self.bytes + size > IDLE_BYTES:
            self._blocks = [block for block in self._blocks if not block.idle]
        # From PyTorch's allocator for its alignment; as a NumPy array, which weak references can point to.
        memory: Any = torch.empty(size, dtype=torch.uint8, device='cpu').numpy()
        block = _Block(memory)
        self._blocks.append(block)
        return block


pool = MemoryPool()
"""The pool for the results of the compiled kernels."""
