"""The block DSGA in PyTorch operations, channels last, ordered for little memory traffic.

Reference implementation: `dsgformer_arch.archs.dsgformer_arch.DSGA.reference`.
Three implementations of the same arithmetic:

* `whole` takes whole tensors and is differentiable: for training, for
  `torch.compile`, for export and for small images.
* `in_strips` restores large images in two passes over strips of rows, so that
  no tensor with more channels than X has its full height.  The first pass needs only Q and K,
  and of them only Q Kᵀ and the rows' norms; the second needs only V and U, and
  of them only the gated product.
* `in_windows` is `in_strips` with one c×c map for each window (local pooling, `archs.tlc`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsgformer_arch.ops import dfgb, dtsas

if TYPE_CHECKING:
    from dsgformer_arch.archs.dsgformer_arch import DSGA

STRIP_BYTES = {'cpu': 4 << 20}
"""Size of a strip of W_p LN(X) of two of Q, K, V, U by device type: two cores' L2 on a server's CPU."""

ACCELERATOR_STRIP_BYTES = 512 << 20
"""The same elsewhere, where strips only bound the memory of very large images."""

LN_EPSILON = 1e-5
"""Added to the variance by LN; PyTorch's default."""

KEPT_BYTES = {'cpu': 16 << 20}
"""By device type, the size of X up to which training keeps the tensors that `recomputing` recomputes.

This saves a third of the time of a step on small crops, for which a CPU has enough memory.
"""


@dataclass(frozen=True)
class Weights:
    """A block's parameters and its switches.  Tensors have the type of the activations unless noted."""

    norm_weight: Tensor
    """(C,), at least float32"""
    norm_bias: Tensor
    """(C,), at least float32"""
    project_in: Tensor
    """W_p, (4C, C)"""
    depthwise: Tensor
    """W_d, (4C, 1, 3, 3)"""
    project_out: Tensor
    """W_p', (C, C)"""
    temperature: Tensor
    """α, (heads, 1, 1), at least float32"""
    step: Tensor | None
    """W_n, (N,), at least float32; None without T_k"""
    mask: Tensor | None
    """M of DFGB, (C, 8, 5), at least float32; None for the other gates"""
    heads: int
    top_k: tuple[int, ...]
    score: str
    gelu: bool

    @classmethod
    def of(cls, block: DSGA, dtype: torch.dtype) -> Weights:
        """The parameters of `block` cast to `dtype`, differentiably."""
        attention = block.attention
        mask = getattr(block.gate, 'mask', None)
        return cls(
            block.norm.weight,
            block.norm.bias,
            block.project_in.weight.flatten(1),
            block.depthwise.weight,
            block.project_out.weight.flatten(1),
            attention.temperature,
            attention.weights if attention.top_k else None,
            mask if isinstance(mask, Tensor) else None,
            attention.heads,
            attention.top_k,
            attention.score,
            not isinstance(block.gate, nn.Identity),
        ).to(dtype)

    def to(self, dtype: torch.dtype) -> Weights:
        """The same in `dtype`, or in float32 at least where the attributes say so; differentiably."""
        wide = _wide(dtype)
        return replace(
            self,
            norm_weight=self.norm_weight.to(wide),
            norm_bias=self.norm_bias.to(wide),
            project_in=self.project_in.to(dtype),
            depthwise=self.depthwise.to(dtype),
            project_out=self.project_out.to(dtype),
            temperature=self.temperature.to(wide),
            step=None if self.step is None else self.step.to(wide),
            mask=None if self.mask is None else self.mask.to(wide),
        )


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type of sums over pixels and of the c×c maps: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def whole(x: Tensor, residual: Tensor, weights: Weights, ranked_by: Tensor | None = None) -> Tensor:
    """Y of whole tensors.

    Args:
        x: X in the type of the weights, (N, H, W, C).
        residual: X itself.
        weights: the block's.
        ranked_by: scores that decide what T_k keeps, by default its own; see `dtsas.sparse_map`.

    Returns:
        (N, H, W, C), of the wider type of x and residual.
    """
    return gated(projected(x, weights), residual, weights, ranked_by)[0]


