"""`Deblurrer` takes every kind of image and gives the same kind back; what a network breaks is noticed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from dsgformer_arch import Deblurrer, cuda_graphs, zoo
from dsgformer_arch import restore as restoring
from dsgformer_arch.archs.layers.network import RestorationNetwork
from dsgformer_arch.inference import deblurrer as module
from dsgformer_arch.inference import official_weights, weights
from dsgformer_arch.restore import restore
from dsgformer_arch.utils.errors import UserError
from tests.small_systems import SMALL, small


class Darker(RestorationNetwork):
    """Subtracts 0.1: what came out says exactly what went in."""

    pad_multiple = 8

    def forward_padded(self, x: Tensor) -> Tensor:
        assert x.shape[-1] % 8 == 0
        return x - 0.1


def pixels(*shape: int, dtype: Any = np.uint8) -> NDArray[Any]:
    values = np.random.default_rng(0).random(shape) * 0.5 + 0.3
    most = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1
    return (values * most).astype(dtype)


def expected(image: NDArray[Any]) -> NDArray[Any]:
    if image.dtype.kind == 'f':
        return image - 0.1
    most = np.iinfo(image.dtype).max
    return np.rint(image.astype(np.float64) - 0.1 * most)


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16, np.float32, np.float64])
@pytest.mark.parametrize('shape', [(20, 31), (20, 31, 1), (20, 31, 3), (2, 20, 31, 3)])
@pytest.mark.parametrize('tile', [None, 64, 'auto'])
def test_arrays(shape: tuple[int, ...], dtype: Any, tile: Any) -> None:
    image = pixels(*shape, dtype=dtype)
    before = image.copy()
    restored = Deblurrer(Darker(), tile=tile, precision='fp32').restore(image)
    assert (restored.shape, restored.dtype) == (image.shape, image.dtype)
    assert np.abs(restored - expected(image)).max() <= (1e-6 if image.dtype.kind == 'f' else 1)
    assert np.array_equal(image, before)


@pytest.mark.parametrize('channels', [2, 4])
def test_alpha_is_kept(channels: int) -> None:
    image = pixels(17, 23, channels)
    restored = Deblurrer(Darker()).restore(image)
    assert np.array_equal(restored[..., -1], image[..., -1])
    assert np.abs(restored[..., :-1] - expected(image)[..., :-1]).max() <= 1


def test_sixteen_bits_are_not_rounded_to_eight() -> None:
    image = np.linspace(20000, 21000, 64 * 64).astype(np.uint16).reshape(64, 64)
    restored = Deblurrer(Darker()).restore(image)
    assert np.abs(restored - expected(image)).max() <= 1
    assert len(np.unique(restored)) > 500  # 8 bits have 5 values in this range


def test_pillow_images() -> None:
    image = Image.fromarray(pixels(20, 30, 3))
    image.info['icc_profile'] = b'profile'
    for mode in ('L', 'LA', 'RGB', 'RGBA'):
        restored = Deblurrer(Darker()).restore(image.convert(mode))
        assert (restored.mode, restored.size) == (mode, (30, 20))
        assert restored.info['icc_profile'] == b'profile'
        assert (
            np.abs(np.asarray(restored)[..., 0] - expected(np.asarray(image.convert(mode)))[..., 0]).max()
            <= 1
        )
    assert Deblurrer(Darker()).restore(image.convert('P')).mode == 'RGB'


def test_tensors() -> None:
    deblurrer = Deblurrer(Darker(), precision='fp32')
    image = torch.rand(3, 20, 30) * 0.5 + 0.3
    torch.testing.assert_close(deblurrer.restore(image), image - 0.1)
    batch = torch.rand(2, 1, 20, 30, dtype=torch.float64) * 0.5 + 0.3
    restored = deblurrer.restore(batch)
    torch.testing.assert_close(restored, batch - 0.1, atol=1e-6, rtol=0)
    bytes = (image * 255).to(torch.uint8)
    assert deblurrer.restore(bytes).dtype == torch.uint8
    assert (deblurrer.restore(bytes).int() - (bytes.int() - 25.5)).abs().max() <= 1


def test_lists_and_iterators() -> None:
    deblurrer = Deblurrer(Darker())
    images = [pixels(20, 30, 3), pixels(10, 16, 3), Image.fromarray(pixels(8, 8))]
    listed = deblurrer.restore(images)
    assert [type(one) for one in listed] == [type(one) for one in images]
    drawn: list[int] = []

    def frames() -> Iterator[Any]:
        for i in range(3):
            drawn.append(i)
            yield images[i]

    lazily = deblurrer.restore(frames())
    assert drawn == []
    assert np.array_equal(next(lazily), listed[0])
    assert drawn == [0]
    assert len(list(lazily)) == 2


def test_frames_of_one_size_go_through_the_network_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: there, frames are batched."""
    batches: list[int] = []

    class Counting(Darker):
        def forward(self, x: Tensor) -> Tensor:
            if not x.is_meta:  # where memory is only counted
                batches.append(len(x))
            return super().forward(x)

    deblurrer = Deblurrer(Counting(), precision='fp32')
    frames = [pixels(20, 32, 3) for _ in range(11)] + [pixels(24, 32, 3)] * 2
    with monkeypatch.context() as patch:
        patch.setattr(module.Deblurrer, '_batches', property(lambda self: True))
        restored = list(deblurrer.restore(iter(frames)))
    assert batches == [8, 3, 2]
    for frame, result in zip(frames, restored, strict=True):
        assert np.abs(result - expected(frame)).max() <= 1


