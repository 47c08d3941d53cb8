"""One image in, one image out: padding, final output, precision, tiles, CUDA graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dsgformer_arch.ops.padding import pad_to_multiple

Outputs = Tensor | list[Tensor] | tuple[Tensor, ...]
"""What a network returns: an image, or several of which one is the result."""

PRECISIONS = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
"""Names of the precisions that command lines and options take."""


def final_output(network: nn.Module, outputs: Outputs) -> Tensor:
    """The restored image among what a network returns.

    A network that returns several images (MPRNet's stages, ConvIR's scales)
    says in its class attribute `final_output` which one counts: an index, -1
    where it says nothing.
    """
    if isinstance(outputs, (list, tuple)):
        return outputs[getattr(network, 'final_output', -1)]
    return outputs


def predict(call: Callable[[Tensor], Outputs], image: Tensor, offset: float = 0.0) -> Outputs:
    """What a network makes of an image in [0, 1], where it wants its images shifted.

    Args:
        call: the network, or whatever wraps it.
        image: (N, 3, H, W) in [0, 1].
        offset: the network's attribute `input_offset` (Stripformer: 0.5, for images in [-0.5, 0.5]).

    Returns:
        The network's outputs, shifted back.
    """
    if not offset:
        return call(image)
    outputs = call(image - offset)
    if isinstance(outputs, Tensor):
        return outputs + offset
    return [output + offset for output in outputs]


def order_memory(network: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    """Put a network's kernels in a memory order, in place.

    `nn.Module.to(memory_format=…)` stops at parameters of five dimensions, as FFTformer has them.
    """
    for parameter in network.parameters():
        if parameter.ndim == 4 and not parameter.is_contiguous(memory_format=memory_format):
            parameter.data = parameter.data.contiguous(memory_format=memory_format)
    return network


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside, the former mode afterwards."""
    # Changing the mode visits every module twice: milliseconds, which small images would notice.
    changed = any(module.training for module in network.modules())
    training = network.training
    if changed:
        network.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        if changed:
            network.train(training)


def restore(
    network: nn.Module,
    image: Tensor,
    *,
    precision: str = 'fp32',
    tile: int | None = None,
    tile_overlap: int = 32,
) -> Tensor:
    """Restore a batch of images.

    Args:
        network: any network of (N, 3, H, W) to the same size.  Its attributes `pad_multiple` and
            `min_size`, where it has them, say what sizes it takes.
        image: (N, 3, H, W) in [0, 1], on the network's device.
        precision: `'fp32'`, or `'bf16'` or `'fp16'` for autocast.
        tile: side of the tiles into which larger images are cut, or None for the whole image at once.
            Tiles change the result wherever a network uses statistics of the whole image.
        tile_overlap: how far tiles overlap; the overlap is blended linearly.

    Returns:
        (N, 3, H, W), float32 (float64 for a float64 image), not clipped.

    Raises:
        ValueError: tile or overlap are out of range.
    """
    if tile is not None and not 0 <= tile_overlap < tile:
        raise ValueError(
            f'tile_overlap is {tile_overlap}, but should lie between 0 and tile - 1 = {tile - 1}'
        )
    with evaluating(network):
        if tile is None or max(image.shape[-2:]) <= tile:
            return _whole(network, image, precision)
        return _tiled(network, image, precision, tile, tile_overlap)


def _whole(network: nn.Module, image: Tensor, precision: str) -> Tensor:
    height, width = image.shape[-2:]
    padded = pad_to_multiple(image, getattr(network, 'pad_multiple', 1), getattr(network, 'min_size', 1))
    dtype = PRECISIONS[precision]
    with torch.autocast(image.device.type, dtype, enabled=dtype is not torch.float32):
        outputs = predict(network, padded, getattr(network, 'input_offset', 0.0))
    restored = final_output(network, outputs)
    restored = restored if restored.dtype == torch.float64 else restored.float()
    return restored[..., :height, :width]


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

    def __call__(self, image: Tensor) -> Tensor:
        """(N, 3, H, W) to the same, as `restore` without tiles."""
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
            return image, *_recorded(lambda: _whole(self.network, image, self.precision))


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


def _tiled(network: nn.Module, image: Tensor, precision: str, tile: int, overlap: int) -> Tensor:
    total = torch.zeros_like(image)
    weight = torch.zeros_like(image[:1, :1])
    height, width = image.shape[-2:]
    for top in tile_starts(height, tile, overlap):
        for left in tile_starts(width, tile, overlap):
            part = image[..., top : top + tile, left : left + tile]
            ramp = _ramp(part.shape[-2], overlap, image)[:, None] * _ramp(part.shape[-1], overlap, image)
            total[..., top : top + tile, left : left + tile] += ramp * _whole(network, part, precision)
            weight[..., top : top + tile, left : left + tile] += ramp
    return total / weight


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles of side `tile` start so that they cover `size` and overlap by at least `overlap`."""
    if size <= tile:
        return [0]
    step = tile - overlap
    return [*range(0, size - tile, step), size - tile]


def _ramp(size: int, overlap: int, like: Tensor) -> Tensor:
    """Weights that rise from the tile's border over the overlap; never 0."""
    position = torch.arange(1, size + 1, device=like.device, dtype=like.dtype)
    return torch.minimum(position, size + 1 - position).clamp(max=overlap + 1)
