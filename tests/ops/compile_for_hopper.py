"""Compile the kernels that `gpu.restored` launches on a Hopper GPU, on a machine without one.

`python -m tests.ops.compile_for_hopper C heads` prints, as JSON, the size of each kernel's code in bytes, its
shared memory in bytes, its registers per thread, and the bytes per thread that it spills from registers to
memory.  It is a separate process because Triton reads `TRITON_INTERPRET` when it is imported.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
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


def _resources(ptx: str) -> dict[str, int]:
    """What NVIDIA's assembler says of a kernel."""
    with tempfile.NamedTemporaryFile('w', suffix='.ptx', encoding='utf-8') as file:
        file.write(ptx)
        file.flush()
        command = [triton.knobs.nvidia.ptxas.path, '-v', '--gpu-name=sm_90a', file.name, '-o', '/dev/null']
        report = subprocess.run(command, capture_output=True, encoding='utf-8', check=True).stderr
    registers = re.search(r'Used (\d+) registers', report)
    spilled = re.search(r'(\d+) bytes spill stores', report)
    assert registers, report
    assert spilled, report
    return {'registers': int(registers[1]), 'spilled': int(spilled[1])}


def main(channels: int, heads: int) -> None:
    driver.set_active(_Hopper())  # type: ignore[arg-type]
    kernels: dict[str, Any] = {}
    run = JITFunction.run

    def compiled(self: Any, *arguments: Any, **options: Any) -> None:
        kernels[self.__name__] = run(self, *arguments, **(options | {'warmup': True}))

    JITFunction.run = compiled
    block = _block(channels, heads).float()
    x = _image(1, channels, 16, 32).permute(0, 2, 3, 1).contiguous()
    with torch.inference_mode():
        gpu.restored(x.bfloat16(), x.bfloat16(), eager.Weights.of(block, torch.bfloat16))
    reports = {
        name: {'code': len(kernel.asm['cubin']), 'shared': kernel.metadata.shared}
        | _resources(kernel.asm['ptx'])
        for name, kernel in kernels.items()
    }
    print(json.dumps(reports))


if __name__ == '__main__':
    assert not triton.knobs.runtime.interpret
    main(int(sys.argv[1]), int(sys.argv[2]))
