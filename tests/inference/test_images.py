"""Image files keep their format, depth and metadata; what cannot be restored is refused with a reason."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pyvips
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageCms
from PIL.TiffImagePlugin import IFDRational

from dsgformer_arch.inference import images as module
from dsgformer_arch.inference.images import (
    ImageError,
    ImageFile,
    Output,
    image_header,
    open_image,
    upright,
)

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()


def scene(height: int = 40, width: int = 56, channels: int = 3, dtype: Any = np.uint8) -> NDArray[Any]:
    """Smooth colours with an edge, so that JPEG changes them little."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [0.2 + 0.6 * y / height, 0.2 + 0.6 * x / width, np.where(x > width / 2, 0.7, 0.3), 0.5 + 0 * x]
    image = np.stack(planes[:channels] if channels != 2 else [planes[0], planes[3]], -1)
    most = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1
    return (image * most).astype(dtype)


def exif(orientation: int = 1) -> Image.Exif:
    data = Image.Exif()
    data[0x010F], data[0x0110], data[0x0112] = 'Maker', 'Model 1', orientation
    data.get_ifd(0x8769).update({0x829A: IFDRational(1, 50), 0x9003: '2026:11:21 10:00:00'})
    data.get_ifd(0x8825).update({1: 'N', 2: (41.0, 2.0, 3.0)})
    return data


def through(path: Path, target: Path | None = None, format: str | None = None) -> tuple[ImageFile, Output]:
    """Read a file and write the same pixels."""
    opened = open_image(path)
    target = target or path.with_name(f'out{path.suffix}')
    output = Output(opened, target, format or opened.format)
    for top in range(0, opened.size[0], 16):  # in several parts, with an overlap asked for again
        bottom = min(top + 16, opened.size[0])
        output.write(opened.rows(top, min(bottom + 8, opened.size[0]))[: bottom - top])
    output.finish()
    return opened, output


@pytest.mark.parametrize('channels', [1, 3, 4])
@pytest.mark.parametrize('suffix', ['.png', '.tif', '.bmp', '.webp'])
def test_eight_bits_come_back_exactly(tmp_path: Path, suffix: str, channels: int) -> None:
    if suffix == '.bmp' and channels == 4:
        pytest.skip('Pillow writes BMPs that hold no transparency')
    pixels = scene(channels=channels)
    path = tmp_path / f'in{suffix}'
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(path, lossless=True)
    opened, _ = through(path)
    expected = pixels
    if suffix == '.webp' and channels == 1:  # the format knows no grey
        expected = np.repeat(pixels, 3, -1)
    assert (opened.channels, opened.dtype) == (expected.shape[-1], np.uint8)
    result = open_image(tmp_path / f'out{suffix}')
    assert np.array_equal(result.rows(0, 40), expected)
    assert Image.open(tmp_path / f'out{suffix}').mode == Image.open(path).mode


@pytest.mark.parametrize('channels', [1, 2, 3, 4])
@pytest.mark.parametrize('suffix', ['.png', '.tif'])
def test_sixteen_bits_come_back_exactly(tmp_path: Path, suffix: str, channels: int) -> None:
    pixels = scene(channels=channels, dtype=np.uint16)
    path = tmp_path / f'in{suffix}'
    image = pyvips.Image.new_from_array(pixels).copy(interpretation='grey16' if channels <= 2 else 'rgb16')
    image.write_to_file(str(path))
    opened, _ = through(path)
    assert (opened.channels, opened.dtype) == (channels, np.uint16)
    written = pyvips.Image.new_from_file(str(tmp_path / f'out{suffix}'))
    assert written.format == 'ushort'
    assert np.array_equal(written.numpy().reshape(pixels.shape), pixels)


