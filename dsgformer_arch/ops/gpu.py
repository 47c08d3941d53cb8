"""Triton kernels of the block DSGA with the paper's switches, for GPUs, without gradients.

In eager form some twenty tensors of the size of X pass through memory.  Here
only W_p LN(X) does:

* `_project` writes W_p LN(X).  With more than 128 channels the product
  dominates the memory traffic, and PyTorch computes both.
* `_gram` reads Q and K before W_d, and accumulates Q Kᵀ and the squared norms of the rows.
* `_map` computes the sparse c×c maps from these.
* `_output` reads V and U before W_d and the residual, and writes Y.  With more
  than 128 channels it writes the gated product, and PyTorch multiplies it by W_p'.

Each equals its eager implementation in `eager.py`, `dtsas.py` and `dfgb.py`, but
keeps sums in float32 that those round.  Without a GPU, Triton's interpreter runs
the kernels on a CPU (`TRITON_INTERPRET=1`); the tests use it.

This module is imported only where Triton is installed and a CUDA tensor needs it.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsgformer_arch.ops import dfgb, dtsas, eager, selftest
from dsgformer_arch.ops.selftest import Verdict

if TYPE_CHECKING:
    from dsgformer_arch.ops.eager import Weights

TYPES = (torch.bfloat16, torch.float16)
"""Types of the matrix units.  Float32 is excluded, as they would round it to 10 bits."""

WIDEST_HEAD = 128
"""Channels of a head at most: its c×c map has to fit into the registers of one program."""

WIDEST_FUSED = 128
"""Channels up to which the kernels multiply by W_p and W_p': the sums fit into the registers of a program."""

PIXELS = 128
"""Pixels that one program of `_project` computes."""

SEGMENT = 16
"""Columns that one program of `_gram` reads."""

CHUNK = 16
"""Channels of V and U that `_output` convolves at a time; the channels of a head must be a multiple."""

PROGRAMS = 1024
"""Programs of `_gram` that a large image is divided into: eight for each multiprocessor of an H200."""

LEAST_ROWS = 8
"""Rows that one program of `_gram` sums at least, as each reads two rows more."""

MAP_ROWS = 16
"""Rows of a c×c map that one program of `_map` ranks."""

_VERDICTS: dict[tuple[torch.device, torch.dtype, int, int], Verdict] = {}
_LOCK = threading.RLock()


def takes(device: torch.device, dtype: torch.dtype, channels: int, heads: int) -> bool:
    """Whether `restored` computes blocks of these sizes and types, and passes its self-test on `device`."""
    c = channels // heads
    if device.type != 'cuda' or dtype not in TYPES or c % CHUNK or c > WIDEST_HEAD:
        return False
    return works(device, dtype, channels, heads).passed


def works(device: torch.device, dtype: torch.dtype, channels: int, heads: int) -> Verdict:
    """The outcome of the self-test: the kernels compile, and equal the eager implementation on a small image.

    It runs once per process.  A failure that may be transient, such as a lack of memory, is not remembered.
    """
    key = (device, dtype, channels, heads)
    verdict = _VERDICTS.get(key)
    if verdict is None:
        if device.type == 'cuda' and torch.cuda.is_current_stream_capturing():
            return Verdict(False, 'a CUDA graph is being captured', final=False)
        with _LOCK:
            verdict = _VERDICTS.get(key) or selftest.run(
                lambda x, residual, weights: restored(x, residual, weights)[0], channels, heads, dtype, device
            )
            if verdict.final:
                _VERDICTS[key] = verdict
            if not verdict.passed:
                selftest.warn_once(f'{device} {dtype}', verdict.reason)
    return verdict


def disable(device: torch.device, dtype: torch.dtype, channels: int, heads: int, reason: str) -> None:
    """Make `takes` refuse blocks of these sizes and types for the rest of the process."""
    _VERDICTS[device, dtype, channels, heads] = Verdict(False, reason)


