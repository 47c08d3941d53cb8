"""Compile what `gpu.restored` would launch on a Hopper GPU, on a machine without one.

`python -m tests.ops.compile_for_hopper C heads attention score gate` prints, as JSON, the bytes of
code and of shared memory of each kernel.  A process of its own, as Triton decides when it is imported
whether it interprets.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from dsgformer_arch.ops import eager, gpu
from tests.ops.test_block import _block, _image


class _Hopper:
    """As much of Triton's driver as compiling takes."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget('cuda', 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main(channels: int, heads: int, *switches: str) -> None:
    driver.set_active(_Hopper())  # type: ignore[arg-type]
    kernels: dict[str, Any] = {}
    run = JITFunction.run

    def compiled(self: Any, *arguments: Any, **options: Any) -> None:
        kernels[self.__name__] = run(self, *arguments, **(options | {'warmup': True}))

    JITFunction.run = compiled
    block = _block(channels, heads, switches).float()  # type: ignore[arg-type]
    x = _image(1, channels, 16, 32).permute(0, 2, 3, 1).contiguous()
    with torch.inference_mode():
        gpu.restored(x.bfloat16(), x.bfloat16(), eager.Weights.of(block, torch.bfloat16))
    sizes = {
        name: {'code': len(kernel.asm['cubin']), 'shared': kernel.metadata.shared}
        for name, kernel in kernels.items()
    }
    print(json.dumps(sizes))


if __name__ == '__main__':
    assert not triton.knobs.runtime.interpret
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
