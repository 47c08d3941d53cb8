"""One image in, one image out: padding, final output, tiles, shifted inputs."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from dsgformer_arch import cuda_graphs, ops, zoo
from dsgformer_arch import restore as restoring
from dsgformer_arch.archs.layers.network import RestorationNetwork
from dsgformer_arch.cuda_graphs import CudaGraphs
from dsgformer_arch.ops import eager
from dsgformer_arch.restore import (
    Halving,
    Tiling,
    automatic_tile,
    final_output,
    memory_per_pixel,
    predict,
    restore,
    restore_rows,
    set_memory_format,
    spans,
    tile_shape,
)


class Blur(RestorationNetwork):
    """A 3×3 box filter that insists on sides that are multiples of 8."""

    pad_multiple = 8
    min_size = 16

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False)
        nn.init.constant_(self.layer.weight, 1 / 9)

    def forward_padded(self, x: Tensor) -> Tensor:
        assert x.shape[-1] % 8 == 0
        assert min(x.shape[-2:]) >= 16
        return self.layer(x)


class Shifted(Blur):
    """The same on images in [-0.5, 0.5], with two outputs of which the first counts."""

    input_offset = 0.5
    final_output = 0

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        assert x.min() < 0
        return [super().forward(x), x]


@pytest.mark.parametrize('size', [(16, 16), (17, 40), (5, 70)])
def test_any_size(size: tuple[int, int]) -> None:
    x = torch.rand(2, 3, *size)
    y = restore(Blur(), x)
    assert y.shape == x.shape
    inner = nn.functional.avg_pool2d(x, 3, 1)
    torch.testing.assert_close(y[..., 1:-1, 1:-1], inner)


def test_shifted_network_gives_what_the_plain_one_gives() -> None:
    x = torch.rand(1, 3, 24, 16)
    inside = (..., slice(1, -1), slice(1, -1))  # zero padding means another colour to a shifted network
    torch.testing.assert_close(restore(Shifted(), x)[inside], restore(Blur(), x)[inside])


def test_predict_shifts_every_output_back() -> None:
    a, b = predict(lambda x: [2 * x, x], torch.full((1,), 0.75), 0.5)
    assert (a.item(), b.item()) == (1.0, 0.75)


def test_final_output() -> None:
    first, last = torch.zeros(1), torch.ones(1)
    assert final_output(nn.Identity(), first) is first
    assert final_output(nn.Identity(), [first, last]) is last
    assert final_output(Shifted(), [first, last]) is first


def test_tiles_without_context_equal_the_whole() -> None:
    x = torch.rand(2, 3, 70, 100)
    torch.testing.assert_close(restore(nn.Identity(), x, tile=32, tile_overlap=16), x)
    torch.testing.assert_close(restore(nn.Identity(), x, tile=32, tile_overlap=0), x)


def test_tiles_are_blended_towards_their_middle() -> None:
    """Where tiles overlap, what a tile knows badly (its border) counts least."""
    x = torch.rand(1, 3, 64, 96)
    whole = restore(Blur(), x)
    tiled, cut = (restore(Blur(), x, tile=40, tile_overlap=overlap) for overlap in (16, 0))
    inside = (..., slice(1, -1), slice(1, -1))
    error, error_cut = ((whole - y)[inside].abs().max() for y in (tiled, cut))
    assert error < 0.25 * error_cut
    assert (whole - tiled)[inside].abs().median() < 1e-6


@pytest.mark.parametrize('multiple', [1, 8, 32])
@pytest.mark.parametrize(
    ('size', 'tile', 'overlap'), [(100, 40, 8), (41, 40, 8), (40, 40, 0), (97, 10, 9), (1280, 512, 64)]
)
def test_tiles_cover_everything_and_overlap(size: int, tile: int, overlap: int, multiple: int) -> None:
    tiles = spans(size, tile, overlap, multiple)
    assert tiles[0][0] == 0
    assert tiles[-1][1] == size
    assert all(end - start <= tile for start, end in tiles)
    if tile >= 2 * multiple:
        assert all(start % multiple == 0 for start, _ in tiles)
        overlap = min(overlap, tile - tile % multiple - multiple)
    for (a, b), (c, d) in itertools.pairwise(tiles):
        assert a < c <= b - overlap
        assert b < d


@pytest.mark.parametrize(('size', 'tile'), [(1280, 960), (4000, 1000), (5000, 2000), (300, 260), (700, 100)])
def test_tiles_start_where_the_network_says(size: int, tile: int) -> None:
    tiles = spans(size, tile, tile // 2, 16, 128)
    assert (tiles[0][0], tiles[-1][1]) == (0, size)
    assert all(end - start <= tile for start, end in tiles)
    if tile >= 256:
        assert all(start % 128 == 0 for start, _ in tiles)
    assert all(end - following >= tile // 2 - 16 for (_, end), (following, _) in itertools.pairwise(tiles))


def test_tiles_overlap_by_more_where_it_takes_no_more_tiles() -> None:
    for wanted in (100, 300, 800):
        tiles = spans(1280, 960, 100, 16, 0, wanted)
        assert len(tiles) == 2
        assert tiles[0][1] - tiles[1][0] >= min(wanted, 2 * 960 - 1280)


def test_tiles_are_no_larger_than_the_wanted_overlap_needs() -> None:
    assert spans(6000, 3296, 512, 16, 128, 512) == [(0, 2432), (1920, 4352), (3840, 6000)]


def test_a_tile_that_shares_windows_counts_closer_to_its_start() -> None:
    """Of an overlap of 32, the first quarter is the earlier tile's alone and the second half the later's."""
    x = torch.zeros(1, 3, 8, 96)
    numbers = iter(range(10))
    bands = restore_rows(
        lambda part: torch.full_like(part, next(numbers)),
        lambda top, bottom: x[..., top:bottom, :],
        (8, 96),
        64,
        32,
        Tiling(1, blend=restoring.AFTER_SHARING),
    )
    row = torch.cat(list(bands), -2)[0, 0, 0]
    assert row[:40].abs().max() < 1e-5
    assert (row[48:] - 1).abs().max() < 1e-5
    assert (row[40:48].diff() > 0).all()


@pytest.mark.parametrize('pooled', [False, True])
@pytest.mark.parametrize('name', ['dsgformer_t', 'dsgformer_h'])
def test_lean_memory_is_an_upper_bound(name: str, pooled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted as above, but in strips, as images that are larger than a strip are restored."""
    monkeypatch.setitem(eager.STRIP_BYTES, 'cpu', 1)
    network = zoo.create(name, tlc=64 if pooled else None).eval()
    x = torch.rand(1, 3, 512, 512)
    with torch.inference_mode(), ops.use('eager'), restoring._Alive() as alive:
        network(x)
    lean = network.lean_memory(4)
    assert 0.4 * lean < (alive.most + x.nbytes) / 512**2 < lean
    with ops.use('plain'):
        assert network.lean_memory(4) == 0