def whole_with_scores(x: Tensor, residual: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """`whole` and the scores A of its map, (N, heads, c, c)."""
    return gated(projected(x, weights), residual, weights)


def recomputing(x: Tensor, residual: Tensor, weights: Weights, everything: bool) -> Tensor:
    """`whole`, keeping only X and W_p LN(X) for the backward pass; only X if `everything` is recomputed.

    Otherwise LN, the depthwise convolution, the filter, the c×c map and its product with V are recomputed:
    about as much work as the pointwise products, which are not, for a fifth of the memory.
    """
    run = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if everything:
        return run(whole, x, residual, weights)
    return run(gated, run(projected, x, weights), residual, weights)[0]


Form = Callable[[Tensor, Tensor, Weights], Tensor]
"""An implementation of the block with the signature of `whole`."""


def projected(x: Tensor, weights: Weights) -> Tensor:
    """W_p LN(x), (N, H, W, 4C)."""
    return F.linear(normalised(x, weights), weights.project_in)


def project(x: Tensor, weights: Weights, project_in: Tensor, P: Tensor) -> None:
    """Write W_p LN(x) into `P`; both of (N, rows, W, channels), each image contiguous."""
    channels = x.shape[-1]
    for normal, out in zip(normalised(x, weights), P, strict=True):
        torch.mm(normal.view(-1, channels), project_in.t(), out=out.view(-1, out.shape[-1]))


def normalised(x: Tensor, weights: Weights) -> Tensor:
    """LN(x) over the channels, the last dimension."""
    weight, bias = weights.norm_weight, weights.norm_bias
    if torch.is_grad_enabled() and x.device.type == 'cpu':
        # In bfloat16 a CPU's kernel would sum the gradients of weight and bias in bfloat16 (torch 2.13).
        return F.layer_norm(x.to(weight.dtype), x.shape[-1:], weight, bias, LN_EPSILON).to(x.dtype)
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), LN_EPSILON)


