"""The steps outside the levels: the head, downsampling, upsampling with the skip connection, and the tail.

Kernels train all of them on a CPU.  Without gradients only upsampling has one: it is worth 5 % of the
network's time at 256×256 and 16 % at 1280×720 in float32, the other three together at most 1.5 %.
Everywhere else, and where a module has hooks or was replaced, the modules are called.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from dsgformer_arch.ops import library
from dsgformer_arch.ops.block import computing_dtype, fast, is_plain, is_untouched, path, suits, trains_step
from dsgformer_arch.ops.cpu import binding, training, training_steps


def head(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """`conv(x)`.

    Args:
        conv: 3×3 with a padding of 1 and a bias.
        x: (N, 3·patch², H, W).

    Returns:
        (N, C, H, W).
    """
    if _is_convolution(conv, 3, 1, 1) and not conv.out_channels % training.LANES:
        dtype = trains_step(conv, x, (conv.out_channels, x.shape[1], 3, 3))
        if dtype is not None:
            parameters = conv.weight.float(), _bias(conv)
            return _channels_first(training_steps.convolved(_channels_last(x, dtype), *parameters))
    return cast(Tensor, conv(x))


def down(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """`conv(x)`.

    Args:
        conv: 2×2 of stride 2, with a bias.
        x: (N, C, H, W), H and W even.

    Returns:
        (N, C', H/2, W/2).
    """
    if _is_convolution(conv, 2, 2, 0) and not (x.shape[-2] % 2 or x.shape[-1] % 2):
        widths = 2 * x.shape[1], conv.out_channels
        dtype = trains_step(conv, x, (conv.out_channels, x.shape[1], 2, 2), *widths)
        if dtype is not None:
            parameters = conv.weight.float(), _bias(conv)
            return _channels_first(training_steps.downsampled(_channels_last(x, dtype), *parameters))
    return cast(Tensor, conv(x))


def up(shuffled: nn.Sequential, x: Tensor, skip: Tensor | None) -> Tensor:
    """`shuffled(x) + skip`.

    Args:
        shuffled: a 1×1 convolution without bias, then PixelShuffle(2).
        x: (N, C', H, W).
        skip: (N, C, 2H, 2W), or None for zeros.

    Returns:
        (N, C, 2H, 2W).
    """
    if fast(x) and _is_upsampling(shuffled, x, skip):
        conv = cast(nn.Conv2d, shuffled[0])
        widths = conv.out_channels // 2, x.shape[1]
        dtype = trains_step(conv, x, (conv.out_channels, x.shape[1], 1, 1), *widths)
        if dtype is not None:
            added = None if skip is None else _channels_last(skip, dtype)
            return _channels_first(
                training_steps.upsampled(_channels_last(x, dtype), conv.weight.float(), added)
            )
        dtype = computing_dtype(x)
        if not torch.is_grad_enabled() and binding.takes(dtype, *widths):
            added = None if skip is None else _channels_last(skip, dtype)
            tensors = [_channels_last(x, dtype), conv.weight, *([] if added is None else [added])]
            direct = not library.needs_dispatcher(*tensors)
            operator = library.upsample_on_cpu if direct else library.upsample
            return _channels_first(cast(Tensor, operator(tensors[0], conv.weight, added)))
    y = cast(Tensor, shuffled(x))
    return y if skip is None else y + skip


def tail(conv: nn.Conv2d, x: Tensor, image: Tensor) -> Tensor:
    """`conv(x) + image`.

    Args:
        conv: 3×3 with a padding of 1 and a bias.
        x: (N, C, H, W).
        image: (N, 3·patch², H, W).

    Returns:
        Of the shape of `image`.
    """
    # The kernel computes three channels.
    if _is_convolution(conv, 3, 1, 1) and conv.out_channels == 3 and _is_float32_image(image, x):
        dtype = trains_step(conv, x, (3, x.shape[1], 3, 3), x.shape[1])
        if dtype is not None:
            parameters = conv.weight.float(), _bias(conv), _channels_last(image, image.dtype)
            return _channels_first(training_steps.tail(_channels_last(x, dtype), *parameters))
    return cast(Tensor, conv(x)) + image


def _is_float32_image(image: Tensor, x: Tensor) -> bool:
    shape = (x.shape[0], 3, *x.shape[2:])
    return (
        is_plain(image) and image.dtype == torch.float32 and image.shape == shape and image.device == x.device
    )


def _is_convolution(conv: nn.Module, side: int, stride: int, padding: int) -> bool:
    return (
        type(conv) is nn.Conv2d
        and conv.bias is not None
        and (conv.kernel_size, conv.stride, conv.padding) == ((side,) * 2, (stride,) * 2, (padding,) * 2)
    )


def _is_upsampling(shuffled: nn.Sequential, x: Tensor, skip: Tensor | None) -> bool:
    """Whether the modules are those that the network was built with, and all tensors are on the CPU."""
    if x.device.type != 'cpu' or path() != 'fast' or torch.jit.is_tracing() or _is_exporting():
        return False
    if not is_untouched(shuffled, nn.Sequential) or len(shuffled) != 2:
        return False
    conv, shuffle = cast(nn.Conv2d, shuffled[0]), shuffled[1]
    if not is_untouched(conv, nn.Conv2d) or not is_untouched(shuffle, nn.PixelShuffle):
        return False
    if shuffle.upscale_factor != 2 or conv.bias is not None or conv.groups != 1 or conv.out_channels % 4:
        return False
    if (conv.kernel_size, conv.stride, conv.padding) != ((1, 1), (1, 1), (0, 0)):
        return False
    shape = (x.shape[0], conv.out_channels // 4, 2 * x.shape[2], 2 * x.shape[3])
    if skip is not None and not (is_plain(skip) and skip.shape == shape and skip.device == x.device):
        return False
    return suits(conv.weight, (conv.out_channels, x.shape[1], 1, 1), x)


_is_exporting = getattr(torch.compiler, 'is_exporting', torch.compiler.is_compiling)  # new in torch 2.7


def _channels_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).permute(0, 2, 3, 1).contiguous()


def _channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _bias(conv: nn.Conv2d) -> Tensor:
    return cast(Tensor, conv.bias).float().contiguous()