@pytest.mark.parametrize('multiple', [1, 16, 256])
@pytest.mark.parametrize('overlap', [64, 256])
@pytest.mark.parametrize(
    'size', [(3000, 4000), (1500, 2000), (2160, 3840), (1520, 1530), (90, 30000), (12500, 16000)]
)
def test_tiles_are_shaped_for_the_image(size: tuple[int, int], overlap: int, multiple: int) -> None:
    """A tile of 1504×1504 computes each pixel of the second image 1.5 times, of the fourth 3.9 times."""
    pixels, highest = 1504**2, 1400
    shape = tile_shape(size, pixels, highest, overlap, multiple)
    assert shape[0] <= highest
    assert shape[0] * shape[1] <= pixels
    tiles = [spans(*side, overlap, multiple) for side in zip(size, shape, strict=True)]
    computed = [sum(end - start for start, end in along) for along in tiles]
    if overlap == 64 and multiple <= 16:  # larger ones leave less choice
        assert computed[0] * computed[1] <= 1.1 * size[0] * size[1]
    square = [spans(side, highest, overlap, multiple) for side in size]
    by_squares = [sum(end - start for start, end in along) for along in square]
    assert computed[0] * computed[1] <= by_squares[0] * by_squares[1]


def test_a_shape_of_tiles_is_found_where_memory_is_scarce() -> None:
    assert tile_shape((5000, 5000), 64 * 64, 64, 16, 8) == (64, 64)
    assert tile_shape((5000, 5000), 20 * 20, 20, 16, 8) == (20, 20)