def test_float_tiff_comes_back_exactly(tmp_path: Path) -> None:
    pixels = scene(dtype=np.float32)
    tifffile.imwrite(tmp_path / 'in.tif', pixels, photometric='rgb')
    opened, _ = through(tmp_path / 'in.tif')
    assert opened.dtype == np.float32
    assert np.array_equal(tifffile.imread(tmp_path / 'out.tif'), pixels)


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
@pytest.mark.parametrize('suffix', ['.jpg', '.png', '.webp', '.tif'])
def test_exif_icc_and_resolution_are_carried_over(tmp_path: Path, suffix: str, dtype: Any) -> None:
    path = tmp_path / f'in{suffix}'
    if dtype == np.uint8:
        options: dict[str, Any] = {'dpi': (300, 300)} if suffix != '.webp' else {'lossless': True}
        written = path if suffix != '.tif' else tmp_path / 'in.jpg'  # Pillow writes no EXIF into TIFFs
        Image.fromarray(scene()).save(written, exif=exif(), icc_profile=SRGB, **options)
        if suffix == '.tif':
            through(written, path, 'TIFF')
    elif suffix == '.png':
        image = pyvips.Image.new_from_array(scene(dtype=np.uint16)).copy(
            interpretation='rgb16', xres=300 / 25.4
        )
        image.set_type(pyvips.GValue.blob_type, 'icc-profile-data', SRGB)
        image.set_type(pyvips.GValue.blob_type, 'exif-data', exif().tobytes())
        image.write_to_file(str(path))
    else:
        pytest.skip('has no 16 bits, or EXIF in TIFF is tested with 8')
    through(path)
    result = Image.open(tmp_path / f'out{suffix}')
    found = result.getexif()
    assert (found[0x010F], found[0x0110]) == ('Maker', 'Model 1')
    assert float(found.get_ifd(0x8769)[0x829A]) == pytest.approx(0.02)
    assert found.get_ifd(0x8769)[0x9003] == '2026:11:21 10:00:00'
    assert found.get_ifd(0x8825)[1] == 'N'
    assert [float(value) for value in found.get_ifd(0x8825)[2]] == [41.0, 2.0, 3.0]
    assert result.info['icc_profile'] == SRGB
    if suffix != '.webp':
        assert round(float(result.info['dpi'][0])) == 300


