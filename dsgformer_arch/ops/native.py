"""Compiles and calls `dsga_kernel.cpp`: the block for a CPU in one piece, and the steps outside the levels.

The user's C++ compiler builds it the first time that it is needed (a few
seconds), into the user's cache folder; later runs load what is there.  Without
a compiler, on a processor for which oneDNN has no small matrix products, or if
the kernel fails a comparison with the eager form, the eager form runs.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsgformer_arch.ops import memory
from dsgformer_arch.ops.switch import compiled_forms_take

if TYPE_CHECKING:
    from dsgformer_arch.ops.dsga import Weights

SOURCE = Path(__file__).with_name('dsga_kernel.cpp')

TYPES = (torch.float32, torch.bfloat16)

SCORES = ('relu2', 'relu', 'softmax')
"""The kernel's enumeration of φ."""

LANES = 16
"""The kernel's vectors hold 16 channels; a head's width must be a multiple."""

_LOG = logging.getLogger(__name__)


_POINTERS = (
    *('x', 'y', 'norm_weight', 'norm_bias', 'project_in', 'depthwise', 'project_out'),
    *('temperature', 'weights', 'top_k', 'mask'),
)


class _Call(ctypes.Structure):
    """`struct Dsga` of the kernel."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ('height', 'width', 'channels', 'heads', 'gate', 'score', 'thresholds')
        ),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    ]


class _Step(ctypes.Structure):
    """`struct Step` of the kernel."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ('height', 'width', 'fine', 'coarse')),
        *((name, ctypes.c_void_p) for name in ('x', 'weight', 'bias', 'skip', 'y')),
    ]


def computes_in(x: Tensor, *widths: int) -> torch.dtype | None:
    """The type in which the kernel takes products of `x` of such widths: autocast's, or that of x.

    Returns:
        None where the kernel cannot run: it takes numbers on a CPU, without gradients.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    if x.device.type != 'cpu' or any(width % LANES for width in widths) or not compiled_forms_take(x):
        return None
    dtype = torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else x.dtype
    return dtype if dtype in TYPES and _works(dtype) else None


def restored(x: Tensor, weights: Weights) -> Tensor:
    """Y of the block, without gradients.

    Args:
        x: (N, H, W, C), contiguous.
        weights: in float32, whatever the type of x.

    Returns:
        (N, H, W, C), contiguous, as `dsga.whole` gives it.
    """
    _, height, width, channels = x.shape
    y = memory.kept.empty(x.shape, x.dtype)
    parameters = {
        'norm_weight': weights.norm_weight,
        'norm_bias': weights.norm_bias,
        'project_in': weights.project_in,
        'depthwise': weights.depthwise,
        'project_out': weights.project_out,
        'temperature': weights.temperature,
        'weights': weights.step,
        'mask': weights.mask,
    }
    held = {name: value.contiguous() for name, value in parameters.items() if value is not None}
    top_k = (ctypes.c_int64 * len(weights.top_k))(*weights.top_k)
    gate = 0 if weights.mask is not None else 1 if weights.gelu else 2
    call = _Call(
        *(height, width, channels, weights.heads, gate),
        SCORES.index(weights.score),
        len(top_k),
        top_k=ctypes.addressof(top_k),
        **{name: value.data_ptr() for name, value in held.items()},
    )
    for image, restored_image in zip(x, y, strict=True):
        call.x, call.y = image.data_ptr(), restored_image.data_ptr()
        _enter('dsga', x.dtype, call)
    return y


def convolved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 3×3 convolution of few channels, with a padding of 1.

    Args:
        x: (N, H, W, C), contiguous.
        weight: (C', 9C and zeros up to a multiple of `LANES`) of outputs, then rows, columns, inputs;
            contiguous, float32.
        bias: (C',), float32.

    Returns:
        (N, H, W, C'), contiguous.
    """
    n, height, width, channels = x.shape
    y = memory.kept.empty((n, height, width, weight.shape[0]), x.dtype)
    return _stepped('head', _Step(height, width, channels, weight.shape[0]), x, weight, bias, None, y)