def test_batches_are_recorded_once_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: a recording is a call that writes where the first one wrote."""
    recorded: list[int] = []

    def recording(call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        result = call()
        recorded.append(len(result))

        def replay() -> None:
            with torch.inference_mode():
                result.copy_(call())

        return replay, result

    monkeypatch.setattr(cuda_graphs, '_recorded', recording)
    monkeypatch.setattr(torch.cuda, 'device', lambda device: contextlib.nullcontext())
    monkeypatch.setattr(module.Deblurrer, '_batches', property(lambda self: True))
    monkeypatch.setattr(module.Deblurrer, '_records', property(lambda self: not self._unrecordable))
    frames = [pixels(24, 32, 3) - np.uint8(2 * i) for i in range(19)]
    restored = list(Deblurrer(Darker(), precision='fp32').restore(iter(frames)))
    assert recorded == [8]  # the second batch replays the first; the rest of 3 is not worth a recording
    for frame, result in zip(frames, restored, strict=True):
        assert np.abs(result - expected(frame)).max() <= 1


def test_a_network_that_cannot_be_recorded_runs_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def refusing(call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        tried.append(1)
        raise RuntimeError('operation not permitted when stream is capturing')

    monkeypatch.setattr(cuda_graphs, '_recorded', refusing)
    monkeypatch.setattr(torch.cuda, 'device', lambda device: contextlib.nullcontext())
    monkeypatch.setattr(module.Deblurrer, '_batches', property(lambda self: True))
    monkeypatch.setattr(module.Deblurrer, '_records', property(lambda self: not self._unrecordable))
    deblurrer = Deblurrer(Darker(), precision='fp32')
    frames = [pixels(24, 32, 3)] * 16
    for frame, result in zip(frames, deblurrer.restore(iter(frames)), strict=True):
        assert np.abs(result - expected(frame)).max() <= 1
    assert tried == [1]
    assert 'cannot be recorded as a CUDA graph' in deblurrer.report.notes[0]


def test_precision_follows_the_device_the_system_and_the_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 only where the device computes in it, and for images of 8 bits, whose steps it resolves."""
    deblurrer = Deblurrer(Darker())
    for supported, expected_precision in ((True, 'bf16'), (False, 'fp32')):
        monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda supported=supported: supported)
        assert deblurrer._precision(np.dtype(np.uint8)) == expected_precision
        assert deblurrer._precision(np.dtype(np.uint16)) == 'fp32'
        assert deblurrer._precision(np.dtype(np.float32)) == 'fp32'
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: True)
    deblurrer.name = 'ipt'  # whose entry in the zoo says that bf16 costs it precision
    assert deblurrer._precision(np.dtype(np.uint8)) == 'fp32'
    assert Deblurrer(Darker(), precision='fp16')._precision(np.dtype(np.uint8)) == 'fp16'


def test_strength_blends() -> None:
    image = pixels(20, 30, 3)
    full, half, none = (Deblurrer(Darker(), strength=s).restore(image).astype(int) for s in (1, 0.5, 0))
    assert np.array_equal(none, image)
    assert np.abs(half - (full + image) / 2).max() <= 1


