"""CUDA graphs: the kernels of an image size are recorded once and then replayed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dsgformer_arch.restore import evaluating, whole_image


class CudaGraphs:
    """`restore` on a GPU with one launch per image: the kernels of an image size are recorded and replayed.

    This is faster for video and for folders of images of one size, where a CPU launches hundreds of small
    kernels more slowly than the GPU runs them.  The first image of a size takes several times as long, and
    each recorded size keeps the memory of its intermediate results.  A graph reads the parameters' memory:
    in-place changes take effect, replaced parameters do not.

    Args:
        network: as for `restore`, on a GPU.  The shapes of its tensors must depend on the image's size only.
        precision: as for `restore`.
        sizes: how many sizes are kept; the oldest recording is dropped first.

    Raises:
        RuntimeError: in a call, from PyTorch: the image is not on a GPU, or the network cannot be recorded.
    """

    def __init__(self, network: nn.Module, precision: str = 'fp32', sizes: int = 2) -> None:
        self.network, self.precision, self.sizes = network, precision, sizes
        self._recorded: dict[tuple[Any, ...], tuple[Tensor, Callable[[], None], Tensor]] = {}
        # A graph reads and writes fixed tensors, so only one thread may use it at a time.
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
    """A function that replays the kernels of `call`, and the tensor that they write.

    The first calls initialise libraries and must not be recorded; PyTorch requires them on a stream other
    than the default one.
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
