"""Local statistics at test time against windows one by one and official fixtures, in float64."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsgformer_arch.archs.convir_arch import ConvIR
from dsgformer_arch.archs.drsformer_arch import DRSformer, TopKSparseAttention
from dsgformer_arch.archs.dsgformer_arch import DSGformer
from dsgformer_arch.archs.mhnet_arch import MHNet
from dsgformer_arch.archs.mprnet_arch import MPRNet
from dsgformer_arch.archs.nafnet_arch import NAFNet
from dsgformer_arch.archs.restormer_arch import Restormer
from dsgformer_arch.archs.tlc import (
    LocalAvgPool2d,
    SharedMaps,
    Windowed,
    placed,
    use_local_pooling,
    windowed,
)
from dsgformer_arch.utils.errors import UserError
from tests.conformance.check import check

FIXTURES = Path(__file__).resolve().parents[1] / 'conformance'

TRAIN = 16
"""Side of the training crops; windows are 24×24 at full resolution."""

SYSTEMS: dict[str, Callable[[], nn.Module]] = {
    'NAFNet': lambda: NAFNet(width=4, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1]),
    'MPRNet': lambda: MPRNet(n_feat=8, scale_unetfeats=4, scale_orsnetfeats=4, num_cab=1),
    'MHNet': lambda: MHNet(width=16, num_cab=1),
    'Restormer': lambda: Restormer(dim=8, num_blocks=[1, 1, 1, 1], num_refinement_blocks=1),
    'DRSformer': lambda: DRSformer(dim=8, num_blocks=[1, 1, 1, 1]),
    'DSGformer': lambda: DSGformer(width=8, num_blocks=[1, 1, 1, 1]),
}


def build(name: str) -> nn.Module:
    """A small network with weights that let every branch count, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = SYSTEMS[name]().double().eval()
        for parameter in network.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return network


def image(height: int, width: int, batch: int = 1) -> Tensor:
    return torch.rand(
        batch, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )


@torch.no_grad()
def restored(network: nn.Module, x: Tensor) -> Tensor:
    y = network(x)
    return y[network.final_output] if isinstance(y, (list, tuple)) else y


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


# Literal forms, which share nothing with the module under test.