def downsampled(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 2×2 convolution of stride 2.

    Args:
        x: (N, 2H, 2W, C), contiguous.
        weight: (2, C', 2, C) of rows, outputs, columns, inputs; contiguous, float32.
        bias: (C',), float32.

    Returns:
        (N, H, W, C'), contiguous.
    """
    n, height, width, fine = x.shape
    y = memory.kept.empty((n, height // 2, width // 2, weight.shape[1]), x.dtype)
    return _stepped('down', _Step(height // 2, width // 2, fine, weight.shape[1]), x, weight, bias, None, y)


def upsampled(x: Tensor, weight: Tensor, skip: Tensor | None) -> Tensor:
    """A 1×1 convolution whose outputs become 2×2 pixels, and the sum with `skip`.

    Args:
        x: (N, H, W, C'), contiguous.
        weight: (2, 2, C, C') of rows, columns, outputs, inputs; contiguous, float32.
        skip: (N, 2H, 2W, C), contiguous, of the type of x; or None.

    Returns:
        (N, 2H, 2W, C), contiguous.
    """
    n, height, width, coarse = x.shape
    y = memory.kept.empty((n, 2 * height, 2 * width, weight.shape[2]), x.dtype)
    return _stepped('up', _Step(height, width, weight.shape[2], coarse), x, weight, None, skip, y)


def summed(x: Tensor, weight: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
    """A 3×3 convolution to 3 channels, with a padding of 1, and the sum with `skip`.

    Args:
        x: (N, H, W, C), contiguous.
        weight: (27 and zeros up to a multiple of `LANES`, C) of rows, columns, outputs, then inputs;
            contiguous, float32.
        bias: (3,), float32.
        skip: (N, H, W, 3), contiguous, float32.

    Returns:
        (N, H, W, 3), contiguous, float32.
    """
    _, height, width, channels = x.shape
    y = torch.empty_like(skip)
    return _stepped('tail', _Step(height, width, channels, skip.shape[-1]), x, weight, bias, skip, y)


def _stepped(
    name: str, call: _Step, x: Tensor, weight: Tensor, bias: Tensor | None, skip: Tensor | None, y: Tensor
) -> Tensor:
    """`y`, filled image by image by the kernel's entry `name`; `call` brings the sizes."""
    call.weight, call.bias = weight.data_ptr(), None if bias is None else bias.data_ptr()
    for i in range(len(x)):
        call.x, call.y = x[i].data_ptr(), y[i].data_ptr()
        call.skip = None if skip is None else skip[i].data_ptr()
        _enter(name, x.dtype, call)
    return y


def _enter(name: str, dtype: torch.dtype, call: ctypes.Structure) -> None:
    entry = getattr(library(), f'{name}_{str(dtype).removeprefix("torch.")}')
    if entry(ctypes.byref(call)):
        raise RuntimeError('oneDNN has no small matrix product for this processor')


@lru_cache(maxsize=len(TYPES))
def _works(dtype: torch.dtype) -> bool:
    """Whether the kernel can be had for `dtype`, and gives on a small image what the eager form gives."""
    from dsgformer_arch.ops import trial  # which imports this module

    def form(x: Tensor, residual: Tensor, weights: Weights) -> Tensor:
        return restored(x, weights)

    try:
        library()
    except (OSError, RuntimeError, subprocess.SubprocessError) as reason:
        _LOG.info('the eager form of DSGA runs, as there is no kernel here: %s', reason)
        return False
    return trial.passes(form, 2 * LANES, 2, dtype, torch.device('cpu'), torch.float32)


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The compiled kernel.

    Raises:
        OSError, RuntimeError, subprocess.SubprocessError: if it cannot be built or loaded here.
    """
    return ctypes.CDLL(str(_built()))


def _built() -> Path:
    compiler = shlex.split(os.environ.get('CXX', '')) or ['c++']
    if shutil.which(compiler[0]) is None:
        raise RuntimeError(f'there is no compiler {compiler[0]!r}')
    torch_folder = Path(torch.__file__).parent
    command = [
        *compiler,
        *(
            '-O3',
            '-march=native',
            '-fno-math-errno',
            '-std=c++20',
            '-fopenmp',
            '-fPIC',
            '-DAT_PARALLEL_OPENMP=1',
        ),
        f'-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}',
        f'-I{torch_folder / "include"}',
    ]
    version = _run([*compiler, '--version'])
    identity = '\0'.join([SOURCE.read_text(), *command, version, torch.__version__, _processor()])
    name = hashlib.sha256(identity.encode()).hexdigest()[:16]
    folder = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'dsgformer_arch'
    target = folder / f'dsga-{name}.so'
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            compiled, linked = Path(scratch, 'dsga.o'), Path(scratch, 'dsga.so')
            _run([*command, '-c', str(SOURCE), '-o', str(compiled)])
            # OpenMP is not linked: its symbols come with torch, whose threads are then the only ones.
            libraries = [f'-L{torch_folder / "lib"}', '-ltorch_cpu', '-lc10']
            _run([*compiler, '-shared', str(compiled), '-o', str(linked), *libraries])
            os.replace(linked, target)
    return target


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError(f'{command[0]} failed: {done.stderr.strip()[-2000:]}')
    return done.stdout


def _processor() -> str:
    """What `-march=native` depends on: a cache folder may be shared by several machines."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(('flags', 'Features'))), platform.processor())
