"""DSGformer: Deep Sparse Gated Transformer for Image Deblurring (Lu J., 2025).

Section 2 of the paper, symbol by symbol.  With B the blurred image and C the
width (48 in the paper's network of 15.57 M parameters):

    H  = head(B)                    H×W×C
    E1 = encoder 1 (H)              H/2×W/2×2C
    E2 = encoder 2 (E1)             H/4×W/4×4C
    E3 = encoder 3 (E2)             H/8×W/8×8C
    E4 = encoder 4 (E3)             H/8×W/8×8C
    D  = decoder(E1, E2, E3, E4)    H×W×2C
    Ŝ  = tail(D) + B                H×W×3

There is one kind of block, DSGA, and no feed-forward network:

    Q, K, V, U = W_d W_p LN(X)
    Y = X + W_p' ( DFGB(U) ⊙ DTSAS(Q, K) V )

With `patch` = p > 1 the network works on p×p patches of pixels: pixel-unshuffle
before the head and pixel-shuffle after the tail, so that H, E1, …, D have 1/p of
the sizes above.  This is an addition of this project; p = 1 is the paper's network.

The modules here hold the parameters and are the reference implementation: they compute the formulas as the
paper writes them.  By default a faster implementation of the same formulas runs (`dsgformer_arch.ops`);
`DSGFORMER_PLAIN=1` selects the reference implementation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

from dsgformer_arch import ops
from dsgformer_arch.archs.layers.network import RestorationNetwork
from dsgformer_arch.archs.layers.norms import norm_of_channels
from dsgformer_arch.archs.layers.top_k import TOP_K_RATIOS
from dsgformer_arch.archs.tlc import Windowed, window_method

Score = Literal['relu2', 'relu', 'softmax']
Attention = Literal['dtsas', 'mdta']
Gate = Literal['dfgb', 'gelu', 'simplegate']
AlphaInit = Literal['one', 'sqrt']
WeightsInit = Literal['mean', 'width']
OutputInit = Literal['random', 'zero']
Ratio = str | float | Fraction
"""k_n over the head's width: `'1/2'`, 0.5 or Fraction(1, 2)."""

BLOCK = 8
"""Side of DFGB's blocks, JPEG's."""


