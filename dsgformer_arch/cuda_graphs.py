"""CUDA graphs: the kernels of an image size are recorded once and then replayed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dsgformer_arch.restore import evaluating, whole_image


class CudaGraphs:
    """`restore` on a GPU with one launch an image: a size's kernels are recorded once and then replayed.

    For video and folders of one size, where a processor launches hundreds of small kernels more slowly
    than the GPU runs them.  The first image of a size takes several times as long.  Each size holds the
    memory of its intermediate results.  Parameters are read where they lay when they were recorded:
    changed in place they count at once, replaced by others they do not.

    Args:
        network: as for `restore`, on a GPU, of fixed sizes inside: what depends on an image's content
            cannot be recorded.
        precision: as for `restore`.
        sizes: how many sizes are kept; the one that was recorded first goes first.

    Raises:
        RuntimeError: in a call, from PyTorch: the image is not on a GPU, or the network cannot be recorded.
    """

    def __init__(self, network: nn.Module, precision: str = 'fp32', sizes: int = 2) -> None:
        self.network, self.precision, self.sizes = network, precision, sizes
        self._recorded: dict[tuple[Any, ...], tuple[Tensor, Callable[[], None], Tensor]] = {}
        # A recording reads and writes tensors of its own: threads take turns.
        self._lock = threading.Lock()

    def __call__(self, image: Tensor) -> Tensor:
        """(N, 3, H, W) to the same, as `restore` without tiles."""
        with self._lock:
            return self._restored(image)

    def _restored(self, image: Tensor) -> Tensor:
        key = (image.shape, image.stride(), image.dtype, image.device)
        if key not in self._recorded:
            while len(self._recorded) >= max(1, self.sizes):
                del self._recorded[next(iter(self._recorded))]
            self._recorded[key] = self._record(image.clone())
        given, replay, restored = self._recorded[key]
        with torch.inference_mode():
            given.copy_(image)
        replay()
        return restored.clone()

    def _record(self, image: Tensor) -> tuple[Tensor, Callable[[], None], Tensor]:
        with evaluating(self.network), torch.cuda.device(image.device):
            return image, *_recorded(lambda: whole_image(self.network, image, self.precision))


def _recorded(call: Callable[[], Tensor], warm_ups: int = 3) -> tuple[Callable[[], None], Tensor]:
    """What replays the kernels of `call`, and where they leave its result.

    Libraries set themselves up in the first calls, which must not be recorded, on a stream that is not
    the default one, as PyTorch demands.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_ups):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph.replay, result
