"""DSGformer against float64 loops over the paper's formulas."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor

from dsgformer_arch import ops
from dsgformer_arch.archs.dsgformer_arch import (
    DFGB,
    DSGA,
    DTSAS,
    TOP_K_RATIOS,
    DSGformer,
    LayerNorm,
    dsgformer,
    dsgformer_h,
    dsgformer_s,
    dsgformer_t,
)


def random_parameters(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter away from its special initial value, in float64."""
    generator = torch.Generator().manual_seed(seed)
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            scale = 1 / math.sqrt(max(1, parameter[0].numel())) if parameter.ndim == 4 else 0.2
            parameter.mul_(parameter.ndim != 4).add_(scale * noise)
    return module


def image(*shape: int, seed: int = 1) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape))


def phi(score: str, values: list[float]) -> list[float]:
    """φ of the kept scores of a row; `None` marks one that T_k set to 0."""
    if score == 'softmax':
        kept = [math.exp(a) for a in values if a is not None]
        return [0.0 if a is None else math.exp(a) / sum(kept) for a in values]
    power = {'relu': 1, 'relu2': 2}[score]
    return [0.0 if a is None else max(a, 0.0) ** power for a in values]


def sparse_map(A: np.ndarray, ks: list[int], weights: list[float], score: str) -> np.ndarray:
    """Σ W_n φ(T_{k_n}(A)), row by row, as the paper writes it."""
    total = np.zeros_like(A)
    for W_n, k in zip(weights, ks, strict=True):
        for i, row in enumerate(A):
            kth_largest = sorted(row, reverse=True)[k - 1]
            kept = [a if a >= kth_largest else None for a in row]
            total[i] += W_n * np.array(phi(score, kept))
    return total