class LayerNorm(nn.Module):
    """LN over the channels of each pixel, with weight and bias.  (N, C, H, W) to the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return norm_of_channels(x, x.shape[1], self.weight, self.bias)


class DTSAS(nn.Module):
    """Sparse channel attention: DTSAS(Q, K) V, with

        DTSAS(Q, K) = Σ_{n=1..N} W_n · φ( T_{k_n}( Q Kᵀ / α ) )

    Q, K and V are split into `heads` groups of c = C / heads channels, so that
    the map Q Kᵀ of a head is c×c.  The rows of Q and K are L2-normalised over
    the pixels.  T_k keeps, in each row, the scores that are at least the row's
    k-th largest; ties are all kept.  α, one per head, and W_n are learnt.

    Args:
        channels: C.
        heads: number of heads; divides C.
        attention: `'dtsas'`, or `'mdta'` for the dense map of Restormer (no T_k, no W_n).
        score: φ. `'relu2'` is the paper's ReLU(·)²; `'softmax'` runs over the kept entries only,
            as in DRSformer.
        ratios: k_n / c, in increasing order; k_n is rounded down and at least 1.
        alpha_init: initial value of α: `'one'`, or `'sqrt'` for √c, the scale of scaled dot products.
        weights_init: initial value of each W_n: `'mean'` for 1/N, or `'width'` for 1.5/c.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        attention: Attention = 'dtsas',
        score: Score = 'relu2',
        ratios: Sequence[Fraction] = TOP_K_RATIOS,
        alpha_init: AlphaInit = 'one',
        weights_init: WeightsInit = 'mean',
    ) -> None:
        super().__init__()
        self.heads = heads
        self.score = score
        width = channels // heads
        alpha = math.sqrt(width) if alpha_init == 'sqrt' else 1.0
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), alpha))
        self.top_k: tuple[int, ...] = ()
        if attention == 'dtsas':
            self.top_k = tuple(max(1, int(width * ratio)) for ratio in ratios)
            weight = 1.5 / width if weights_init == 'width' else 1 / len(ratios)
            self.weights = nn.Parameter(torch.full((len(ratios),), weight))

    def attend(self, A: Tensor) -> Tensor:
        """The sparse map Σ W_n φ(T_{k_n}(A)) of the scores A = Q Kᵀ / α; (N, heads, c, c)."""
        if not self.top_k:
            return self.phi(A, torch.ones_like(A, dtype=torch.bool))
        total = torch.zeros_like(A)
        for W_n, k_n in zip(self.weights, self.top_k, strict=True):
            tau = A.topk(k_n, dim=-1).values[..., -1:]
            total = total + W_n * self.phi(A, tau <= A)
        return total

    def phi(self, A: Tensor, kept: Tensor) -> Tensor:
        """φ of the scores A where `kept`, 0 elsewhere."""
        if self.score == 'softmax':
            return A.masked_fill(~kept, float('-inf')).softmax(dim=-1)
        positive = A.masked_fill(~kept, 0).relu()
        return positive.square() if self.score == 'relu2' else positive

    def forward(self, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
        """Q, K, V of shape (N, C, H, W); returns DTSAS(Q, K) V of the same shape."""
        shape = V.shape
        Q, K, V = (
            x.reshape(shape[0], self.heads, shape[1] // self.heads, shape[2] * shape[3]) for x in (Q, K, V)
        )
        Q, K = F.normalize(Q, dim=-1), F.normalize(K, dim=-1)
        A = Q @ K.transpose(-2, -1) / self.temperature
        return (self.attend(A) @ V).reshape(shape)


class DFGB(nn.Module):
    """Gate in the frequency domain: U_out = GELU( P⁻¹( F⁻¹( M ⊙ F( P(U) ) ) ) ).

    P splits U into 8×8 blocks that do not overlap, F is the real FFT of a block
    and M a learnt real matrix of shape (C, 8, 5), one per channel.  M starts at
    1, so that DFGB starts as GELU.  A height or width that is not a multiple of 8
    is padded by repeating the border, and cropped again.  (N, C, H, W) to the same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.ones(channels, BLOCK, BLOCK // 2 + 1))

    def forward(self, U: Tensor) -> Tensor:
        n, c, h, w = U.shape
        x = F.pad(U, (0, -w % BLOCK, 0, -h % BLOCK), mode='replicate')
        blocks = x.reshape(n, c, x.shape[2] // BLOCK, BLOCK, x.shape[3] // BLOCK, BLOCK).transpose(3, 4)
        # No FFT runs in half precision on every device: the reference takes float32.
        spectrum = torch.fft.rfft2(blocks if blocks.dtype == torch.float64 else blocks.float())
        spectrum = self.mask[:, None, None] * spectrum
        blocks = torch.fft.irfft2(spectrum, s=(BLOCK, BLOCK)).to(U.dtype)
        return F.gelu(blocks.transpose(3, 4).reshape(x.shape)[..., :h, :w])


class DSGA(nn.Module):
    """The block: Y = X + W_p' ( gate(U) ⊙ DTSAS(Q, K) V ), with Q, K, V, U = W_d W_p LN(X).

    W_p is a 1×1 convolution to 4C, W_d a depthwise 3×3 over 4C, W_p' 1×1; none
    has a bias.  (N, C, H, W) to the same.

    Args:
        channels: C.
        heads: heads of the attention; divides C.
        attention: `'dtsas'` or `'mdta'`, see `DTSAS`.
        score: `'relu2'`, `'relu'` or `'softmax'`, see `DTSAS`.
        gate: `'dfgb'`; `'gelu'`, which is DFGB without its filter; `'simplegate'`, U itself (NAFNet).
        recompute: keep only X for the backward pass.
        ratios, alpha_init, weights_init: see `DTSAS`.
        output_init: `'random'`, PyTorch's for convolutions, or `'zero'` for W_p' = 0: the block starts as
            Y = X.
    """

    kinds: ClassVar[Mapping[str, type[nn.Module]]] = {
        'norm': LayerNorm,
        'project_in': nn.Conv2d,
        'depthwise': nn.Conv2d,
        'attention': DTSAS,
        'project_out': nn.Conv2d,
    }
    """Classes of the children except the gate.  With other classes the modules are called one by one."""

    def __init__(
        self,
        channels: int,
        heads: int,
        attention: Attention = 'dtsas',
        score: Score = 'relu2',
        gate: Gate = 'dfgb',
        recompute: bool = False,
        ratios: Sequence[Fraction] = TOP_K_RATIOS,
        alpha_init: AlphaInit = 'one',
        weights_init: WeightsInit = 'mean',
        output_init: OutputInit = 'random',
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.gate_kind: type[nn.Module] = {'dfgb': DFGB, 'gelu': nn.GELU, 'simplegate': nn.Identity}[gate]
        self.norm = LayerNorm(channels)
        self.project_in = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.depthwise = nn.Conv2d(4 * channels, 4 * channels, 3, padding=1, groups=4 * channels, bias=False)
        self.attention = DTSAS(channels, heads, attention, score, ratios, alpha_init, weights_init)
        self.gate: nn.Module = {'dfgb': DFGB(channels), 'gelu': nn.GELU(), 'simplegate': nn.Identity()}[gate]
        self.project_out = nn.Conv2d(channels, channels, 1, bias=False)
        if output_init == 'zero':
            nn.init.zeros_(self.project_out.weight)

    def forward(self, X: Tensor) -> Tensor:
        return ops.block.forward(self, X)

    def in_windows(self, X: Tensor) -> Tensor:
        """The block with local pooling: its attention is a `Windowed`."""
        return ops.block.forward_in_windows(self, X, cast(Windowed, self.attention.forward).grid)

    def reference(self, X: Tensor) -> Tensor:
        """The block as the paper writes it; every other implementation must equal this one."""
        Q, K, V, U = self.depthwise(self.project_in(self.norm(X))).chunk(4, dim=1)
        return X + self.project_out(self.gate(U) * self.attention(Q, K, V))


class Features(NamedTuple):
    """The outputs of the four encoders, each (N, channels, height, width)."""

    E1: Tensor
    E2: Tensor
    E3: Tensor
    E4: Tensor


@ARCH_REGISTRY.register()
class DSGformer(RestorationNetwork):
    """The network of the paper: an RGB image in [0, 1] to the restored image of the same size.

    An image whose sides are no multiples of 8·`patch` is padded by reflection
    and the result cropped; the result is not clipped.

    Args:
        width: C, channels of the first level.
        num_blocks: DSGA blocks of encoders 1–4; the decoder has the first three in reverse.
        heads: heads of encoders 1–4; the decoder has those of the levels that it mirrors.
        attention: `'dtsas'` (paper) or `'mdta'`.
        score: `'relu2'` (paper), `'relu'` or `'softmax'`.
        gate: `'dfgb'` (paper), `'gelu'` or `'simplegate'`.  These three are the ablation of table 2.
        recompute: recompute each block in the backward pass instead of keeping its activations: less
            memory in training for more time.
        patch: side p of the patches of pixels that the head takes; 1 is the paper's network.
        ratios: k_n over a head's width, increasing, each in (0, 1]: fractions such as `'1/2'`, or numbers.
        alpha_init, weights_init, output_init: where α, W_n and W_p' start, see `DTSAS` and `DSGA`.  With
            `output_init='zero'` the tail starts at 0 as well, so that the network starts as Ŝ = B.

    Attributes:
        settings: the keyword arguments that rebuild this network, of JSON's types (tuples aside).  `score`,
            `gate` and `ratios` leave no trace in the shapes of a state dict.

    Raises:
        ValueError: for a switch that is none of the above, or heads that do not divide the widths.
    """

    pad_multiple = BLOCK
    min_size = BLOCK
    channels_last = True
    sees_whole_image = True
    shares_windows = True
    width_settings = ('width',)
    depth_settings = ('num_blocks',)

    def __init__(
        self,
        width: int = 48,
        num_blocks: Sequence[int] = (2, 6, 12, 12),
        heads: Sequence[int] = (1, 2, 4, 8),
        attention: Attention = 'dtsas',
        score: Score = 'relu2',
        gate: Gate = 'dfgb',
        recompute: bool = False,
        patch: int = 1,
        ratios: Sequence[Ratio] = TOP_K_RATIOS,
        alpha_init: AlphaInit = 'one',
        weights_init: WeightsInit = 'mean',
        output_init: OutputInit = 'random',
    ) -> None:
        super().__init__()
        _check_switches(width, num_blocks, heads, attention, score, gate)
        _check_initialisation(alpha_init, weights_init, output_init)
        if isinstance(patch, bool) or not isinstance(patch, int) or patch < 1:
            raise ValueError(f'DSGformer: patch is {patch!r}; give a whole number from 1 up')
        k = _fractions(ratios)
        self.settings: dict[str, Any] = {
            'width': width,
            'num_blocks': tuple(num_blocks),
            'heads': tuple(heads),
            'attention': attention,
            'score': score,
            'gate': gate,
            'patch': patch,
            'ratios': tuple(map(str, k)),
        }
        self.patch = patch
        self.pad_multiple = self.min_size = BLOCK * patch
        self.bytes_per_pixel = 130 * width / patch**2  # as counted, for these blocks in their reference form
        self.tile_multiple = 8 * BLOCK * patch  # DFGB cuts the maps of the last level into blocks, too
        self.tile_context = 2 * self.tile_multiple  # two such blocks, as measured (docs/restoring.md)
        C, n = width, num_blocks
        block_settings = (attention, score, gate, recompute, k, alpha_init, weights_init, output_init)

        def blocks(level: int, channels: int, count: int) -> nn.Sequential:
            return nn.Sequential(*(DSGA(channels, heads[level], *block_settings) for _ in range(count)))

        self.head = nn.Conv2d(3 * patch * patch, C, 3, padding=1)
        self.encoder = nn.ModuleList([blocks(i, C << i, n[i]) for i in range(4)])
        self.down = nn.ModuleList([nn.Conv2d(C << i, C << i + 1, 2, stride=2) for i in range(3)])
        self.up = nn.ModuleList([_up(8 * C, 4 * C), _up(4 * C, 2 * C), _up(2 * C, 2 * C)])
        self.decoder = nn.ModuleList([blocks(2, 4 * C, n[2]), blocks(1, 2 * C, n[1]), blocks(0, 2 * C, n[0])])
        self.tail = nn.Conv2d(2 * C, 3 * patch * patch, 3, padding=1)
        if output_init == 'zero':
            nn.init.zeros_(self.tail.weight)
            nn.init.zeros_(cast(Tensor, self.tail.bias))

    def forward_padded(self, B: Tensor) -> Tensor:
        """B, (N, 3, H, W) with H and W multiples of 8·`patch`, to Ŝ of the same shape."""
        x = F.pixel_unshuffle(B, self.patch)
        if ops.fast(x):
            x = x.contiguous(memory_format=torch.channels_last)
        D = self.decode(self.encode(x))
        S = F.pixel_shuffle(ops.resampling.tail(self.tail, D, x), self.patch)
        if not torch.compiler.is_compiling():
            ops.memory.pool.trim()
        return S

    def encode(self, B: Tensor) -> Features:
        """E1–E4 of a pixel-unshuffled image; its height and width must be multiples of 8."""
        x = ops.resampling.head(self.head, B)  # H
        levels = []
        for i, blocks in enumerate(cast(Iterable[nn.Sequential], self.encoder)):
            # Not blocks(x), which would keep the input of the level in memory until its end.
            for block in blocks:
                x = block(x)
            if i < len(self.down):
                x = ops.resampling.down(cast(nn.Conv2d, self.down[i]), x)
            levels.append(x)
        return Features(*levels)

    def decode(self, features: Features) -> Tensor:
        """D, of shape (N, 2C, height, width)."""
        E1, E2, E3, E4 = features
        x = E4 + E3
        decoder = cast(Iterable[nn.Sequential], self.decoder)
        for up, blocks, skip in zip(self.up, decoder, (E2, E1, None), strict=True):
            x = ops.resampling.up(cast(nn.Sequential, up), x, skip)
            for block in blocks:
                x = block(x)
        return x

    def lean_memory(self, itemsize: int) -> float:
        # Three maps of the decoder's 2C channels, the skip connections; and six images in float32.
        maps = 7 * self.settings['width'] * itemsize / self.patch**2
        return 0.0 if ops.path() == 'plain' else maps + 6 * 3 * 4

    def windowed_attentions(self) -> Iterator[tuple[str, Windowed]]:
        for name, block in self.named_modules():
            if isinstance(block, DSGA):
                local = window_method(block.attention, 'forward')
                block.forward = block.in_windows  # type: ignore[method-assign]
                yield name, local

    @classmethod
    def recognises(cls, state: Mapping[str, Any]) -> bool:
        """Whether `state` is a state dict of this network."""
        return {'head.weight', 'encoder.0.0.attention.temperature', 'up.2.0.weight', 'tail.weight'} <= set(
            state
        )

    @classmethod
    def settings_from_state(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """The keyword arguments of a network, read from the shapes of its state dict.

        `score` and `ratios` leave no trace in the shapes (nor does `gelu`
        against `simplegate`): the paper's score and the default k_n are assumed.
        What is known of them travels in the attribute `settings` of a network.
        """
        counts = [0] * 4
        heads = [1] * 4
        for key, tensor in state.items():
            part, level, block, *rest = [*key.split('.'), '', '', '']
            if part == 'encoder':
                counts[int(level)] = max(counts[int(level)], int(block) + 1)
                if rest[:2] == ['attention', 'temperature']:
                    heads[int(level)] = tensor.shape[0]
        return {
            'width': state['head.weight'].shape[0],
            'num_blocks': tuple(counts),
            'heads': tuple(heads),
            'attention': 'dtsas' if 'encoder.0.0.attention.weights' in state else 'mdta',
            'gate': 'dfgb' if 'encoder.0.0.gate.mask' in state else 'gelu',
            'patch': max(1, math.isqrt(state['head.weight'].shape[1] // 3)),
        }


def dsgformer(**overrides: Any) -> DSGformer:
    """The paper's network: 15.57 M parameters, 55.5 G MACs at 256×256."""
    return DSGformer(**{'width': 48, 'num_blocks': (2, 6, 12, 12), **overrides})


def dsgformer_s(**overrides: Any) -> DSGformer:
    """Small: 2.38 M parameters, 175 G MACs at 1920×1200."""
    return DSGformer(**{'width': 16, 'num_blocks': (1, 2, 8, 20), **overrides})


def dsgformer_t(**overrides: Any) -> DSGformer:
    """Tiny: 0.70 M parameters, 2.7 G MACs at 256×256; trains on a CPU."""
    return DSGformer(**{'width': 16, 'num_blocks': (1, 2, 4, 4), **overrides})


def dsgformer_h(**overrides: Any) -> DSGformer:
    """Half resolution: 0.89 M parameters, 0.8 G MACs at 256×256; the package ships its weights."""
    return DSGformer(
        **{
            'width': 16,
            'num_blocks': (1, 2, 4, 6),
            'patch': 2,
            'ratios': ('1/8', '1/4', '1/3', '1/2'),
            'output_init': 'zero',
            **overrides,
        }
    )


def _up(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels_in, 4 * channels_out, 1, bias=False), nn.PixelShuffle(2))


def _check_switches(
    width: int, num_blocks: Sequence[int], heads: Sequence[int], attention: str, score: str, gate: str
) -> None:
    choices = {
        'attention': (attention, ('dtsas', 'mdta')),
        'score': (score, ('relu2', 'relu', 'softmax')),
        'gate': (gate, ('dfgb', 'gelu', 'simplegate')),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f'DSGformer: {name} is {value!r}; choose one of {", ".join(allowed)}')
    if len(num_blocks) != 4 or len(heads) != 4:
        raise ValueError('DSGformer: num_blocks and heads take four numbers, one for each encoder')
    for level, count in enumerate(heads):
        if (width << level) % count:
            raise ValueError(
                f'DSGformer: {count} heads do not divide the {width << level} channels of level {level + 1}'
            )


def _check_initialisation(alpha_init: str, weights_init: str, output_init: str) -> None:
    choices = {
        'alpha_init': (alpha_init, ('one', 'sqrt')),
        'weights_init': (weights_init, ('mean', 'width')),
        'output_init': (output_init, ('random', 'zero')),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f'DSGformer: {name} is {value!r}; choose one of {", ".join(allowed)}')


def _fractions(ratios: Sequence[Ratio]) -> tuple[Fraction, ...]:
    """`ratios` as fractions; a number such as 0.6667 becomes the nearest one with a small denominator."""
    if isinstance(ratios, str) or not isinstance(ratios, Sequence) or not ratios:
        raise ValueError(f"DSGformer: ratios is {ratios!r}; give a list such as ['1/2', '2/3']")
    try:
        found = [Fraction(ratio).limit_denominator(100) for ratio in ratios]
    except (ValueError, TypeError, ZeroDivisionError, OverflowError):
        raise ValueError(f"DSGformer: ratios is {list(ratios)!r}; give fractions such as '1/2'") from None
    if not all(0 < k <= 1 for k in found) or any(a >= b for a, b in pairwise(found)):
        raise ValueError(f'DSGformer: ratios is {list(ratios)!r}; give increasing fractions from 0 to 1')
    return tuple(found)