def test_rows_are_read_in_order_and_come_out_once() -> None:
    x = torch.rand(1, 3, 150, 90)
    asked: list[tuple[int, int]] = []

    def rows(top: int, bottom: int) -> Tensor:
        asked.append((top, bottom))
        return x[..., top:bottom, :]

    ticks: list[float] = []
    bands = list(restore_rows(lambda part: 2 * part, rows, (150, 90), 48, 16, Tiling(8), ticks.append))
    torch.testing.assert_close(torch.cat(bands, -2), 2 * x)
    assert len(bands) == len(asked) > 2
    assert asked == sorted(asked)
    assert ticks == sorted(ticks)
    assert ticks[-1] == 1


def test_tiles_are_halved_when_memory_runs_out() -> None:
    sides: list[int] = []

    def scarce(part: Tensor) -> Tensor:
        sides.append(max(part.shape[-2:]))
        if sides[-1] > 100:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried …")
        return 2 * part

    call = Halving(scarce, Tiling(8))
    x = torch.rand(1, 3, 300, 200)
    torch.testing.assert_close(call(x), 2 * x)
    assert max(sides) == 300
    assert call.side is not None
    assert call.side <= 100
    sides.clear()
    torch.testing.assert_close(call(x), 2 * x)
    assert max(sides) <= 100  # what was learnt stays


def test_memory_that_never_suffices_and_other_errors_are_raised() -> None:
    def fails(message: str) -> Halving:
        def call(part: Tensor) -> Tensor:
            raise RuntimeError(message)

        return Halving(call, Tiling())

    with pytest.raises(RuntimeError, match='out of memory'):
        fails('CUDA out of memory')(torch.rand(1, 3, 200, 200))
    with pytest.raises(RuntimeError, match='wrong shape'):
        fails('wrong shape')(torch.rand(1, 3, 200, 200))


def test_memory_is_counted_by_what_is_alive_at_once() -> None:
    class Wide(nn.Module):
        """Two maps of 32 channels are alive at once, however often."""

        def __init__(self) -> None:
            super().__init__()
            self.head, self.tail = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 3, 1)
            self.body = nn.ModuleList(nn.Conv2d(32, 32, 1) for _ in range(10))

        def forward(self, x: Tensor) -> Tensor:
            y = self.head(x)
            for layer in self.body:
                y = layer(y)
            return self.tail(y)

    assert memory_per_pixel(Wide()) == pytest.approx(1.5 * 4 * (32 + 32), rel=0.1)


@pytest.mark.parametrize('name', ['dsgformer', 'dsgformer_t', 'dsgformer_h'])
def test_declared_memory_is_what_is_counted(name: str) -> None:
    network = zoo.create(name)
    assert memory_per_pixel(network) == pytest.approx(restoring.counted_memory(network), rel=0.1)


def test_automatic_tiles_follow_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device('cpu')
    network = Blur()
    sides = []
    for free in (1e6, 1e8, 1e9):
        monkeypatch.setattr(restoring, 'free_memory', lambda device, free=free: free)
        sides.append(automatic_tile(network, cpu))
        assert sides[-1] % 8 == 0
        if sides[-1] > restoring.SMALLEST_TILE:
            assert sides[-1] ** 2 * memory_per_pixel(network) <= free / 2
    assert sides[0] < sides[1] < sides[2]
    x = torch.rand(1, 3, 100, 900)
    monkeypatch.setattr(restoring, 'free_memory', lambda device: 1e6)
    inside = (..., slice(1, -1), slice(1, -1))
    tiled, whole = restore(network, x, tile='auto'), restore(network, x)
    torch.testing.assert_close(tiled[inside], whole[inside], atol=1e-3, rtol=0)


def test_mode_and_precision_are_restored() -> None:
    network = Blur().train()
    y = restore(network, torch.rand(1, 3, 16, 16), precision='bf16')
    assert network.training
    assert y.dtype == torch.float32
    assert restore(Blur().double(), torch.rand(1, 3, 16, 16).double()).dtype == torch.float64