def restored(x: Tensor, residual: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """`eager.whole_with_scores` without gradients, for blocks with the paper's switches.

    A batch is computed at once, or, where its images are large, image by image and strip by strip.
    """
    x, residual, weights = x.contiguous(), residual.contiguous(), _contiguous(weights)
    y = torch.empty_like(residual)
    taps = weights.depthwise.flatten(1).t().contiguous()
    n, height, _, channels = x.shape
    rows = eager.strip_rows(x)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        if n * height <= rows:
            ((_, P),) = eager.strips(x, weights, weights.project_in, height, project)
            attention, scores = sparse_map(
                gram(P[..., : 2 * channels], taps, weights.heads), weights, x.dtype
            )
            output(P[..., 2 * channels :], taps[:, 2 * channels :], attention, weights, residual, y)
            return y, scores
        every: list[Tensor] = []
        for_qk, for_vu = weights.project_in.split(2 * channels)
        for image, kept, out in zip(x.split(1), residual.split(1), y.split(1), strict=True):
            strips = eager.strips(image, weights, for_qk, rows, project)
            sums = reduce(torch.add, (gram(P, taps, weights.heads) for _, P in strips))
            attention, scores = sparse_map(sums, weights, x.dtype)
            every.append(scores)
            for part, P in eager.strips(image, weights, for_vu, rows, project):
                output(P, taps[:, 2 * channels :], attention, weights, kept[:, part], out[:, part])
    return y, torch.cat(every)


def _contiguous(weights: Weights) -> Weights:
    """The same with contiguous tensors, which the kernels require."""
    tensors: dict[str, Any] = {
        name: value for name, value in vars(weights).items() if isinstance(value, Tensor)
    }
    return replace(weights, **{name: value.contiguous() for name, value in tensors.items()})


def project(x: Tensor, weights: Weights, project_in: Tensor, P: Tensor) -> None:
    """Write W_p LN(x) into `P`; both of (N, rows, W, channels), each image contiguous."""
    n, rows, width, channels = x.shape
    if channels > WIDEST_FUSED:
        eager.project(x, weights, project_in, P)
        return
    _project[(triton.cdiv(rows * width, PIXELS), n)](
        x, weights.norm_weight, weights.norm_bias, project_in, P,
        rows * width, project_in.shape[0], x.stride(0), P.stride(0),
        C=channels, CP=_power(channels), PIXELS=PIXELS, WIDE=64, EPSILON=eager.LN_EPSILON,
        num_warps=8, num_stages=2,
    )  # fmt: skip


def gram(strip: Tensor, taps: Tensor, heads: int) -> Tensor:
    """Q Kᵀ of each head and the rows' sums of squares.

    Args:
        strip: W_p LN(X) of Q and K, (N, rows + 2, W, 2C), channels contiguous; the first and the last row are
            the neighbouring rows of the image, or zeros at its border.
        taps: W_d, (9, 2C or more), with those of Q and K first.
        heads: heads of c = C / heads channels.

    Returns:
        (N, heads, c + 2, c), float32: the products, then the squares of Q's rows, then those of K's.
    """
    n, rows, width, channels = strip.shape[0], strip.shape[1] - 2, strip.shape[2], strip.shape[3] // 2
    c = channels // heads
    segments = triton.cdiv(width, SEGMENT)
    piece = max(LEAST_ROWS, triton.cdiv(n * rows * segments * heads, PROGRAMS))
    pieces = triton.cdiv(rows, piece)
    sums = strip.new_empty((pieces * segments, n, heads, c + 2, c), dtype=torch.float32)
    _gram[(segments, pieces, n * heads)](
        strip, taps, sums, rows, width, piece, *strip.stride()[:3], channels, taps.stride(0),
        c=c, HEADS=heads, CP=_power(c), SEGMENT=SEGMENT,
        num_warps=8 if c > 64 else 4, num_stages=3, maxnreg=255 if c > 64 else 168,
    )  # fmt: skip
    # In a fixed order: with atomic additions, rounding and so the choice of T_k would differ between runs.
    return sums.sum(0)


def sparse_map(sums: Tensor, weights: Weights, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The map Σ_n W_n φ(T_{k_n}(A)), (N, heads, c, c) of `dtype`, from `gram`; and A, float32."""
    n, heads, _, c = sums.shape
    assert weights.step is not None
    attention = sums.new_empty((n, heads, c, c), dtype=dtype)
    scores = torch.empty_like(attention, dtype=torch.float32)
    _map[(n * heads, triton.cdiv(c, MAP_ROWS))](
        sums, weights.temperature, weights.step, attention, scores,
        c=c, HEADS=heads, CP=_power(c), ROWS=MAP_ROWS, TOP_K=weights.top_k,
        EPSILON=dtsas.EPSILON**2, num_warps=4,
    )  # fmt: skip
    return attention, scores


def output(
    strip: Tensor, taps: Tensor, attention: Tensor, weights: Weights, residual: Tensor, y: Tensor
) -> None:
    """Write Y = X + W_p' ( gate(U) ⊙ DTSAS(Q, K) V ) of a strip of rows into `y`.

    Args:
        strip: W_p LN(X) of V and U, as `gram` takes it.
        taps: W_d of V and U, (9, 2C).
        attention: the maps, (N, heads, c, c), of the type of the strip.
        weights: the block's.
        residual: X, (N, rows, W, C), each image contiguous.
        y: the same shape and strides.
    """
    n, rows, width, channels = residual.shape
    heads, c = attention.shape[1:3]
    tiles = triton.cdiv(width, dfgb.BLOCK)
    assert weights.mask is not None
    basis, diagonal = dfgb.basis(strip.dtype, strip.device), dfgb.diagonal(weights.mask).contiguous()
    fused = channels <= WIDEST_FUSED
    target = y if fused else strip.new_empty(residual.shape)
    _output[(tiles * triton.cdiv(rows, dfgb.BLOCK), 1 if fused else heads, n)](
        strip, taps, attention, basis, diagonal, weights.project_out, residual, target,
        rows, width, tiles, *strip.stride()[:3], taps.stride(0), residual.stride(0), target.stride(0),
        C=channels, c=c, CO=_power(channels) if fused else 0, CHUNK=CHUNK, BLOCK=dfgb.BLOCK,
        num_warps=8 if fused and channels > 64 else 4, num_stages=1, maxnreg=128,
    )  # fmt: skip
    if not fused:
        torch.add(residual, torch.nn.functional.linear(target, weights.project_out), out=y)


def _power(n: int) -> int:
    """The smallest tile that holds n channels: a power of 2, and at least 16 for the matrix units."""
    return max(16, triton.next_power_of_2(n))


@triton.jit
def _project(
    x, norm_weight, norm_bias, project_in, P, count, outputs, x_image, P_image,
    C: tl.constexpr, CP: tl.constexpr, PIXELS: tl.constexpr, WIDE: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """W_p LN(x) of `PIXELS` of an image's `count` pixels."""
    image = tl.program_id(1).to(tl.int64)
    x += image * x_image
    P += image * P_image
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.arange(0, CP)
    inside, wanted = (pixel < count)[:, None], (channel < C)[None, :]
    values = tl.load(x + pixel[:, None] * C + channel[None, :], inside & wanted, other=0.0).to(tl.float32)
    mean = tl.sum(values, 1) / C
    centred = tl.where(wanted, values - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / C + EPSILON)
    weight = tl.load(norm_weight + channel, channel < C, other=0.0)
    bias = tl.load(norm_bias + channel, channel < C, other=0.0)
    kind = P.dtype.element_ty
    normal = (centred * scale[:, None] * weight[None, :] + bias[None, :]).to(kind)
    for first in range(0, outputs, WIDE):
        out = first + tl.arange(0, WIDE)
        valid = (out < outputs)[None, :]
        W = tl.load(
            project_in + out[None, :] * C + channel[:, None], (channel < C)[:, None] & valid, other=0.0
        )
        product = tl.dot(normal, W)
        tl.store(P + pixel[:, None] * outputs + out[None, :], product.to(kind), inside & valid)


@triton.jit
def _neighbours(P, x, width, pixel, channel, wanted):
    """The pixels left of, at and right of x in the row at `P`, or in a row for each: (pixels, channels)."""
    at = P + x[:, None] * pixel + channel[None, :]
    left = tl.load(at - pixel, ((x > 0) & (x <= width))[:, None] & wanted[None, :], other=0.0)
    middle = tl.load(at, (x < width)[:, None] & wanted[None, :], other=0.0)
    right = tl.load(at + pixel, (x + 1 < width)[:, None] & wanted[None, :], other=0.0)
    return left.to(tl.float32), middle.to(tl.float32), right.to(tl.float32)


@triton.jit
def _weighed(left, middle, right, taps, stride, channel, wanted):
    """The sum of the three values of `_neighbours`, weighted by the row of W_d at `taps`."""
    w_left = tl.load(taps + channel, wanted, other=0.0).to(tl.float32)
    w_middle = tl.load(taps + stride + channel, wanted, other=0.0).to(tl.float32)
    w_right = tl.load(taps + 2 * stride + channel, wanted, other=0.0).to(tl.float32)
    return left * w_left[None, :] + middle * w_middle[None, :] + right * w_right[None, :]


@triton.jit
def _begun(at, row, x, width, pixel, taps, stride, channel, wanted):
    """What the two rows from `at` contribute to the convolution at the second and at the third row."""
    left, middle, right = _neighbours(at, x, width, pixel, channel, wanted)
    opened = _weighed(left, middle, right, taps, stride, channel, wanted)
    left, middle, right = _neighbours(at + row, x, width, pixel, channel, wanted)
    opened += _weighed(left, middle, right, taps + 3 * stride, stride, channel, wanted)
    return opened, _weighed(left, middle, right, taps, stride, channel, wanted)


@triton.jit
def _continued(at, opened, after, x, width, pixel, taps, stride, channel, wanted):
    """Complete the first of two partial sums with the row at `at`; return it and the next two."""
    left, middle, right = _neighbours(at, x, width, pixel, channel, wanted)
    closed = opened + _weighed(left, middle, right, taps + 6 * stride, stride, channel, wanted)
    opened = after + _weighed(left, middle, right, taps + 3 * stride, stride, channel, wanted)
    return closed, opened, _weighed(left, middle, right, taps, stride, channel, wanted)


@triton.jit
def _gram(
    P, taps, sums, rows, width, piece, image, row, pixel, channels, stride,
    c: tl.constexpr, HEADS: tl.constexpr, CP: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """Sums over one segment of the columns and one piece of the rows, for one head of an image.

    The program reads the rows from top to bottom, each once: a row contributes to
    the convolution at the row above it, at itself and at the row below.
    """
    segment, part = tl.program_id(0), tl.program_id(1)
    head = tl.program_id(2) % HEADS
    P += (tl.program_id(2) // HEADS).to(tl.int64) * image
    x = segment * SEGMENT + tl.arange(0, SEGMENT)
    inside = (x < width)[:, None]
    # Two channels a thread: its 18 taps of W_d stay in registers.  With eight channels they spill.
    channel = tl.max_contiguous(tl.arange(0, CP), 2)
    wanted = channel < c
    top = part * piece
    q_at = P + top.to(tl.int64) * row + head * c
    k_at = q_at + channels
    q_taps, k_taps = taps + head * c, taps + channels + head * c
    q_open, q_next = _begun(q_at, row, x, width, pixel, q_taps, stride, channel, wanted)
    k_open, k_next = _begun(k_at, row, x, width, pixel, k_taps, stride, channel, wanted)
    products = tl.zeros((CP, CP), tl.float32)
    q_squares = tl.zeros((CP,), tl.float32)
    k_squares = tl.zeros((CP,), tl.float32)
    for y in range(2, tl.minimum(piece, rows - top) + 2):
        q, q_open, q_next = _continued(
            q_at + y * row, q_open, q_next, x, width, pixel, q_taps, stride, channel, wanted
        )
        k, k_open, k_next = _continued(
            k_at + y * row, k_open, k_next, x, width, pixel, k_taps, stride, channel, wanted
        )
        q = tl.where(inside, q, 0.0).to(P.dtype.element_ty)
        k = tl.where(inside, k, 0.0).to(P.dtype.element_ty)
        products = tl.dot(tl.trans(q), k, products)
        q_squares += tl.sum(q.to(tl.float32) * q.to(tl.float32), 0)
        k_squares += tl.sum(k.to(tl.float32) * k.to(tl.float32), 0)

    piece_index = (part * tl.num_programs(0) + segment).to(tl.int64)
    sums += (piece_index * tl.num_programs(2) + tl.program_id(2)) * (c + 2) * c
    mine = wanted[:, None] & wanted[None, :]
    tl.store(sums + channel[:, None] * c + channel[None, :], products, mine)
    tl.store(sums + c * c + channel, q_squares, wanted)
    tl.store(sums + (c + 1) * c + channel, k_squares, wanted)


@triton.jit
def _at_least(x, least):
    """The larger of the two; NaN stays NaN, which `tl.maximum` drops."""
    return tl.where(x < least, least, x)


@triton.jit
def _map(
    sums, temperature, step, attention, scores,
    c: tl.constexpr, HEADS: tl.constexpr, CP: tl.constexpr, ROWS: tl.constexpr, TOP_K: tl.constexpr,
    EPSILON: tl.constexpr,
):  # fmt: skip
    """`ROWS` rows of the map of one head of an image.

    An entry passes T_k when fewer than k others of its row exceed it.
    """
    head = tl.program_id(0)
    i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, CP)
    valid = (i < c)[:, None] & (j < c)[None, :]
    sums += head * (c + 2) * c
    q_norm = tl.sqrt(_at_least(tl.load(sums + c * c + i, i < c, other=1.0), EPSILON))
    k_norm = tl.sqrt(_at_least(tl.load(sums + (c + 1) * c + j, j < c, other=1.0), EPSILON))
    alpha = tl.load(temperature + head % HEADS)
    products = tl.load(sums + i[:, None] * c + j[None, :], valid, other=0.0)
    A = products / q_norm[:, None] / k_norm[None, :] / alpha
    rank = tl.zeros((ROWS, CP), tl.int32)
    for m in range(c):
        one = tl.load(sums + i * c + m, i < c, other=0.0)
        m_norm = tl.sqrt(_at_least(tl.load(sums + (c + 1) * c + m), EPSILON))
        rank += ((one / q_norm / m_norm / alpha)[:, None] > A).to(tl.int32)
    factor = tl.zeros((ROWS, CP), tl.float32)
    for n in tl.static_range(len(TOP_K)):
        factor += tl.load(step + n) * tl.where(rank < TOP_K[n], 1.0, 0.0)
    positive = _at_least(A, 0.0)
    at = (head * c + i[:, None]) * c + j[None, :]
    tl.store(scores + at, A, valid)
    tl.store(attention + at, (positive * positive * factor).to(attention.dtype.element_ty), valid)


@triton.jit
def _convolved(P, taps, y, x, width, row, pixel, stride, channel, wanted):
    """W_d P at the pixels (y, x), (pixels, channels)."""
    total = tl.zeros((x.shape[0], channel.shape[0]), tl.float32)
    for i in tl.range(3, loop_unroll_factor=1):  # unrolled, the loads of all rows would spill registers
        at = P + ((y + i) * row)[:, None]
        left, middle, right = _neighbours(at, x, width, pixel, channel, wanted)
        total += _weighed(left, middle, right, taps + 3 * i * stride, stride, channel, wanted)
    return total


@triton.jit
def _output(
    P, taps, attention, basis, diagonal, project_out, residual, Y,
    rows, width, tiles, image, row, pixel, stride, x_image, y_image,
    C: tl.constexpr, c: tl.constexpr, CO: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One of DFGB's 8×8 blocks: Y, or one head's gated product where CO is 0."""
    tile, number = tl.program_id(0), tl.program_id(2).to(tl.int64)
    P += number * image
    attention += number * C * c
    residual += number * x_image
    Y += number * y_image
    p = tl.arange(0, BLOCK * BLOCK)
    y = tile // tiles * BLOCK + p // BLOCK
    x = tile % tiles * BLOCK + p % BLOCK
    inside = ((y < rows) & (x < width))[:, None]
    pixels = (y.to(tl.int64) * width + x)[:, None] * C
    # DFGB repeats the border up to whole blocks.
    y, x = tl.minimum(y, rows - 1), tl.minimum(x, width - 1)
    few = tl.arange(0, CHUNK)
    every = few < CHUNK
    kind = P.dtype.element_ty
    B = tl.load(basis + p[:, None] * (BLOCK * BLOCK) + p[None, :])
    if CO:
        out = tl.arange(0, CO)
        total = tl.zeros((BLOCK * BLOCK, CO), tl.float32)
    first = tl.program_id(1) * c
    last = first + c if not CO else C
    while first < last:
        V = ()  # a tuple of chunks of channels: the convolution of all at once would spill
        for done in tl.static_range(0, c, CHUNK):
            some = first + done + few
            chunk = _convolved(P, taps, y, x, width, row, pixel, stride, some, every).to(kind)
            V = V + (chunk,)  # type: ignore[assignment]  # noqa: RUF005  Triton has no (*V, chunk)
        for done in range(0, c, CHUNK):
            some = first + done + few
            product = tl.zeros((BLOCK * BLOCK, CHUNK), tl.float32)
            for n in tl.static_range(c // CHUNK):
                # Aᵀ, (j, i)
                A = tl.load(attention + some[None, :] * c + (n * CHUNK + few)[:, None])
                product = tl.dot(V[n], A, product)
            U = _convolved(P + C, taps + C, y, x, width, row, pixel, stride, some, every)
            spectrum = tl.dot(B, U.to(kind))
            m = tl.load(diagonal + p[:, None] * C + some[None, :])
            U = tl.dot(tl.trans(B), (spectrum * m).to(kind))
            U = 0.5 * U * (1.0 + tl.erf(U * 0.7071067811865476))
            gated = (U * product).to(kind)
            if CO:
                W = tl.load(project_out + out[None, :] * C + some[:, None], (out < C)[None, :], other=0.0)
                total = tl.dot(gated, W, total)
            else:
                tl.store(Y + pixels + some[None, :], gated, inside)
        first += c
    if CO:
        mine = inside & (out < C)[None, :]
        at = pixels + out[None, :]
        total += tl.load(residual + at, mine, other=0.0).to(tl.float32)
        tl.store(Y + at, total.to(Y.dtype.element_ty), mine)