@pytest.mark.long
@pytest.mark.parametrize(
    ('name', 'tiles'),
    [
        ('seq_id-1_frame-8', (960, 256)),
        ('seq_id-2_frame-8', (960, 256)),
        ('seq_id-3_frame-1', (960, 384)),
        ('seq_id-11_frame-1', (960, 384)),
    ],
)
def test_tiles_and_local_pooling_give_what_the_whole_image_gives(name: str, tiles: tuple[int, ...]) -> None:
    """On real images, with the weights that come with the package: issue 12's bounds for seams.

    The bound on the largest difference holds for tiles of 960 pixels and more, that on the mean for tiles of
    a window and more, and on some images for smaller ones.
    """
    file = Path(__file__).parents[3] / 'shared' / 'data' / 'gopro_blurred' / f'{name}.png'
    if not file.is_file():
        pytest.skip(f'the real image is not at {file}')
    image = np.asarray(Image.open(file)).astype(np.float32) / 255
    whole = Deblurrer(tlc=True, tile=None, precision='fp32').restore(image)
    assert np.abs(whole - image).mean() > 0.5 / 255  # the network does something
    for tile in tiles:
        tiled = Deblurrer(tlc=True, tile=tile, precision='fp32').restore(image)
        difference = np.abs(whole - tiled)
        assert 0 < difference.mean() < 1 / 255
        assert difference.max() < 4 / 255 or tile < 960


@pytest.mark.long
def test_tiles_of_a_synthetic_image_and_local_pooling_give_what_the_whole_image_gives() -> None:
    """Tiles in rows and columns: corners count, and windows come from above as well as from the left."""
    generator = np.random.default_rng(0)
    coarse, fine = (generator.random((side, side, 3), dtype=np.float32) for side in (40, 180))
    layers = [
        torch.nn.functional.interpolate(
            torch.from_numpy(layer).permute(2, 0, 1)[None], (1440, 1440), mode='bicubic'
        )
        for layer in (coarse, fine)
    ]
    image = (0.6 * layers[0] + 0.4 * layers[1]).clamp(0, 1)[0].permute(1, 2, 0).numpy()
    whole = Deblurrer(tlc=True, tile=None, precision='fp32').restore(image)
    assert np.abs(whole - image).mean() > 0.5 / 255
    deblurrer = Deblurrer(tlc=True, tile=1056, precision='fp32')
    difference = np.abs(whole - deblurrer.restore(image))
    assert deblurrer.report.tiles == 4
    assert 0 < difference.mean() < 0.1 / 255
    assert difference.max() < 4 / 255


