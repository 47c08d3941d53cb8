"""One image in, one image out: padding, final output, precision, tiles, CUDA graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from dsgformer_arch.archs.layers.padding import pad_to_multiple

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
            return whole_image(network, image, precision)
        return _tiled(network, image, precision, tile, tile_overlap)


def whole_image(network: nn.Module, image: Tensor, precision: str) -> Tensor:
    height, width = image.shape[-2:]
    padded = pad_to_multiple(image, getattr(network, 'pad_multiple', 1), getattr(network, 'min_size', 1))
    dtype = PRECISIONS[precision]
    with torch.autocast(image.device.type, dtype, enabled=dtype is not torch.float32):
        outputs = predict(network, padded, getattr(network, 'input_offset', 0.0))
    restored = final_output(network, outputs)
    restored = restored if restored.dtype == torch.float64 else restored.float()
    return restored[..., :height, :width]


def _tiled(network: nn.Module, image: Tensor, precision: str, tile: int, overlap: int) -> Tensor:
    total = torch.zeros_like(image)
    weight = torch.zeros_like(image[:1, :1])
    height, width = image.shape[-2:]
    for top in tile_starts(height, tile, overlap):
        for left in tile_starts(width, tile, overlap):
            part = image[..., top : top + tile, left : left + tile]
            ramp = _ramp(part.shape[-2], overlap, image)[:, None] * _ramp(part.shape[-1], overlap, image)
            total[..., top : top + tile, left : left + tile] += ramp * whole_image(network, part, precision)
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
