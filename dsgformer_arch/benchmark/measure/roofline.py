"""Measured limits of a device, and the least time that a system could take.

Two ceilings, each the best of several runs on random numbers, in the precision of the system: the rate of
a large product of matrices, or on a CPU of a large convolution where that is higher, and that of a large
copy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dsgformer_arch import ops, zoo
from dsgformer_arch.archs.dsgformer_arch import DSGA
from dsgformer_arch.benchmark.measure import machine
from dsgformer_arch.restore import PRECISIONS

SIDE = {'cpu': 4096, 'cuda': 8192}
"""Sides of the square matrices, by device type; the convolution has an eighth as many channels, kernels of
3×3 and a map of a 32nd of the side."""

COPIED = {'cpu': 1 << 28, 'cuda': 1 << 32}
"""Bytes of the copied tensor."""

RUNS = 5


@dataclass(frozen=True)
class Rates:
    """The ceilings of a device.

    Attributes:
        operations: floating-point operations a second in a product or a convolution, two to a MAC.
        bytes: read and written, a second, in a copy.
    """

    operations: float
    bytes: float

    def floor(self, multiply_adds: float, traffic: float) -> float:
        """Least seconds for so many MACs and bytes: the larger of the two times."""
        return max(2 * multiply_adds / self.operations, traffic / self.bytes)


def measure(device: torch.device, precisions: Iterable[str]) -> dict[str, Rates]:
    """The ceilings of `device` in each of `fp32`, `bf16` or `fp16`."""
    copied = _bytes(device)
    return {kind: Rates(_operations(device, PRECISIONS[kind]), copied) for kind in precisions}


def _operations(device: torch.device, dtype: torch.dtype) -> float:
    side = SIDE.get(device.type, SIDE['cpu'])
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    rate = 2 * side**3 / _least(lambda: torch.mm(a, b, out=product), device)
    if device.type != 'cpu':
        return rate
    # Products are MKL's, which does not use AVX-512 on AMD's processors, and convolutions oneDNN's.
    kernel = torch.randn(side // 8, side // 8, 3, 3, dtype=dtype)
    x = torch.randn(1, side // 8, side // 32, side // 32, dtype=dtype).contiguous(
        memory_format=torch.channels_last
    )
    with torch.no_grad():
        seconds = _least(lambda: F.conv2d(x, kernel, padding=1), device)
    return max(rate, 2 * kernel.numel() * x[0, 0].numel() / seconds)


def _bytes(device: torch.device) -> float:
    size = COPIED.get(device.type, COPIED['cpu'])
    source = torch.randint(256, (size,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * size / _least(lambda: target.copy_(source), device)


def _least(call: Callable[[], Any], device: torch.device) -> float:
    times = []
    for _ in range(RUNS + 1):
        machine.wait(device)
        begun = time.perf_counter()
        call()
        machine.wait(device)
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def least_traffic(name: str, height: int, width: int, precision: str) -> int:
    """Least memory traffic of a system's blocks for one image in bytes, if known.

    DSGformer's block reads X for Q Kᵀ, reads it again for V and U, and writes Y.

    Returns:
        0 for networks of other blocks.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), ops.use('plain'):
        network = zoo.create(name).eval()
        blocks = [module for module in network.modules() if isinstance(module, DSGA)]
        numbers = 0

        def count(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            nonlocal numbers
            numbers += 2 * given[0].numel() + output.numel()

        for block in blocks:
            block.register_forward_hook(count)
        if blocks:
            network(torch.empty(1, 3, height, width))
    return numbers * PRECISIONS[precision].itemsize