@pytest.mark.parametrize('score', ['relu2', 'relu', 'softmax'])
@pytest.mark.parametrize('attention', ['dtsas', 'mdta'])
def test_dtsas_equals_the_formula(attention: str, score: str) -> None:
    module = random_parameters(DTSAS(12, 2, attention, score))
    Q, K, V = (image(2, 12, 5, 7, seed=s) for s in range(3))
    result = module(Q, K, V).detach().numpy()
    c, alpha = 6, module.temperature.detach().numpy().ravel()
    weights = module.weights.tolist() if attention == 'dtsas' else [1.0]
    ks = [int(c * ratio) for ratio in TOP_K_RATIOS] if attention == 'dtsas' else [c]
    for n in range(2):
        for head in range(2):
            rows = slice(head * c, (head + 1) * c)
            q, k, v = (x[n, rows].reshape(c, -1).numpy() for x in (Q, K, V))
            A = np.zeros((c, c))
            for i in range(c):
                for j in range(c):
                    norms = math.sqrt(sum(q[i] ** 2)) * math.sqrt(sum(k[j] ** 2))
                    A[i, j] = sum(q[i] * k[j]) / norms / alpha[head]
            expected = sparse_map(A, ks, weights, score) @ v
            np.testing.assert_allclose(result[n, rows].reshape(c, -1), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize('score', ['relu2', 'relu', 'softmax'])
def test_ties_are_all_kept(score: str) -> None:
    """Scores equal to the k-th largest stay, however many there are."""
    module = random_parameters(DTSAS(8, 1, 'dtsas', score))
    A = torch.from_numpy(np.random.RandomState(3).randint(-2, 3, (2, 1, 8, 8)).astype(float))
    A[0, 0, 0] = 1.0
    result = module.attend(A)[:, 0].detach().numpy()
    ks = [4, 5, 6, 6]
    for n in range(2):
        expected = sparse_map(A[n, 0].numpy(), ks, module.weights.tolist(), score)
        np.testing.assert_allclose(result[n], expected, rtol=1e-12, atol=1e-14)


def test_top_k_starts_even_and_rounds_down() -> None:
    module = DTSAS(96, 2)
    assert module.top_k == (24, 32, 36, 38)
    assert module.weights.tolist() == [0.25] * 4
    assert module.temperature.shape == (2, 1, 1)


def filtered_block(block: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """F⁻¹(M ⊙ F(block)) of an 8×8 block by sums of exponentials; the inverse is the real one.

    The columns 0 and 4 of the half spectrum are their own mirror images: the
    inverse real transform takes their Hermitian part.
    """
    spectrum = np.zeros((8, 5), dtype=complex)
    for u in range(8):
        for v in range(5):
            for y in range(8):
                for x in range(8):
                    spectrum[u, v] += block[y, x] * np.exp(-2j * np.pi * (u * y + v * x) / 8)
    spectrum *= mask
    out = np.zeros((8, 8))
    for y in range(8):
        for x in range(8):
            for u in range(8):
                for v in range(5):
                    term = spectrum[u, v] * np.exp(2j * np.pi * (u * y + v * x) / 8)
                    out[y, x] += (1 if v in (0, 4) else 2) * term.real / 64
    return out


def gelu(x: float) -> float:
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


@pytest.mark.parametrize(('height', 'width'), [(8, 16), (9, 7), (3, 20)])
def test_dfgb_equals_the_formula(height: int, width: int) -> None:
    module = random_parameters(DFGB(2))
    U = image(2, 2, height, width)
    result = module(U).detach().numpy()
    mask = module.mask.detach().numpy()
    rows, columns = -(-height // 8) * 8, -(-width // 8) * 8
    for n in range(2):
        for c in range(2):
            padded = np.pad(U[n, c].numpy(), ((0, rows - height), (0, columns - width)), mode='edge')
            for top in range(0, rows, 8):
                for left in range(0, columns, 8):
                    block = filtered_block(padded[top : top + 8, left : left + 8], mask[c])
                    for y in range(min(8, height - top)):
                        for x in range(min(8, width - left)):
                            assert result[n, c, top + y, left + x] == pytest.approx(
                                gelu(block[y, x]), abs=1e-12
                            )


def test_dfgb_starts_as_gelu() -> None:
    U = image(1, 3, 13, 8)
    torch.testing.assert_close(DFGB(3).double()(U), torch.nn.functional.gelu(U), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize('gate', ['dfgb', 'gelu', 'simplegate'])
def test_dsga_equals_the_formula(gate: str) -> None:
    """Y = X + W_p' (gate(U) ⊙ DTSAS(Q, K) V), Q, K, V, U = W_d W_p LN(X), pixel by pixel."""
    C, height, width = 4, 9, 11
    block = random_parameters(DSGA(C, 2, gate=gate))
    X = image(2, C, height, width)
    x = X.numpy()
    mean, variance = x.mean(1, keepdims=True), x.var(1, keepdims=True)
    weight, bias = (p.detach().numpy()[:, None, None] for p in (block.norm.weight, block.norm.bias))
    normalised = (x - mean) / np.sqrt(variance + 1e-5) * weight + bias
    W_p = block.project_in.weight.detach().numpy()[:, :, 0, 0]
    W_d = block.depthwise.weight.detach().numpy()[:, 0]
    projected = np.pad(np.einsum('oc,nchw->nohw', W_p, normalised), ((0, 0), (0, 0), (1, 1), (1, 1)))
    mixed = np.zeros((2, 4 * C, height, width))
    for dy in range(3):
        for dx in range(3):
            mixed += W_d[:, dy, dx][:, None, None] * projected[:, :, dy : dy + height, dx : dx + width]
    Q, K, V, U = (torch.from_numpy(part) for part in np.split(mixed, 4, axis=1))
    gated = block.gate(U) * block.attention(Q, K, V)
    W_out = block.project_out.weight.detach().numpy()[:, :, 0, 0]
    expected = x + np.einsum('oc,nchw->nohw', W_out, gated.detach().numpy())
    np.testing.assert_allclose(block.reference(X).detach().numpy(), expected, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(block(X).detach().numpy(), expected, rtol=1e-11, atol=1e-12)


def test_layer_norm_is_over_channels() -> None:
    norm = LayerNorm(5).double()
    y = norm(image(2, 5, 3, 4))
    torch.testing.assert_close(y.mean(1), torch.zeros(2, 3, 4, dtype=y.dtype))


def test_parameter_counts() -> None:
    """15.57 M to ±0.005 M (the paper), and the presets of the design."""
    counts = [
        sum(p.numel() for p in build().parameters()) / 1e6 for build in (dsgformer, dsgformer_s, dsgformer_t)
    ]
    assert counts[0] == pytest.approx(15.57, abs=0.005)
    assert counts[1] == pytest.approx(2.38, abs=0.005)
    assert counts[2] == pytest.approx(0.70, abs=0.005)
    assert ARCH_REGISTRY.get('DSGformer') is DSGformer


def test_shapes_of_the_paper() -> None:
    """H H×W×C, E1 H/2×W/2×2C, E2 H/4×W/4×4C, E3 and E4 H/8×W/8×8C, D H×W×2C."""
    C, height, width = 4, 64, 32
    net = DSGformer(C, (1, 1, 1, 1)).eval()
    with torch.no_grad():
        image = torch.rand(1, 3, height, width)
        assert net.head(image).shape == (1, C, height, width)
        features = net.encode(image)
        D = net.decode(features)
    expected = {'E1': (2 * C, 2), 'E2': (4 * C, 4), 'E3': (8 * C, 8), 'E4': (8 * C, 8)}
    for name, (channels, scale) in expected.items():
        assert getattr(features, name).shape == (1, channels, height // scale, width // scale), name
    assert D.shape == (1, 2 * C, height, width)


def test_decoder_mirrors_the_encoder() -> None:
    net = DSGformer(8, (1, 2, 3, 4), (1, 2, 4, 8))
    assert [len(blocks) for blocks in net.encoder] == [1, 2, 3, 4]
    assert [len(blocks) for blocks in net.decoder] == [3, 2, 1]
    assert [blocks[0].attention.heads for blocks in net.decoder] == [4, 2, 1]
    assert [blocks[0].norm.weight.numel() for blocks in net.decoder] == [32, 16, 16]


@pytest.mark.parametrize('size', [(16, 16), (17, 31), (24, 65), (64, 16)])
def test_any_size_restores_to_the_same_size(size: tuple[int, int]) -> None:
    net = DSGformer(4, (1, 1, 1, 1), (1, 1, 2, 2)).eval()
    x = torch.rand(2, 3, *size)
    with torch.no_grad():
        y = net(x)
        assert y.shape == x.shape
        # Images of a batch do not see each other.
        torch.testing.assert_close(y[:1], net(x[:1]), rtol=1e-4, atol=1e-5)


def test_global_residual() -> None:
    """Ŝ = tail(D) + B."""
    net = DSGformer(4, (1, 1, 1, 1))
    torch.nn.init.zeros_(net.tail.weight)
    torch.nn.init.zeros_(net.tail.bias)
    x = torch.rand(1, 3, 21, 18)
    torch.testing.assert_close(net(x), x)


@pytest.mark.parametrize('score', ['relu2', 'relu', 'softmax'])
@pytest.mark.parametrize('attention', ['dtsas', 'mdta'])
@pytest.mark.parametrize('gate', ['dfgb', 'gelu', 'simplegate'])
def test_every_ablation_trains(attention: str, score: str, gate: str) -> None:
    """Forward and backward reach every parameter, in float32 and under bf16 autocast."""
    torch.manual_seed(0)
    net = DSGformer(4, (1, 1, 1, 1), (1, 1, 2, 2), attention=attention, score=score, gate=gate)
    x = torch.rand(1, 3, 16, 24)
    for bf16 in (False, True):
        net.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=bf16):
            y = net(x)
        (y.float() - 0.5).square().mean().backward()
        for name, parameter in net.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


def test_recomputation_changes_no_gradient() -> None:
    x = torch.rand(1, 3, 16, 16, dtype=torch.float64)
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        net = random_parameters(DSGformer(4, (1, 1, 1, 1), (1, 1, 1, 1), recompute=recompute))
        net(x).square().mean().backward()
        gradients.append([p.grad for p in net.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize(
    'settings',
    [
        {'width': 4, 'num_blocks': (1, 2, 1, 3), 'heads': (1, 2, 4, 4)},
        {'width': 8, 'num_blocks': (1, 1, 1, 1), 'heads': (2, 2, 2, 2), 'attention': 'mdta', 'gate': 'gelu'},
        {'width': 4, 'num_blocks': (1, 1, 1, 1), 'heads': (1, 1, 1, 1), 'patch': 4},
    ],
)
def test_settings_are_read_from_a_state_dict(settings: dict) -> None:
    state = DSGformer(**settings).state_dict()
    assert DSGformer.recognises(state)
    found = DSGformer.settings_from_state(state)
    assert {key: found[key] for key in settings} == settings
    DSGformer(**found).load_state_dict(state)
    assert not DSGformer.recognises({'head.weight': 0, 'tail.weight': 0})


@pytest.mark.parametrize(
    ('settings', 'words'),
    [
        ({'score': 'tanh'}, 'score'),
        ({'gate': 'relu'}, 'gate'),
        ({'attention': 'full'}, 'attention'),
        ({'num_blocks': (1, 1)}, 'four numbers'),
        ({'width': 6, 'heads': (4, 4, 4, 4)}, 'do not divide'),
        ({'patch': 0}, 'patch'),
        ({'ratios': '1/2'}, 'ratios'),
        ({'ratios': []}, 'ratios'),
        ({'ratios': ['1/2', 'half']}, 'ratios'),
        ({'ratios': ['1/2', '1/3']}, 'increasing'),
        ({'ratios': ['1/2', '3/2']}, 'increasing'),
        ({'output_init': 'ones'}, 'output_init'),
        ({'alpha_init': 'c'}, 'alpha_init'),
        ({'weights_init': 'c'}, 'weights_init'),
    ],
)
def test_wrong_settings_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DSGformer(**settings)


def test_a_patch_is_a_pixel_of_more_channels() -> None:
    """With `patch` p: pixel-unshuffle, the same network on 3p² channels, pixel-shuffle; sides of 8p."""
    net = random_parameters(DSGformer(4, (1, 1, 1, 1), (1, 1, 1, 1), patch=2))
    x = torch.rand(2, 3, 21, 40, dtype=torch.float64)
    rows = torch.cat([x, x[:, :, 9:20].flip(2)], dim=2)  # 21 rows reflected up to 32
    columns = torch.cat([rows, rows[..., 31:39].flip(3)], dim=3)
    taken = torch.nn.functional.pixel_unshuffle(columns, 2)
    made = net.tail(net.decode(net.encode(taken))) + taken
    expected = torch.nn.functional.pixel_shuffle(made, 2)[..., :21, :40]
    torch.testing.assert_close(net(x), expected, rtol=1e-11, atol=1e-12)
    assert (net.pad_multiple, net.min_size) == (16, 16)
    assert net.encode(taken).E1.shape[-2:] == (8, 12)


@pytest.mark.parametrize('width', [16, 12])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_patches_restore_alike_on_the_fast_path(width: int, dtype: torch.dtype) -> None:
    """Head and tail of 12 channels: kernels made for images of 3 must not run on them."""
    net = random_parameters(DSGformer(width, (1, 1, 1, 1), (1, 1, 1, 1), patch=2)).float().eval()
    x = torch.rand(1, 3, 48, 80)
    with torch.no_grad():
        with ops.use('plain'):
            expected = net(x)
        with torch.autocast('cpu', dtype, enabled=dtype is not torch.float32):
            found = net(x).float()
    tolerance = 1e-4 if dtype is torch.float32 else 0.1
    assert (found - expected).abs().max() <= tolerance * (expected - x).abs().max()


def test_zero_output_starts_as_the_identity() -> None:
    """W_p' and the tail at 0: every block starts as Y = X, the network as Ŝ = B; everything still learns."""
    torch.manual_seed(0)
    net = DSGformer(4, (1, 1, 1, 1), (1, 1, 1, 1), output_init='zero')
    x = torch.rand(1, 3, 16, 24)
    assert torch.equal(net(x), x)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (net(x) - 0.5).square().mean().backward()
        optimizer.step()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_initialisation_of_alpha_and_of_the_weights() -> None:
    module = DTSAS(64, 4, alpha_init='sqrt', weights_init='width')
    assert module.temperature.flatten().tolist() == [4.0] * 4
    assert module.weights.tolist() == pytest.approx([1.5 / 16] * 4)
    before, after = DSGA(8, 1), DSGA(8, 1, output_init='zero')
    assert before.project_out.weight.abs().max() > 0
    assert after.project_out.weight.abs().max() == 0


def test_ratios_are_fractions_of_the_width_of_a_head() -> None:
    """Strings as an options file has them, fractions, and numbers of a few digits mean the same."""
    wanted = (4, 8, 10, 16)
    thirds: list[tuple] = [
        ('1/8', '1/4', '1/3', '1/2'),
        (Fraction(1, 8), Fraction(1, 4), Fraction(1, 3), Fraction(1, 2)),
        (0.125, 0.25, 0.3333, 0.5),
    ]
    for ratios in thirds:
        net = DSGformer(32, (1, 1, 1, 1), ratios=ratios)
        assert net.encoder[0][0].attention.top_k == wanted
        assert net.settings['ratios'] == ('1/8', '1/4', '1/3', '1/2')


def test_settings_rebuild_the_network() -> None:
    """`settings` survive JSON and give the same result with the same weights, ratios and score included."""
    torch.manual_seed(0)
    net = DSGformer(
        4, (1, 2, 1, 1), (1, 1, 1, 1), score='relu', gate='simplegate', patch=2, ratios=[0.25, 0.5]
    )
    rebuilt = DSGformer(**json.loads(json.dumps(net.settings)))
    rebuilt.load_state_dict(net.state_dict())
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(net(x), rebuilt(x))
    assert rebuilt.settings == net.settings


def test_half_resolution_preset() -> None:
    """0.89 M parameters (at most 3 M fit 6 MB in float16) and images of any size."""
    net = dsgformer_h()
    assert sum(p.numel() for p in net.parameters()) == 889_478
    assert net.patch == 2
    x = torch.rand(1, 3, 33, 50)
    with torch.no_grad():
        assert torch.equal(net(x), x)