@pytest.mark.parametrize('large', ['the input', 'the image'])
def test_bigtiff_is_read_and_written(tmp_path: Path, large: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A BigTIFF stays one, and a large image becomes one; what the file carries comes along."""
    image = scene(dtype=np.uint16)
    Image.fromarray(scene()).save(tmp_path / 'in.jpg', exif=exif(), icc_profile=SRGB, dpi=(300, 300))
    opened = open_image(tmp_path / 'in.jpg')
    opened.dtype = np.dtype(np.uint16)
    with monkeypatch.context() as patch:
        if large == 'the input':
            patch.setattr(module, 'LARGE_TIFF', 0)
        output = Output(opened, tmp_path / 'in.tif', 'TIFF')
        output.write(image)
        output.finish()
    if large == 'the image':
        monkeypatch.setattr(module, 'LARGE_TIFF', 0)
    through(tmp_path / 'in.tif')
    for name in ('in.tif', 'out.tif')[large == 'the image' :]:
        path = tmp_path / name
        assert path.read_bytes()[:4] == b'II+\0'
        assert np.array_equal(tifffile.imread(path), image)
        with tifffile.TiffFile(path) as file:
            tags = file.pages[0].tags
            assert tags['ExifTag'].value['DateTimeOriginal'] == '2026:11:21 10:00:00'
            assert tags['GPSTag'].value['GPSLatitudeRef'] == 'N'
            assert (tags['Make'].value, tags['Model'].value) == ('Maker', 'Model 1')
            assert tags['InterColorProfile'].value == SRGB
            assert tags['XResolution'].value[0] / tags['XResolution'].value[1] == pytest.approx(300)
            assert tags['ExifTag'].value['ExposureTime'][0] / tags['ExifTag'].value['ExposureTime'][1] == 0.02


@pytest.mark.parametrize('suffix', ['.jpg', '.png', '.tif'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_orientation_is_applied(tmp_path: Path, suffix: str, orientation: int) -> None:
    stored = np.zeros((16, 24, 3), np.uint8)
    stored[:8, :8] = 255  # a white corner
    path = tmp_path / f'in{suffix}'
    Image.fromarray(stored).save(path, exif=exif(orientation))
    opened, _ = through(path)
    # The corner that is white when the image is upright, by the EXIF specification.
    corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    assert opened.size == ((16, 24) if orientation <= 4 else (24, 16))
    result = Image.open(tmp_path / f'out{suffix}')
    assert np.asarray(result)[corner[orientation]].min() > 200
    assert result.getexif().get(0x0112, 1) == 1
    assert result.getexif()[0x010F] == 'Maker'


def test_upright_changes_the_orientation_and_nothing_else() -> None:
    note = b'maker note with offsets of its own'
    data = bytearray(exif(6).tobytes() + note)
    changed = upright(bytes(data))
    before = data.removeprefix(b'Exif\0\0')
    differing = [i for i, (a, b) in enumerate(zip(before, changed, strict=True)) if a != b]
    assert len(differing) == 1
    assert changed[differing[0]] == 1
    assert changed.endswith(note)


@pytest.mark.parametrize('quality', [30, 75, 98])
@pytest.mark.parametrize('subsampling', [0, 2])
def test_jpeg_is_at_least_as_fine(tmp_path: Path, quality: int, subsampling: int) -> None:
    path = tmp_path / 'in.jpg'
    Image.fromarray(scene(64, 64)).save(path, quality=quality, subsampling=subsampling)
    through(path)
    before: Any = Image.open(path)
    after: Any = Image.open(tmp_path / 'out.jpg')
    for key, table in after.quantization.items():
        assert all(a <= b for a, b in zip(table, before.quantization[key], strict=True))
    from PIL import JpegImagePlugin

    assert JpegImagePlugin.get_sampling(after) == subsampling
    assert np.abs(np.asarray(after, int) - np.asarray(before, int)).mean() < 2


def test_grey_jpeg_stays_grey(tmp_path: Path) -> None:
    Image.fromarray(scene(channels=1)[..., 0]).save(tmp_path / 'in.jpg', quality=90)
    through(tmp_path / 'in.jpg')
    assert Image.open(tmp_path / 'out.jpg').mode == 'L'


def test_lossless_webp_stays_lossless_and_lossy_does_not_become_so(tmp_path: Path) -> None:
    for lossless, mark in ((True, b'VP8L'), (False, b'VP8 ')):
        Image.fromarray(scene()).save(tmp_path / 'in.webp', lossless=lossless)
        through(tmp_path / 'in.webp')
        assert mark in (tmp_path / 'out.webp').read_bytes()[:64]


def test_palette_and_transparency_become_plain(tmp_path: Path) -> None:
    image = Image.fromarray(scene()).quantize(8)
    image.save(tmp_path / 'in.png')
    assert open_image(tmp_path / 'in.png').channels == 3
    image.save(tmp_path / 'in.png', transparency=0)
    assert open_image(tmp_path / 'in.png').channels == 4
    Image.fromarray(scene()[..., 0]).save(tmp_path / 'in.png', transparency=51)
    assert open_image(tmp_path / 'in.png').channels == 2
    Image.fromarray(scene()[..., 0] > 100).save(tmp_path / 'in.png')
    opened = open_image(tmp_path / 'in.png')
    assert (opened.channels, opened.rows(0, 40).max()) == (1, 255)


@pytest.mark.parametrize('suffix', ['.jpg', '.tif'])
def test_cmyk_becomes_rgb_and_is_reported(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(scene()).convert('CMYK').save(tmp_path / f'in{suffix}')
    opened = open_image(tmp_path / f'in{suffix}')
    assert opened.channels == 3
    assert 'CMYK' in opened.notes[0]
    assert np.abs(opened.rows(0, 40).astype(int) - scene()).mean() < 40


def test_other_format_and_depth(tmp_path: Path) -> None:
    pixels = scene(channels=4, dtype=np.uint16)
    image = pyvips.Image.new_from_array(pixels).copy(interpretation='rgb16')
    image.write_to_file(str(tmp_path / 'in.tif'))
    _, output = through(tmp_path / 'in.tif', tmp_path / 'out.jpg', 'JPEG')
    assert any('8 bits' in note for note in output.notes)
    assert any('transparency' in note for note in output.notes)
    result = np.asarray(Image.open(tmp_path / 'out.jpg'), int)
    assert np.abs(result - np.rint(pixels[..., :3] / 257)).mean() < 3
    _, output = through(tmp_path / 'in.tif', tmp_path / 'out.png', 'PNG')
    assert output.notes == []
    assert np.array_equal(pyvips.Image.new_from_file(str(tmp_path / 'out.png')).numpy(), pixels)


@pytest.mark.parametrize('compressed', [True, False])
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize('channels', [1, 3, 4])
def test_tiffs_of_many_strips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, channels: int, dtype: Any, compressed: bool
) -> None:
    from dsgformer_arch.inference import images

    monkeypatch.setattr(images, 'STRIP', 1000)
    pixels = scene(channels=channels, dtype=dtype)
    tifffile.imwrite(
        tmp_path / 'in.tif', pixels, photometric='rgb' if channels > 2 else 'minisblack',
        compression='zlib' if compressed else None, planarconfig='contig' if channels > 1 else None,
    )  # fmt: skip
    through(tmp_path / 'in.tif')
    with tifffile.TiffFile(tmp_path / 'out.tif') as file:
        assert len(file.pages[0].dataoffsets) > 1
    result = open_image(tmp_path / 'out.tif')  # libvips
    assert np.array_equal(result.rows(0, 40), pixels)
    if dtype == np.uint8:
        mode = {1: 'L', 3: 'RGB', 4: 'RGBA'}[channels]
        image = Image.open(tmp_path / 'out.tif')
        assert image.mode == mode
        assert np.array_equal(np.asarray(image).reshape(pixels.shape), pixels)


def test_compression_of_tiff_is_kept_or_lossless(tmp_path: Path) -> None:
    for compression, compressed in ((None, False), ('tiff_lzw', True), ('jpeg', True)):
        Image.fromarray(scene(64, 64)).save(tmp_path / 'in.tif', compression=compression)
        through(tmp_path / 'in.tif')
        with tifffile.TiffFile(tmp_path / 'out.tif') as file:
            assert (file.pages[0].compression != 1) is compressed
        before = np.asarray(Image.open(tmp_path / 'in.tif'), int)
        assert np.abs(np.asarray(Image.open(tmp_path / 'out.tif'), int) - before).max() <= 2


def test_large_files_pass_through_a_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsgformer_arch.inference import images

    monkeypatch.setattr(images, 'IN_MEMORY', 1000)
    monkeypatch.setattr(images, 'STRIP', 7 * 500 * 3 * 2)
    for suffix in ('.tif', '.png'):
        pixels = scene(300, 500, 3, np.uint16)
        image = pyvips.Image.new_from_array(pixels).copy(interpretation='rgb16')
        image.write_to_file(str(tmp_path / f'in{suffix}'))
        through(tmp_path / f'in{suffix}')
        assert np.array_equal(pyvips.Image.new_from_file(str(tmp_path / f'out{suffix}')).numpy(), pixels)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['in.png', 'in.tif', 'out.png', 'out.tif']


def test_png_texts_are_carried_over(tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    texts = PngInfo()
    texts.add_text('Title', 'A street')
    texts.add_itxt('Author', 'Zoë')
    Image.fromarray(scene()).save(tmp_path / 'in.png', pnginfo=texts)
    through(tmp_path / 'in.png')
    image: Any = Image.open(tmp_path / 'out.png')
    assert image.text == {'Title': 'A street', 'Author': 'Zoë'}


def refusal(path: Path) -> str:
    with pytest.raises(ImageError) as caught:
        open_image(path).rows(0, 1)
    message = str(caught.value)
    assert path.name in message
    assert '\n' not in message
    return message


def test_files_other_than_images_are_refused(tmp_path: Path) -> None:
    path = tmp_path / 'a.png'
    assert 'no such file' in refusal(path)
    path.write_bytes(b'')
    assert 'empty' in refusal(path)
    path.write_text('some text')
    assert 'not an image' in refusal(path)
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + bytes(100))
    refusal(path)
    assert 'folder' in refusal(tmp_path)


@pytest.mark.parametrize('suffix', ['.jpg', '.png', '.webp', '.bmp', '.tif'])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f'a{suffix}'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(ImageError):
        open_image(path).rows(0, 64)


def test_a_truncated_16_bit_png_is_refused(tmp_path: Path) -> None:
    path = tmp_path / 'a.png'
    noise = np.random.default_rng(0).integers(0, 65536, (64, 64, 3), np.uint16)
    pyvips.Image.new_from_array(noise).copy(interpretation='rgb16').write_to_file(str(path))
    path.write_bytes(path.read_bytes()[:10000])
    with pytest.raises(ImageError, match=r'damaged|cannot be read'):
        open_image(path).rows(0, 64)


def test_what_cannot_be_restored_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / 'a.tif'
    frames = [Image.fromarray(scene()) for _ in range(3)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert '3 pages' in refusal(path)
    tifffile.imwrite(path, scene(dtype=np.float32) * 10, photometric='rgb')
    assert 'scale them to [0, 1]' in refusal(path)
    tifffile.imwrite(path, np.full((8, 8), np.nan, np.float32))
    assert 'floating-point' in refusal(path)
    tifffile.imwrite(path, np.zeros((8, 8, 6), np.uint8), photometric='minisblack', planarconfig='contig')
    assert '6 channels' in refusal(path)
    tifffile.imwrite(path, np.zeros((8, 8), np.uint32))
    assert 'uint' in refusal(path)
    path = tmp_path / 'a.webp'
    other = [Image.fromarray(scene() // (i + 1)) for i in range(3)]
    other[0].save(path, save_all=True, append_images=other[1:])
    assert 'animation' in refusal(path)


def wide_png(width: int, height: int) -> bytes:
    """A PNG whose header promises more than its few bytes of black pixels hold."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))

    header = struct.pack('>IIBBBBB', width, height, 8, 3, 0, 0, 0)
    parts = [(b'IHDR', header), (b'PLTE', bytes(3)), (b'IDAT', zlib.compress(bytes(1 << 16))), (b'IEND', b'')]
    return b'\x89PNG\r\n\x1a\n' + b''.join(chunk(*part) for part in parts)


@pytest.mark.parametrize('size', [(16_777_451, 9), (9, 2**31 - 1)])
def test_a_side_that_no_image_has_is_refused(size: tuple[int, int]) -> None:
    """Found by fuzzing: libvips keeps some dozens of rows, which took 855 MiB for a file of 844 bytes."""
    with pytest.raises(ImageError, match='at most 262144 pixels'):
        open_image(wide_png(*size))


def test_a_tiff_of_an_absurd_side_is_refused(tmp_path: Path) -> None:
    path = tmp_path / 'wide.tif'
    tifffile.imwrite(path, np.zeros((1, 2**18 + 1), np.uint16))
    with pytest.raises(ImageError, match='at most 262144 pixels'):
        open_image(path)


def test_a_header_that_promises_a_huge_image_is_refused(tmp_path: Path) -> None:
    """300,000 × 300,000 pixels in 70 bytes."""
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    header = struct.pack('>IIBBBBB', 300_000, 300_000, 8, 2, 0, 0, 0)
    path = tmp_path / 'a.png'
    path.write_bytes(
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', header)
        + chunk(b'IDAT', zlib.compress(b'\0'))
        + chunk(b'IEND', b'')
    )
    refusal(path)


def test_a_file_in_memory_is_read_like_one_on_disk(tmp_path: Path) -> None:
    for suffix, dtype in (('.jpg', np.uint8), ('.tif', np.uint16)):
        path = tmp_path / f'in{suffix}'
        if dtype == np.uint8:
            Image.fromarray(scene()).save(path)
        else:
            tifffile.imwrite(path, scene(dtype=np.uint16), photometric='rgb')
        opened = open_image(path.read_bytes())
        output = Output(opened, None, opened.format)
        output.write(opened.rows(0, 40))
        output.finish()
        through(path)
        assert output.content == (tmp_path / f'out{suffix}').read_bytes()


def test_nothing_is_left_of_a_file_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(scene()).save(tmp_path / 'in.png')
    opened = open_image(tmp_path / 'in.png')
    output = Output(opened, tmp_path / 'out.png', 'PNG')
    output.write(opened.rows(0, 40))

    def full(self: Any, stream: Any, *arguments: Any, **options: Any) -> None:
        Path(stream).write_bytes(b'half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(Image.Image, 'save', full)
    with pytest.raises(ImageError, match='no space left'):
        output.finish()
    assert [path.name for path in tmp_path.iterdir()] == ['in.png']


def test_pillow_reads_what_was_written(tmp_path: Path) -> None:
    """A 16-bit TIFF with EXIF opens in other readers too."""
    tifffile.imwrite(tmp_path / 'in.tif', scene(dtype=np.uint16)[..., 0])
    opened = open_image(tmp_path / 'in.tif')
    opened.metadata.exif = exif().tobytes().removeprefix(b'Exif\0\0')
    output = Output(opened, tmp_path / 'out.tif', 'TIFF')
    output.write(opened.rows(0, 40))
    output.finish()
    image = Image.open(io.BytesIO((tmp_path / 'out.tif').read_bytes()))
    assert np.array_equal(np.asarray(image), scene(dtype=np.uint16)[..., 0])
    assert image.getexif().get_ifd(0x8769)[0x9003] == '2026:11:21 10:00:00'


@pytest.mark.parametrize('suffix', ['.png', '.jpg', '.tif', '.webp', '.bmp'])
def test_the_header_identifies_format_and_size_of_what_cannot_be_decoded(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f'in{suffix}'
    Image.fromarray(scene(400, 560)).save(path)
    kind = open_image(path).format
    assert image_header(path) == (kind, (400, 560))
    if suffix not in ('.tif', '.webp'):  # whose header is at the end, or tells the length of the file
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert image_header(path) == (kind, (400, 560))
        with pytest.raises(ImageError):
            open_image(path).rows(0, 400)


def test_the_header_of_a_huge_image_is_read_at_once(tmp_path: Path) -> None:
    path = tmp_path / 'huge.png'
    Image.new('L', (1, 1)).save(path)
    content = bytearray(path.read_bytes())
    struct.pack_into('>II', content, 16, 2**31 - 1, 2**30)
    path.write_bytes(content)
    assert image_header(path) == ('PNG', (2**30, 2**31 - 1))


@pytest.mark.parametrize(
    ('content', 'sentence'),
    [
        (b'a text', 'it is not an image; JPEG, PNG, TIFF, WebP and BMP can be read'),
        (b'\xff\xd8\xff' + b'x' * 100, 'it begins like JPEG but is damaged'),
        (b'BM' + b'\xff' * 100, 'it begins like BMP but is damaged|it cannot be read'),
        (b'II*\0' + b'\xff' * 100, 'it cannot be read: '),
        (b'RIFF\0\0\0\0WEBPVP8 ', 'it begins like WEBP but is damaged|it cannot be read'),
    ],
)
def test_a_damaged_header_is_reported_in_one_sentence(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / 'in.png'
    path.write_bytes(content)
    with pytest.raises(ImageError, match=f'^({sentence})') as caught:
        image_header(path, 'it')
    assert '\n' not in str(caught.value)
    with pytest.raises(ImageError, match='there is no such file'):
        image_header(tmp_path / 'missing.png')


@pytest.mark.parametrize('side', [4000, 24_000])
def test_a_jpeg_of_too_few_bytes_for_its_pixels_is_refused(tmp_path: Path, side: int) -> None:
    """Found by fuzzing: 772 bytes that claimed 548 megapixels took 8 seconds."""
    path = tmp_path / 'a.jpg'
    Image.fromarray(scene()[:64, :64]).save(path, quality=10)
    data = path.read_bytes()
    frame = data.index(b'\xff\xc0')
    claimed = data[: frame + 5] + struct.pack('>HH', side, side) + data[frame + 9 :]
    for source in (claimed, path):
        path.write_bytes(claimed)
        with pytest.raises(
            ImageError, match=f'is truncated: it has {len(claimed)} bytes for {side}×{side} pixels'
        ):
            open_image(source)
    Image.new('RGB', (3000, 3000)).save(path, quality=1, optimize=True)  # the fewest bytes that there can be
    assert open_image(path).size == (3000, 3000)


def test_exif_that_cannot_be_written_again_is_left_away(tmp_path: Path) -> None:
    """Found by fuzzing: YPosition, a rational number, given as text ended in TypeError."""
    body = b'MM\0*' + struct.pack('>IHHHI4sI', 8, 1, 0x011F, 2, 4, b'abc\0', 0)
    chunk = struct.pack('>I', len(body)) + b'eXIf' + body + struct.pack('>I', zlib.crc32(b'eXIf' + body))
    path = tmp_path / 'a.png'
    Image.fromarray(scene()).save(path)
    data = path.read_bytes()
    assert open_image(data[:-12] + chunk + data[-12:]).metadata.exif is None


def test_exif_that_cannot_be_written_again_turns_the_image(tmp_path: Path) -> None:
    """Found by fuzzing: as above, with an orientation, ended in TypeError."""
    entries = struct.pack('>HHIHH', 0x0112, 3, 1, 6, 0) + struct.pack('>HHI4s', 0x011F, 2, 4, b'abc\0')
    body = b'MM\0*' + struct.pack('>IH', 8, 2) + entries + bytes(4)
    chunk = struct.pack('>I', len(body)) + b'eXIf' + body + struct.pack('>I', zlib.crc32(b'eXIf' + body))
    path = tmp_path / 'a.png'
    Image.fromarray(scene()).save(path)
    data = path.read_bytes()
    found = open_image(data[:-12] + chunk + data[-12:])
    assert found.metadata.exif is None
    np.testing.assert_array_equal(found.rows(0, found.size[0]), np.rot90(scene(), -1))