def gated(
    P: Tensor, residual: Tensor, weights: Weights, ranked_by: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """X + W_p' ( gate(U) ⊙ DTSAS(Q, K) V ) with Q, K, V, U = W_d P, and the scores A."""
    channels = P.shape[-1] // 4
    QK, VU = depthwise(P, weights.depthwise, padding=1).split(2 * channels, dim=-1)
    A = dtsas.scores(*gram(QK, weights.heads), weights.temperature)
    attention = dtsas.sparse_map(A, weights.step, weights.top_k, weights.score, ranked_by)
    product = gated_product(VU, attention.to(P.dtype), weights)
    return residual + F.linear(product, weights.project_out), A


def depthwise(P: Tensor, kernels: Tensor, padding: int | tuple[int, int]) -> Tensor:
    """W_d P of (N, H, W, channels)."""
    P = P.permute(0, 3, 1, 2)
    return F.conv2d(P, kernels, padding=padding, groups=P.shape[1]).permute(0, 2, 3, 1)


def gram(QK: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Q Kᵀ of each head and the rows' sums of squares, in float32 at least.

    Args:
        QK: Q and K, (N, H, W, 2C).
        heads: heads of c = C / heads channels.

    Returns:
        (N, heads, c, c), (N, heads, c) and (N, heads, c).
    """
    n, h, w, _ = QK.shape
    wide = _wide(QK.dtype)
    if QK.dtype == torch.float16:
        QK = QK.to(wide)  # the sums over an image's pixels leave float16's range
    QK = QK.reshape(n, h * w, 2, heads, -1)
    Q, K = QK.unbind(2)
    squares = _sums(QK.square().flatten(2)).to(wide).unflatten(1, (2, heads, -1))
    if QK.device.type == 'cpu' and QK.dtype == torch.bfloat16:
        # Here oneDNN's product of two matrices is twice as fast as its product of two stacks of one.
        pairs = zip(Q.unbind(), K.unbind(), strict=True)
        product = torch.stack([torch.stack([q[:, i].t() @ k[:, i] for i in range(heads)]) for q, k in pairs])
    else:
        product = Q.permute(0, 2, 3, 1) @ K.permute(0, 2, 1, 3)
    return product.to(wide), squares[:, 0], squares[:, 1]


def _sums(x: Tensor) -> Tensor:
    """Sums of (N, pixels, channels) over the pixels, as a product with ones: that accumulates in float32."""
    return (x.new_ones(x.shape[0], 1, x.shape[1]) @ x).squeeze(1)


def gated_product(VU: Tensor, attention: Tensor, weights: Weights) -> Tensor:
    """gate(U) ⊙ DTSAS(Q, K) V from V and U, (N, H, W, 2C) to (N, H, W, C)."""
    n, h, w, _ = VU.shape
    V, U = VU.chunk(2, dim=-1)
    heads = (n, h * w, weights.heads, -1)
    product = _attended(V, attention)
    return (gate(U, weights).reshape(heads) * product).reshape(n, h, w, -1)


def _attended(V: Tensor, attention: Tensor) -> Tensor:
    """DTSAS(Q, K) V from V, (N, H, W, C), and the maps, (N, heads, c, c), to (N, H·W, heads, c)."""
    heads = attention.shape[1]
    product = V.reshape(V.shape[0], -1, heads, V.shape[-1] // heads).transpose(1, 2)
    return (product @ attention.transpose(2, 3)).transpose(1, 2)


def gate(U: Tensor, weights: Weights) -> Tensor:
    """DFGB(U), or the gate that replaces it in the ablation; (N, H, W, C) to the same."""
    if weights.mask is not None:
        U = dfgb.filtered(U, weights.mask)
    return F.gelu(U) if weights.gelu else U


def upsample(x: Tensor, weight: Tensor, skip: Tensor | None) -> Tensor:
    """PixelShuffle of a 1×1 convolution, plus a skip connection.

    Args:
        x: (N, H, W, C').
        weight: of the convolution, (4C, C', 1, 1).
        skip: (N, 2H, 2W, C), or None.

    Returns:
        (N, 2H, 2W, C).
    """
    y = F.pixel_shuffle(F.conv2d(x.permute(0, 3, 1, 2), weight), 2).permute(0, 2, 3, 1)
    return y if skip is None else y + skip


def strip_rows(x: Tensor) -> int:
    """Rows of a strip, a multiple of DFGB's 8, for x of shape (N, H, W, C)."""
    budget = STRIP_BYTES.get(x.device.type, ACCELERATOR_STRIP_BYTES)
    row = 2 * x[0, 0].numel() * x.element_size()
    return max(dfgb.BLOCK, budget // row // dfgb.BLOCK * dfgb.BLOCK)


def in_strips(x: Tensor, residual: Tensor, weights: Weights) -> Tensor:
    """`whole` without gradients, one image and one strip of rows at a time."""
    rows = strip_rows(x)
    channels = x.shape[-1]
    for_qk, for_vu = weights.project_in.split(2 * channels)
    dw_qk, dw_vu = weights.depthwise.split(2 * channels)
    y = torch.empty_like(residual)
    for image, kept, restored in zip(x.split(1), residual.split(1), y.split(1), strict=True):
        sums: tuple[Tensor, ...] = ()
        for _, P in strips(image, weights, for_qk, rows):
            strip = gram(depthwise(P, dw_qk, padding=(0, 1)), weights.heads)
            sums = tuple(map(torch.add, sums, strip)) if sums else strip
        A = dtsas.scores(sums[0], sums[1], sums[2], weights.temperature)
        attention = dtsas.sparse_map(A, weights.step, weights.top_k, weights.score).to(x.dtype)
        for part, P in strips(image, weights, for_vu, rows):
            VU = depthwise(P, dw_vu, padding=(0, 1))
            out = F.linear(gated_product(VU, attention, weights), weights.project_out)
            torch.add(kept[:, part], out, out=restored[:, part])
    return y


Span = tuple[int, int]
"""Start and end along one axis."""


@dataclass(frozen=True)
class Cells:
    """Parts of one axis between any two neighbouring edges of windows; a window is a sequence of cells.

    Attributes:
        windows: the windows.
        spans: the cells, in order.
    """

    windows: tuple[Span, ...]
    spans: tuple[Span, ...]

    @classmethod
    def of(cls, windows: Sequence[Span]) -> Cells:
        """The cells of windows that cover an axis from 0 on."""
        edges = sorted({edge for window in windows for edge in window})
        return cls(tuple(windows), tuple(pairwise(edges)))

    def sums(self, like: Tensor) -> Tensor:
        """The matrix (windows, cells) from sums over cells to sums over windows."""
        # Filled where it lies: a copy from the host could not be recorded as a CUDA graph.
        matrix = like.new_zeros(len(self.windows), len(self.spans))
        for row, (start, end) in zip(matrix, self.windows, strict=True):
            covered = [number for number, span in enumerate(self.spans) if start <= span[0] < end]
            row[covered[0] : covered[-1] + 1] = 1
        return matrix

    def means(self, like: Tensor) -> Tensor:
        """The matrix (cells, windows) from windows to the mean of the windows that cover a cell."""
        covering = self.sums(like).t()
        return covering / covering.sum(1, keepdim=True)


@dataclass(frozen=True)
class Grid:
    """The windows of a map.

    Attributes:
        rows, columns: start and end of the windows along both axes; they cover the map.
        exchange: takes the number of an image in its batch and the maps of its windows, (rows, columns,
            heads, c, c); returns those to be used.
    """

    rows: Sequence[Span]
    columns: Sequence[Span]
    exchange: Callable[[int, Tensor], Tensor]


def in_windows(x: Tensor, residual: Tensor, weights: Weights, windows: Grid) -> Tensor:
    """`in_strips` with the map of DTSAS from each of a grid of windows, averaged where windows overlap.

    Each pixel is projected once however many windows cover it: Q Kᵀ of a window is the sum over its cells,
    and the mean of A V over windows is the mean of A times V.

    Args:
        x, residual, weights: as for `whole`.
        windows: the grid of windows.

    Returns:
        (N, H, W, C).
    """
    vertical, horizontal = Cells.of(windows.rows), Cells.of(windows.columns)
    height = strip_rows(x)
    channels = x.shape[-1]
    for_qk, for_vu = weights.project_in.split(2 * channels)
    dw_qk, dw_vu = weights.depthwise.split(2 * channels)
    wide = _wide(x.dtype)
    c = channels // weights.heads
    y = torch.empty_like(residual)
    images = zip(x.split(1), residual.split(1), y.split(1), strict=True)
    for number, (image, kept, restored) in enumerate(images):
        # Q Kᵀ and both sums of squares of each cell, side by side.
        sums = x.new_zeros(len(vertical.spans), len(horizontal.spans), weights.heads, c, c + 2, dtype=wide)
        for part, P in strips(image, weights, for_qk, height):
            # In float32: in bfloat16 the result would depend on how strips and tiles cut a window.
            QK = depthwise(P, dw_qk, padding=(0, 1)).to(wide)
            for i, j, area in _within(part, vertical, horizontal):
                product, q_squares, k_squares = gram(QK[area], weights.heads)
                sums[i, j, ..., :c] += product[0]
                sums[i, j, ..., c] += q_squares[0]
                sums[i, j, ..., c + 1] += k_squares[0]
        grid = vertical.sums(sums), horizontal.sums(sums)
        of_windows = torch.einsum('ai,bj,ijhkl->abhkl', *grid, sums).flatten(0, 1)
        product, q_squares, k_squares = of_windows.split([c, 1, 1], dim=-1)
        A = dtsas.scores(product, q_squares[..., 0], k_squares[..., 0], weights.temperature)
        of_windows = dtsas.sparse_map(A, weights.step, weights.top_k, weights.score)
        grid = vertical.means(sums), horizontal.means(sums)
        maps = windows.exchange(number, of_windows.unflatten(0, (len(windows.rows), len(windows.columns))))
        maps = torch.einsum('ia,jb,abhkl->ijhkl', *grid, maps).to(x.dtype)
        for part, P in strips(image, weights, for_vu, height):
            V, U = depthwise(P, dw_vu, padding=(0, 1)).chunk(2, dim=-1)
            product = torch.empty_like(V)
            for i, j, area in _within(part, vertical, horizontal):
                product[area] = _attended(V[area], maps[i, j][None]).reshape(V[area].shape)
            out = F.linear(gate(U, weights).mul_(product), weights.project_out)
            torch.add(kept[:, part], out, out=restored[:, part])
    return y


def _within(
    part: slice, vertical: Cells, horizontal: Cells
) -> Iterator[tuple[int, int, tuple[slice, slice, slice]]]:
    """The cells that a strip crosses: their row, their column and what they share with it, within it."""
    for i, (top, bottom) in enumerate(vertical.spans):
        first, last = max(top, part.start) - part.start, min(bottom, part.stop) - part.start
        if first < last:
            for j, (left, right) in enumerate(horizontal.spans):
                yield i, j, (slice(None), slice(first, last), slice(left, right))


def strips(
    x: Tensor,
    weights: Weights,
    project_in: Tensor,
    rows: int,
    project: Callable[[Tensor, Weights, Tensor, Tensor], None] = project,
) -> Iterator[tuple[slice, Tensor]]:
    """W_p LN(x) of some of the channels, strip by strip, in a buffer that all strips share.

    The depthwise convolution of a strip needs one row of W_p LN(x) above and one
    below, zeros at the border.  The two rows that consecutive strips share are copied,
    not computed twice.

    Args:
        x: (N, H, W, C).
        weights: the block's, for LN.
        project_in: rows of W_p.
        rows: of a strip.
        project: computes W_p LN(x) of some rows.

    Yields:
        The rows of the image, and W_p LN(x) of these and of one more row on either side, (N, rows + 2, W,
        outputs of `project_in`).
    """
    n, height, width, _ = x.shape
    rows = min(rows, height)
    buffer = x.new_empty(n, rows + 2, width, project_in.shape[0])
    done = 0
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        if top:
            buffer[:, :2] = buffer[:, rows:].clone()
        else:
            buffer[:, 0] = 0
        ahead = min(bottom + 1, height)
        project(x[:, done:ahead], weights, project_in, buffer[:, done - top + 1 : ahead - top + 1])
        if ahead == bottom:
            buffer[:, bottom - top + 1] = 0
        done = ahead
        yield slice(top, bottom), buffer[:, : bottom - top + 2]