def reference_mean(x: Tensor, window: tuple[int, int]) -> Tensor:
    """The mean of the window around each pixel, the window pushed inside at the border."""
    height, width = x.shape[-2:]
    rows, columns = min(window[0], height), min(window[1], width)
    y = torch.empty_like(x)
    for i in range(height):
        top = min(max(i - (rows - 1) // 2, 0), height - rows)
        for j in range(width):
            left = min(max(j - (columns - 1) // 2, 0), width - columns)
            y[..., i, j] = x[..., top : top + rows, left : left + columns].mean((-2, -1))
    return y


def reference_corners(size: int, window: int) -> list[int]:
    """Walk along a side in even steps until a window reaches its end, which it is then pushed back to."""
    number = (size - 1) // window + 1
    step = window if number == 1 else math.ceil((size - window) / (number - 1) - 1e-8)
    corners = [0]
    while corners[-1] + window < size:
        corners.append(corners[-1] + step)
    return [*corners[:-1], size - window]


def reference_windows(
    core: Callable[..., Tensor], maps: tuple[Tensor, ...], window: tuple[int, int]
) -> Tensor:
    """Every pixel's own list of the results that cover it, averaged."""
    height, width = maps[0].shape[-2:]
    rows, columns = min(window[0], height), min(window[1], width)
    covering: list[list[list[Tensor]]] = [[[] for _ in range(width)] for _ in range(height)]
    for top in reference_corners(height, rows):
        for left in reference_corners(width, columns):
            part = core(*(x[:, :, top : top + rows, left : left + columns] for x in maps))
            for i in range(rows):
                for j in range(columns):
                    covering[top + i][left + j].append(part[:, :, i, j])
    return torch.stack([torch.stack([torch.stack(c).mean(0) for c in line], -1) for line in covering], -2)


def reference_mdta(qkv: Tensor, temperature: Tensor) -> Tensor:
    """Restormer's equation, one image and head at a time."""
    heads = len(temperature)
    out = []
    for one in qkv:
        q, k, v = one.flatten(1).chunk(3)
        for head in range(heads):
            Q, K, V = (m.chunk(heads)[head] for m in (q, k, v))
            Q = Q / Q.norm(dim=1, keepdim=True)
            K = K / K.norm(dim=1, keepdim=True)
            out.append(torch.softmax(Q @ K.T * temperature[head], dim=1) @ V)
    return torch.cat(out).reshape(len(qkv), -1, *qkv.shape[2:])


class ReferencePool(nn.Module):
    def __init__(self, window: tuple[int, int]) -> None:
        super().__init__()
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        return reference_mean(x, self.window)


# Means.


@pytest.mark.parametrize('window', [(3, 3), (4, 7), (1, 1), (9, 5), (30, 5), (9, 30), (8, 13)])
@pytest.mark.parametrize('size', [(9, 14), (12, 11)])
def test_local_mean_is_the_window_around_each_pixel(window: tuple[int, int], size: tuple[int, int]) -> None:
    x = torch.rand(2, 3, *size, dtype=torch.float64)
    y = LocalAvgPool2d(window)(x)
    if window[0] >= size[0] and window[1] >= size[1]:
        assert y.shape == (2, 3, 1, 1)
    else:
        assert y.shape == x.shape
    assert difference(y.expand_as(x), reference_mean(x, window)) < 1e-12


@pytest.mark.parametrize('window', [None, (9, 14), (20, 14), (20, 20)])
def test_local_mean_over_the_whole_map_is_the_global_one(window: tuple[int, int] | None) -> None:
    x = torch.rand(2, 3, 9, 14)
    assert torch.equal(LocalAvgPool2d(window)(x), nn.AdaptiveAvgPool2d(1)(x))


@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
def test_local_mean_keeps_its_precision_on_large_maps(dtype: torch.dtype, tolerance: float) -> None:
    x = (100 + torch.rand(1, 1, 512, 700, dtype=torch.float64)).to(dtype)
    y = LocalAvgPool2d((16, 16))(x)
    assert y.dtype == dtype
    assert difference(y.double(), LocalAvgPool2d((16, 16))(x.double())) < tolerance


# Windows.


@pytest.mark.parametrize('size', [(1, 1), (7, 20), (16, 16), (17, 33), (40, 6), (23, 45)])
@pytest.mark.parametrize('window', [(16, 16), (5, 12), (1, 3), (2, 50)])
def test_windows_are_averaged_where_they_overlap(size: tuple[int, int], window: tuple[int, int]) -> None:
    x, y = torch.rand(2, 3, *size, dtype=torch.float64), torch.rand(2, 1, *size, dtype=torch.float64)

    def core(a: Tensor, b: Tensor) -> Tensor:
        return a[:, :2] * b.mean((2, 3), keepdim=True) + a.amax((2, 3), keepdim=True)[:, :2]

    assert difference(windowed(core, (x, y), window), reference_windows(core, (x, y), window)) < 1e-12


def test_windows_come_one_at_a_time() -> None:
    seen: list[torch.Size] = []

    def core(x: Tensor) -> Tensor:
        seen.append(x.shape)
        return x

    x = torch.rand(2, 3, 100, 70, dtype=torch.float64)
    assert difference(windowed(core, (x,), (16, 24)), x) < 1e-12
    assert seen == [torch.Size((2, 3, 16, 24))] * (7 * 3)


def test_one_window_is_the_function_itself() -> None:
    x = torch.rand(2, 3, 16, 9)
    assert torch.equal(windowed(lambda x: x.softmax(dim=1) / 3, (x,), (16, 10)), x.softmax(dim=1) / 3)


def test_windows_of_a_tile_are_those_of_the_whole_image() -> None:
    """What whole windows cover equals the whole; also at half the resolution and in a tile of a tile."""
    x = torch.rand(1, 2, 50, 60, dtype=torch.float64)

    def centred(x: Tensor) -> Tensor:
        return x - x.mean((2, 3), keepdim=True)

    whole = windowed(centred, (x,), (16, 16))  # rows 0, 12, 24, 34; columns 0, 15, 30, 44
    with placed((24, 100), (0, 80), (100, 120), 4):
        tile = windowed(centred, (x[..., 12:, :40],), (16, 16))
        with placed((24, 76), (20, 80), (76, 80), 4):
            inner = windowed(centred, (x[..., 24:, 10:40],), (16, 16))
    assert difference(tile[..., 8:, :30], whole[..., 20:, :30]) < 1e-12
    assert difference(inner[..., 8:, 8:20], whole[..., 32:, 18:30]) < 1e-12
    by_itself = windowed(centred, (x[..., 12:, :40],), (16, 16))
    assert difference(by_itself[..., 8:, :30], whole[..., 20:, :30]) > 0.01


def test_a_sliver_of_a_window_is_widened() -> None:
    x = torch.rand(1, 1, 16, 40)
    seen: list[int] = []

    def core(x: Tensor) -> Tensor:
        seen.append(x.shape[-1])
        return x

    with placed((0, 16), (0, 18), (16, 40)):
        windowed(core, (x[..., :18],), (16, 16))  # columns 0, 12, 24
    assert seen == [16, 8]


WINDOWED = Windowed(lambda x: x, (16, 16))


def exchanged(tile: tuple[int, int], shared: SharedMaps) -> Tensor:
    """Starts of the tiles from which a tile of an axis of 60 pixels has the maps of its windows of 16."""
    with placed((0, 16), tile, (16, 60), 4, shared):
        grid = WINDOWED.grid(16, tile[1] - tile[0])
        own = torch.full((1, len(grid.columns), 1, 1, 1), float(tile[0]))
        return grid.exchange(0, own).flatten()


def test_a_window_has_the_map_of_the_tile_that_knows_it_best() -> None:
    """Windows start at 0, 15, 30 and 44; what a tile cuts counts less than what it has whole."""
    shared = SharedMaps()
    assert exchanged((0, 48), shared).tolist() == [0, 0, 0, 0]  # the third ends 2 pixels before the cut
    # The third begins 10 pixels after this tile, and the last is whole; the second it cuts.
    assert exchanged((20, 60), shared).tolist() == [0, 20, 20]
    assert exchanged((24, 60), shared).tolist() == [0, 20, 20]  # which begins closer to them
    assert exchanged((8, 60), shared).tolist() == [0, 0, 8, 8]
    assert exchanged((0, 60), SharedMaps()).tolist() == [0, 0, 0, 0]


def test_maps_that_are_not_finite_are_not_shared() -> None:
    shared = SharedMaps()
    own = torch.full((1, 1), float('nan'))
    assert shared.best((0,), 5.0, 16, own).isnan().all()
    assert shared.best((0,), -3.0, 16, torch.ones(1, 1)).item() == 1


def test_windows_above_are_forgotten() -> None:
    shared = SharedMaps()
    for number, bottom in enumerate((16, 32)):
        shared.best((number,), 5.0, bottom, torch.ones(1, 1))
    shared.forget(16)
    assert [shared.best((number,), 1.0, 48, torch.zeros(1, 1)).item() for number in (0, 1)] == [0, 1]


def tile_errors(network: nn.Module, x: Tensor, tiles: list[tuple[int, int]], shared: bool) -> list[Tensor]:
    """Largest difference of each tile of columns to the whole image, by column, relative to the change."""
    whole = restored(network, x)
    scale = (whole - x).abs().max()
    maps = SharedMaps() if shared else None
    errors = []
    for tile in tiles:
        with placed((0, x.shape[-2]), tile, (x.shape[-2], x.shape[-1]), network.pad_multiple, maps):
            part = restored(network, x[..., tile[0] : tile[1]])
        errors.append((part - whole[..., tile[0] : tile[1]]).abs().amax((0, 1, 2)) / scale)
    return errors


def test_dsgformers_tiles_start_where_its_blocks_do() -> None:
    """DFGB cuts the maps of all levels into 8×8 blocks: those of the last have 64×64 pixels."""
    network = use_local_pooling(build('DSGformer'), TRAIN)
    assert network.tile_multiple == 64
    x = image(48, 640)
    aligned, shifted = (
        tile_errors(network, x, [(start, 640)], False)[0][-128:].max() for start in (192, 200)
    )
    assert aligned < 1e-3 * shifted


def test_dsgformers_tile_knows_windows_from_the_tile_before() -> None:
    network = use_local_pooling(build('DSGformer'), 96)  # windows of 144 pixels
    x = image(48, 768)
    apart, together = (tile_errors(network, x, [(0, 512), (256, 768)], shared) for shared in (False, True))
    assert torch.equal(apart[0], together[0])
    assert together[1][128:].max() < 0.2 * apart[1][128:].max()


def test_windows_pass_gradients() -> None:
    x = torch.rand(1, 2, 7, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: windowed(lambda x: x * x.mean((2, 3), keepdim=True), (x,), (4, 4)), x
    )


# Whole networks against reference implementations.


def training_window(name: str, base: tuple[int, int]) -> tuple[int, int]:
    """Window of a layer of a network with three halvings, from the layer's name."""
    level = (
        8
        if 'latent' in name
        else 2 ** (int(match[1]) - 1)
        if (match := re.search(r'level([1-3])', name))
        else 1
    )
    return base[0] // level, base[1] // level


def reference_local(network: nn.Module, base: tuple[int, int]) -> nn.Module:
    """A Restormer or DRSformer whose statistics are local, by the reference implementations above."""
    for name, module in list(network.named_modules()):
        window = training_window(name, base)
        if isinstance(module, nn.AdaptiveAvgPool2d):
            parent, _, child = name.rpartition('.')
            setattr(network.get_submodule(parent), child, ReferencePool(window))
        if name.endswith('.attn'):

            def forward(x: Tensor, attention: nn.Module = module, window: tuple[int, int] = window) -> Tensor:
                def core(qkv: Tensor) -> Tensor:
                    if isinstance(attention, TopKSparseAttention):
                        return TopKSparseAttention.attend(attention, qkv)
                    return reference_mdta(qkv, attention.temperature)

                qkv = attention.qkv_dwconv(attention.qkv(x))
                return attention.project_out(reference_windows(core, (qkv,), window))

            module.forward = forward
    return network


@pytest.mark.parametrize('name', ['Restormer', 'DRSformer'])
@pytest.mark.parametrize(
    ('train', 'base', 'size'), [(16, (24, 24), (40, 24)), ((16, 24), (24, 36), (32, 56))]
)
def test_attention_equals_reference_windows(
    name: str, train: int | tuple[int, int], base: tuple[int, int], size: tuple[int, int]
) -> None:
    x = image(*size)
    whole = restored(build(name), x)
    reference = restored(reference_local(build(name), base), x)
    local = restored(use_local_pooling(build(name), train), x)
    assert difference(local, reference) < 1e-9
    assert difference(local, whole) > 1e-6


@pytest.mark.parametrize('attention', ['dtsas', 'mdta'])
def test_dsgformer_equals_reference_windows(attention: str) -> None:
    network = DSGformer(width=8, num_blocks=[1, 1, 1, 1], attention=attention).double().eval()
    reference = copy.deepcopy(network)
    # Encoders at 1, 1/2, 1/4, 1/8 of the size, decoders at 1/4, 1/2, 1.
    shrunk = {f'encoder.{i}': 2**i for i in range(4)} | {f'decoder.{i}': 4 >> i for i in range(3)}
    for name, block in reference.named_modules():
        if name.endswith('.0') and name.rpartition('.')[0] in shrunk:
            side = 24 // shrunk[name.rpartition('.')[0]]

            def forward(X: Tensor, block: nn.Module = block, side: int = side) -> Tensor:
                Q, K, V, U = block.depthwise(block.project_in(block.norm(X))).chunk(4, dim=1)
                attended = reference_windows(block.attention, (Q, K, V), (side, side))
                return X + block.project_out(block.gate(U) * attended)

            block.forward = forward
    x = image(32, 40)
    whole = restored(network, x)
    local = restored(use_local_pooling(network, TRAIN), x)
    assert difference(local, restored(reference, x)) < 1e-9
    assert difference(local, whole) > 1e-6


@pytest.mark.parametrize(
    ('name', 'windows'),
    [
        (
            'NAFNet',
            {'encoders.0': 24, 'encoders.1': 12, 'middle_blks': 6, 'decoders.0': 12, 'decoders.1': 24},
        ),
        # Stage 1 takes quarters of the image, and its decoder halves; a window is sized by its layer's map.
        (
            'MPRNet',
            {'stage1_encoder.encoder_level1': 12, 'stage1_encoder.encoder_level3': 3, 'shallow_feat3': 24},
        ),
        ('MHNet', {'stage1.encoders.3': 3, 'stage1.decoders.3': 24, 'stage2.CABG4': 24, 'stage2.skff2': 24}),
    ],
)
def test_means_equal_reference_windows(name: str, windows: dict[str, int]) -> None:
    network = use_local_pooling(build(name), TRAIN)
    pools = {name: module for name, module in network.named_modules() if isinstance(module, LocalAvgPool2d)}
    for prefix, side in windows.items():
        assert {pool.window for name, pool in pools.items() if name.startswith(prefix)} == {(side, side)}
    reference = copy.deepcopy(network)
    for module_name, module in list(reference.named_modules()):
        if isinstance(module, LocalAvgPool2d):
            parent, _, child = module_name.rpartition('.')
            setattr(reference.get_submodule(parent), child, ReferencePool(module.window))
    x = image(32, 48)
    assert difference(restored(network, x), restored(reference, x)) < 1e-9
    assert difference(restored(network, x), restored(build(name), x)) > 1e-6


def test_window_of_mprnets_halves_is_not_square() -> None:
    network = use_local_pooling(build('MPRNet'), TRAIN)
    assert network.stage1_decoder.decoder_level1[0].CA.avg_pool.window == (12, 24)


def test_mhnets_attention_stays_global() -> None:
    network = use_local_pooling(build('MHNet'), TRAIN)
    attention = network.stage1.middle_blks[0]
    x = torch.rand(1, 256, 5, 7, dtype=torch.float64)
    assert torch.equal(attention(x), build('MHNet').stage1.middle_blks[0](x))


@pytest.mark.parametrize(
    ('fixture', 'network'),
    [
        ('nafnet32_tlc', NAFNet),
        pytest.param('mhnet_tlc', MHNet, marks=pytest.mark.long),
    ],
)
def test_conforms_to_the_official_implementation(fixture: str, network: Callable[[], nn.Module]) -> None:
    assert check(use_local_pooling(network(), 256), str(FIXTURES / f'{fixture}.npz')) == []


# What holds for every system.


@pytest.mark.parametrize('name', SYSTEMS)
def test_small_images_are_restored_exactly_as_before(name: str) -> None:
    network = build(name)
    local = use_local_pooling(copy.deepcopy(network), TRAIN)
    for size in [(16, 16)] if name == 'MHNet' else [(24, 24), (16, 24)]:
        x = image(*size, batch=2)
        if name in ('Restormer', 'DSGformer'):  # other forms of the same attention
            assert difference(restored(local, x), restored(network, x)) < 1e-12
        else:
            assert torch.equal(restored(local, x), restored(network, x))


@pytest.mark.parametrize('name', SYSTEMS)
def test_state_dict_and_network_stay(name: str) -> None:
    network = build(name)
    before = network.state_dict(keep_vars=True)
    assert use_local_pooling(network, TRAIN) is network
    after = network.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[key] is before[key] for key in before)
    x = image(48, 48)
    expected = restored(network, x)
    fresh = use_local_pooling(SYSTEMS[name]().double().eval(), TRAIN)
    fresh.load_state_dict(before)
    assert torch.equal(restored(fresh, x), expected)
    assert torch.equal(restored(copy.deepcopy(network), x), expected)


@pytest.mark.parametrize('name', ['NAFNet', 'Restormer', 'DSGformer'])
def test_called_again_it_sets_other_windows(name: str) -> None:
    x = image(32, 48)
    twice = use_local_pooling(use_local_pooling(build(name), 32, 48), TRAIN)
    once = use_local_pooling(build(name), TRAIN)
    assert torch.equal(restored(twice, x), restored(once, x))
    whole = use_local_pooling(use_local_pooling(build(name), TRAIN), 32, 96)
    assert difference(restored(whole, x), restored(build(name), x)) < 1e-12


@pytest.mark.parametrize('name', ['NAFNet', 'Restormer', 'DSGformer'])
def test_a_batch_is_its_images(name: str) -> None:
    network = use_local_pooling(build(name), TRAIN)
    x = image(32, 48, batch=2)
    assert difference(restored(network, x), torch.cat([restored(network, one) for one in x.split(1)])) < 1e-12


@pytest.mark.parametrize('name', SYSTEMS)
def test_autocast_and_gradients(name: str) -> None:
    network = use_local_pooling(build(name).float(), TRAIN)
    x = image(32, 48).float()
    reference = restored(network, x)
    with torch.autocast('cpu', torch.bfloat16):
        assert difference(restored(network, x).float(), reference) < 0.2
    y = network(x)
    (y[0] if isinstance(y, (list, tuple)) else y).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    'name', [name if name == 'NAFNet' else pytest.param(name, marks=pytest.mark.long) for name in SYSTEMS]
)
def test_compiles_as_a_whole(name: str) -> None:
    network = use_local_pooling(build(name), TRAIN)
    x = image(32, 48)
    torch.compiler.reset()
    compiled = torch.compile(network, backend='eager', fullgraph=True)
    assert difference(restored(compiled, x), restored(network, x)) < 1e-12


def test_finds_the_network_inside_a_wrapper() -> None:
    class Wrapper(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor) -> Tensor:
            height, width = x.shape[-2:]
            return self.network(F.pad(x, (0, -width % 8, 0, -height % 8), 'reflect'))[..., :height, :width]

    wrapped = use_local_pooling(Wrapper(build('Restormer')), TRAIN)
    x = image(48, 40)
    assert torch.equal(restored(wrapped, x), restored(use_local_pooling(build('Restormer'), TRAIN), x))
    assert restored(wrapped, image(41, 51)).shape == (1, 3, 41, 51)


def test_training_size_that_is_no_multiple_is_padded() -> None:
    network = use_local_pooling(build('NAFNet'), 30)
    assert network.encoders[0][0].sca[0].window == (32 * 45 // 30, 32 * 45 // 30)


def test_base_size_is_taken() -> None:
    network = use_local_pooling(build('NAFNet'), (32, 16), (20, 24))
    assert network.encoders[1][0].sca[0].window == (10, 12)


@pytest.mark.parametrize('size', [0, -3, (32,), (32, 32, 32), '256', 25.6, (32, 0)])
def test_sizes_that_are_none(size: object) -> None:
    with pytest.raises(UserError, match='train_size'):
        use_local_pooling(build('NAFNet'), size)
    with pytest.raises(UserError, match='base_size'):
        use_local_pooling(build('NAFNet'), 32, size)


def test_a_network_without_global_statistics_is_refused() -> None:
    with pytest.raises(UserError, match='ConvIR has no global statistics'):
        use_local_pooling(ConvIR(num_res=1, base_channel=8), 256)