@pytest.mark.parametrize(('tlc', 'overlap'), [(False, 64), (256, 256), (64, 64)])
def test_tiles_overlap_by_more_where_pooling_is_local(
    tlc: bool | int, overlap: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """So that a window which the end of a tile cuts keeps most of its pixels."""
    torch.save({'params': small('nafnet32').state_dict()}, tmp_path / 'net.pth')
    taken: list[int] = []

    def rows(call: Any, read: Any, size: Any, tile: Any, overlap: int, *others: Any) -> Iterator[Tensor]:
        taken.append(overlap)
        return iter(())

    monkeypatch.setattr(module, 'restore_rows', rows)
    deblurrer = Deblurrer(weights=tmp_path / 'net.pth', tile=1024, tlc=tlc)
    assert list(deblurrer.bands(lambda a, b: pixels(b - a, 2000, 3), (2000, 2000))) == []
    assert taken == [overlap]


@pytest.mark.parametrize(
    ('free', 'width'), [(0.7e9, 6000), (1.7e9, 16000), (4e9, 16000), (16e9, 16000), (16e9, 40000)]
)
def test_automatic_tiles_are_large_enough_for_seams(
    free: float, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No side is below 960 pixels, from which on the bounds for seams hold (docs/restoring.md)."""
    monkeypatch.setattr(restoring, 'free_memory', lambda device: free)
    deblurrer = Deblurrer(tlc=True, device='cpu', precision='fp32')
    high, wide = deblurrer._shape((12500, width), 'fp32')
    assert min(high, wide) >= 960
    rows, tile = high * width * module.BYTES_OF_A_BAND, high * wide * deblurrer.network.lean_memory(4)
    assert rows + tile <= 1.05 * (min(free / 2, restoring.MOST_MEMORY) + module.BAND_BYTES)


@pytest.mark.parametrize(('free', 'precision'), [(4.5e9, 'fp32'), (4e9, 'bf16')])
def test_an_image_of_12_megapixels_is_restored_whole(
    free: float, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restoring, 'free_memory', lambda device: free)
    for size in ((3000, 4000), (4000, 3000)):
        assert Deblurrer(device='cpu')._shape(size, precision) == size


def test_automatic_tiles_compute_few_pixels_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []

    class Counting(Darker):
        def forward(self, x: Tensor) -> Tensor:
            computed.append(x.shape[-2] * x.shape[-1])
            return super().forward(x)

    monkeypatch.setattr(module, 'automatic_tile', lambda *arguments: 400)
    image = pixels(420, 800, 3)
    assert np.abs(Deblurrer(Counting()).restore(image) - expected(image)).max() <= 1
    assert max(computed) <= 400**2
    assert sum(computed) <= 1.3 * 420 * 800  # tiles of 400×400 compute 2.8 times as many


def test_bands_of_an_image_that_is_read_row_by_row() -> None:
    image = pixels(300, 150, 3)
    deblurrer = Deblurrer(Darker(), tile=64)
    tops: list[int] = []

    def rows(top: int, bottom: int) -> NDArray[Any]:
        tops.append(top)
        return image[top:bottom]

    bands = list(deblurrer.bands(rows, (300, 150)))
    assert len(bands) > 3
    assert tops == sorted(tops)
    restored = np.concatenate(bands)
    assert restored.shape == image.shape
    assert np.abs(restored - expected(image)).max() <= 1


def test_tiles_show_no_seam() -> None:
    """Where no statistics of the whole image count, tiles equal the whole as far as the overlap reaches."""

    class Box(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.avg_pool2d(x, 9, 1, 4, count_include_pad=False)

    image = pixels(200, 230, 3)
    whole = Deblurrer(Box(), tile=None, precision='fp32').restore(image).astype(int)
    tiled = Deblurrer(Box(), tile=96, precision='fp32').restore(image).astype(int)
    assert np.abs(whole - tiled).max() <= 3
    assert np.abs(whole - tiled).mean() < 0.05


class TestGuard:
    class Broken(nn.Module):
        """Returns a block of something else in half precision, or always."""

        def __init__(self, value: float, always: bool) -> None:
            super().__init__()
            self.value, self.always = value, always

        def forward(self, x: Tensor) -> Tensor:
            y = x - 0.1
            if self.always or torch.is_autocast_enabled('cpu'):
                y[..., :, :40, :40] = self.value
            return y

    @pytest.mark.parametrize('value', [float('nan'), float('inf'), 5.0, -4.0])
    def test_what_breaks_in_half_precision_is_restored_in_float32(self, value: float) -> None:
        image = pixels(64, 64, 3)
        deblurrer = Deblurrer(self.Broken(value, False), precision='bf16')
        assert np.abs(deblurrer.restore(image) - expected(image)).max() <= 1
        assert 'again in float32' in deblurrer.report.notes[0]

    def test_what_is_never_finite_stays_as_it_was(self) -> None:
        image = pixels(64, 64, 3)
        deblurrer = Deblurrer(self.Broken(float('nan'), True))
        assert np.array_equal(deblurrer.restore(image), image)
        assert 'left as it was' in deblurrer.report.notes[0]

    def test_only_the_tile_that_broke_is_left(self) -> None:
        class Corner(Darker):
            def forward(self, x: Tensor) -> Tensor:
                y = super().forward(x)
                return y * float('nan') if x.max() > 0.95 else y

        image = pixels(64, 400, 3)
        image[:, :10] = 255
        restored = Deblurrer(Corner(), tile=64).restore(image)
        assert np.array_equal(restored[:, :40], image[:, :40])
        assert np.abs(restored[:, 80:] - expected(image)[:, 80:]).max() <= 1

    def test_ordinary_results_are_left_alone(self) -> None:
        """Also for a strong change: light that a long blur had spread comes back to its point."""

        class Sharpened(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return 4 * x - 3 * nn.functional.avg_pool2d(x, 31, 1, 15, count_include_pad=False)

        image = pixels(96, 96, 3)
        image[40:44, 20:80] = 255
        deblurrer = Deblurrer(Sharpened(), precision='fp32')
        deblurrer.restore(image)
        assert deblurrer.report.notes == []

    def test_local_pooling_that_breaks_is_switched_off_for_that_tile(self, tmp_path: Path) -> None:
        network: Any = small('nafnet32')
        for (
            parameter
        ) in network.ending.parameters():  # random weights would change colours by much themselves
            parameter.data *= 0.01
        torch.save({'params': network.state_dict()}, tmp_path / 'net.pth')
        image = pixels(64, 64, 3)
        plain = Deblurrer(weights=tmp_path / 'net.pth', tile=None, precision='fp32')
        local = Deblurrer(weights=tmp_path / 'net.pth', tile=None, precision='fp32', tlc=64)
        # The pooled network breaks; without pooling it is sound.
        local.network.register_forward_hook(lambda module, inputs, output: output * float('nan'))
        assert np.array_equal(local.restore(image), plain.restore(image))
        assert 'again without local pooling' in local.report.notes[0]


def test_the_zoo_s_networks(tmp_path: Path) -> None:
    """A checkpoint is enough; the result is that of the network itself."""
    network = small('dsgformer')
    torch.save({'params': network.state_dict()}, tmp_path / 'net.pth')
    image = pixels(33, 50, 3)
    deblurrer = Deblurrer(weights=str(tmp_path / 'net.pth'), precision='fp32')
    assert deblurrer.name == 'net.pth'
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    result = restore(network, tensor).clamp(0, 1)[0].permute(1, 2, 0) * 255
    assert np.abs(deblurrer.restore(image) - result.numpy()).max() <= 0.51
    with pytest.raises(UserError, match='nafnet32'):
        Deblurrer('nafnet32', weights=tmp_path / 'net.pth')


def test_halving_gives_the_same_image(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Scarce(Darker):
        def forward(self, x: Tensor) -> Tensor:
            sizes.append(max(x.shape[-2:]))
            if sizes[-1] > 128:
                raise torch.OutOfMemoryError('CUDA out of memory')
            return super().forward(x)

    image = pixels(200, 300, 3)
    deblurrer = Deblurrer(Scarce(), tile=None)
    assert np.abs(deblurrer.restore(image) - expected(image)).max() <= 1
    assert sizes[0] > 128
    assert len([size for size in sizes if size <= 128]) > 3


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'precision': 'int8'}, 'precision'),
        ({'tile': 3}, 'tile'),
        ({'tile': 'big'}, 'tile'),
        ({'strength': 1.5}, 'strength'),
        ({'device': 'gpu'}, 'no device'),
        ({'weights': 'x.pth'}, 'a network was given'),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Deblurrer(Darker(), **settings)


def test_a_missing_gpu_is_reported() -> None:
    if torch.cuda.is_available():
        pytest.skip('this machine has a GPU')
    with pytest.raises(UserError, match='no GPU'):
        Deblurrer(Darker(), device='cuda')


@pytest.mark.parametrize(
    'image',
    [
        np.zeros((3, 20, 30, 3, 1), np.uint8),
        np.zeros((20, 30, 5), np.uint8),
        np.zeros((0, 30, 3), np.uint8),
        np.zeros((20, 30), np.int64),
        np.full((20, 30), 2.0),
        np.full((20, 30), np.nan),
        torch.zeros(5, 20, 30),
        torch.zeros(20, 30),
        'photo.jpg',
    ],
)
def test_files_other_than_images_are_refused(image: Any) -> None:
    with pytest.raises(UserError):
        Deblurrer(Darker()).restore(image)


def test_no_weights_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv('DSGFORMER_HOME', str(tmp_path))
    monkeypatch.setattr(zoo, 'shipped', list)
    with pytest.raises(UserError, match=f'no weights of {weights.DEFAULT_MODEL}'):
        Deblurrer()
    with pytest.raises(UserError, match='dsgformer weights get restormer/motion'):
        Deblurrer('restormer')
    with pytest.raises(UserError, match='no weights of dsgformer_s'):
        Deblurrer('dsgformer_s')
    with pytest.raises(UserError, match='did you mean'):
        Deblurrer('restormr')
    with pytest.raises(UserError, match='no such file'):
        Deblurrer(weights='nowhere.pth')


def test_downloaded_official_weights_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv('DSGFORMER_HOME', str(tmp_path))
    entry = official_weights.find('nafnet32')
    path = official_weights.place(entry)
    path.parent.mkdir(parents=True)
    network = zoo.create('nafnet32')
    torch.save({'params': network.state_dict()}, path)
    for name in ('nafnet32', entry.key):
        deblurrer = Deblurrer(name)
        assert deblurrer.name == entry.key
        assert torch.equal(next(deblurrer.network.parameters()), next(network.parameters()))


def test_every_architecture_can_be_loaded_and_tiled(tmp_path: Path) -> None:
    image = pixels(70, 90, 3)
    for name in SMALL:
        if name in ('convir_s', 'ipt'):  # what leaves no trace in their weights differs in the small ones
            continue
        torch.save({'params': small(name).state_dict()}, tmp_path / f'{name}.pth')
        deblurrer = Deblurrer(weights=tmp_path / f'{name}.pth', tile=64, precision='fp32')
        assert deblurrer.restore(image).shape == image.shape
    assert {'dsgformer', 'restormer'} <= set(zoo.names())