def test_frozen_modules_stay_frozen() -> None:
    network = nn.Sequential(Blur(), nn.BatchNorm2d(3)).train()
    network[1].eval()
    restore(network, torch.rand(1, 3, 16, 16))
    assert network.training
    assert network[0].training
    assert not network[1].training


def test_double_images_are_restored_in_double_whatever_the_precision() -> None:
    x = torch.rand(1, 3, 16, 16).double()
    y = restore(Blur().double(), x, precision='bf16')
    torch.testing.assert_close(y, restore(Blur().double(), x))


def test_the_result_can_be_changed_in_place() -> None:
    restore(Blur(), torch.rand(1, 3, 16, 16)).clamp_(0, 1)


def test_integers_are_refused() -> None:
    with pytest.raises(ValueError, match='floating point'):
        restore(Blur(), torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


def test_bad_overlap_is_refused() -> None:
    with pytest.raises(ValueError, match='tile_overlap'):
        restore(Blur(), torch.rand(1, 3, 64, 64), tile=16, tile_overlap=16)


def test_memory_format_of_kernels_and_other_parameters() -> None:
    network = nn.Conv2d(4, 4, 3)
    network.register_parameter('blocks', nn.Parameter(torch.rand(2, 1, 1, 8, 5)))
    values = [parameter.clone() for parameter in network.parameters()]
    set_memory_format(network, torch.channels_last)
    assert network.weight.is_contiguous(memory_format=torch.channels_last)
    for parameter, value in zip(network.parameters(), values, strict=True):
        assert torch.equal(parameter, value)


class TestCudaGraphs:
    """Without a GPU: a recording is a call that writes where the first one wrote."""

    @pytest.fixture(autouse=True)
    def _recordings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recorded = 0

        def recorded(call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
            self.recorded += 1
            result = call()

            def replay() -> None:
                with torch.inference_mode():
                    result.copy_(call())

            return replay, result

        monkeypatch.setattr(cuda_graphs, '_recorded', recorded)
        monkeypatch.setattr(torch.cuda, 'device', lambda device: contextlib.nullcontext())

    def test_equals_restoring(self) -> None:
        network = Shifted()
        graphs = CudaGraphs(network)
        images = [torch.rand(1, 3, 21, 17) for _ in range(3)]
        with torch.inference_mode():
            results = [graphs(images[0])]
        results += [graphs(image) for image in images[1:]]
        for image, result in zip(images, results, strict=True):
            assert torch.equal(result, restore(network, image))
        assert self.recorded == 1
        assert network.training

    def test_one_thread_at_a_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        network = Blur()
        graphs = CudaGraphs(network)
        images = [torch.full((1, 3, 16, 16), i / 8) for i in range(8)]
        graphs(images[0])
        copy = Tensor.copy_

        def slow_copy(self: Tensor, *arguments: object) -> Tensor:
            done = copy(self, *arguments)
            time.sleep(0.01)  # another thread would write its image into the same tensor meanwhile
            return done

        monkeypatch.setattr(Tensor, 'copy_', slow_copy)
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(graphs, images))
        for image, result in zip(images, results, strict=True):
            assert torch.equal(result, restore(network, image))

    def test_records_each_size_and_order_once(self) -> None:
        graphs = CudaGraphs(Blur(), sizes=2)
        image, other, third = torch.rand(1, 3, 24, 16), torch.rand(1, 3, 16, 24), torch.rand(2, 3, 16, 16)
        for _ in range(2):
            graphs(image)
            graphs(other)
        assert self.recorded == 2
        graphs(image.contiguous(memory_format=torch.channels_last))
        assert self.recorded == 3  # and the first is forgotten
        graphs(other)
        assert self.recorded == 3
        graphs(third)
        graphs(image)
        assert self.recorded == 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU here')
def test_cuda_graphs_equal_restoring() -> None:
    network = zoo.create('dsgformer_t').cuda()
    graphs = CudaGraphs(network, 'bf16')
    for size in ((64, 48), (41, 56), (64, 48)):
        image = torch.rand(1, 3, *size, device='cuda')
        assert torch.equal(graphs(image), restore(network, image, precision='bf16'))
