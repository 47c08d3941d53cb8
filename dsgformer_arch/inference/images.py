"""Image files: reading with metadata, and writing in the format and encoding of the input.

Pillow reads and writes 8-bit files (JPEG, PNG, WebP, BMP).  libvips reads TIFF and 16-bit PNG row by row, so
that an image need not fit into memory.  tifffile writes TIFF.  The orientation is applied; EXIF, ICC profile,
XMP and resolution are kept.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, JpegImagePlugin, TiffImagePlugin

from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.files import write_atomically
from dsgformer_arch.utils.text import one_line

Pixels = NDArray[Any]
"""(H, W, C), C of 1 (grey), 2 (grey, alpha), 3 (RGB), 4 (RGB, alpha); uint8, uint16, float32 in [0, 1]."""

FORMATS = {
    '.jpg': 'JPEG', '.jpeg': 'JPEG', '.jpe': 'JPEG', '.jfif': 'JPEG', '.png': 'PNG', '.tif': 'TIFF',
    '.tiff': 'TIFF', '.webp': 'WEBP', '.bmp': 'BMP',
}  # fmt: skip
"""Suffixes of image files, and their formats."""

BITS = {'JPEG': 8, 'PNG': 16, 'TIFF': 32, 'WEBP': 8, 'BMP': 8}
"""The most bits per channel that a format is written with."""

JPEG_QUALITY = 92
"""JPEGs are written with quantisation tables no coarser than those of this quality, nor than the input's."""

LOSSY_QUALITY = 95
"""Quality of JPEG and lossy WebP files whose input had another format."""

ZLIB_LEVEL = 3
"""zlib's level for PNG and TIFF: half the time of the default 6, for files a few per cent larger."""

STRIP = 1 << 20
"""Bytes of a strip of a TIFF, before compression."""

IN_MEMORY = 32 << 20
"""Larger TIFFs, in bytes of pixels, and PNGs of 16 bits wait in a temporary file until they are encoded."""

LARGE_TIFF = 3_900_000_000
"""Bytes of decoded pixels above which a TIFF is written as BigTIFF; a BigTIFF stays one."""

JPEG_PIXELS_PER_BYTE = 4096
"""More than any JPEG has: a block of 8×8 pixels takes at least one bit, which makes 512; arithmetic coding,
which hardly anybody uses, may take less."""
MAX_SIDE = 1 << 18
"""Pixels of the longest side that is read: libvips buffers dozens of rows, whatever their length."""

LARGE = 100_000_000
"""Pixels above which an 8-bit PNG is read row by row by libvips too."""

ORIENTATION, EXIF_IFD, GPS_IFD = 0x0112, 0x8769, 0x8825
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image of each orientation upright (Exif 2.32, section 4.6)."""


class ImageError(UserError):
    """A file that cannot be read or written as an image."""


@dataclass
class Metadata:
    """The metadata of an image file.

    Attributes:
        exif: as in JPEG, without the prefix `Exif`; its orientation is 1 (upright).
        icc: colour profile.
        xmp: XMP packet.
        dpi: pixels per inch, across and down.
        text: text chunks of a PNG.
    """

    exif: bytes | None = None
    icc: bytes | None = None
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None
    text: dict[str, str] = field(default_factory=dict)


@dataclass
class ImageFile:
    """An open image file.

    Attributes:
        name: the file's name, for messages.
        format: `'JPEG'`, `'PNG'`, `'TIFF'`, `'WEBP'` or `'BMP'`.
        size: height and width, after the orientation was applied.
        channels: 1 to 4, see `Pixels`.
        dtype: uint8, uint16 or float32.
        rows: `rows(top, bottom)` returns these rows as `Pixels`; `top` must not decrease between calls.
        metadata: kept in the result.
        settings: how the file is encoded, so that the result is encoded likewise; keys as in `_save`.
        notes: conversions that were made, as sentences.
    """

    name: str
    format: str
    size: tuple[int, int]
    channels: int
    dtype: np.dtype[Any]
    rows: Callable[[int, int], Pixels]
    metadata: Metadata
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Bytes of the decoded pixels."""
        return self.size[0] * self.size[1] * self.channels * self.dtype.itemsize


def open_image(source: str | os.PathLike[str] | bytes, name: str | None = None) -> ImageFile:
    """Open an image file.

    Args:
        source: a path, or the content of a file.
        name: the name in messages; the path by default.

    Raises:
        ImageError: the file is missing, damaged, not an image, or cannot be restored (several pages, other
            channels, values outside [0, 1]); the message says which.
    """
    name = name or ('the input' if isinstance(source, bytes) else os.fspath(source))
    with _reading(name):
        head = source[:64] if isinstance(source, bytes) else _head(source)
        kind = _format(head, name)
        if kind == 'PNG':
            width, height = struct.unpack('>II', head[16:24])
            _check_sides(name, width, height)
            if head[24] == 16 or width * height > LARGE:
                return _open_vips(source, name, kind)
        if kind == 'TIFF':
            return _open_vips(source, name, kind)
        return _open_pillow(source, name, kind)


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn what decoders raise into `ImageError`s."""
    try:
        yield
    except FileNotFoundError:
        raise ImageError(f'{name}: there is no such file') from None
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, IndexError) as error:
        raise ImageError(f'{name} cannot be read: {one_line(error)}') from None


def _format(head: bytes, name: str) -> str:
    kind = sniff(head)
    if kind is None:
        raise ImageError(f'{name} is not an image; JPEG, PNG, TIFF, WebP and BMP can be read')
    return kind


def sniff(head: bytes) -> str | None:
    """The format of a file by its first 26 bytes or more; None for an unknown one."""
    if head.startswith(b'\xff\xd8\xff'):
        return 'JPEG'
    if head.startswith(b'\x89PNG\r\n\x1a\n') and len(head) >= 26:
        return 'PNG'
    if head[:4] in (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+'):
        return 'TIFF'
    if head[:4] == b'RIFF' and head[8:12] == b'WEBP':
        return 'WEBP'
    return 'BMP' if head.startswith(b'BM') else None


def image_header(path: str | os.PathLike[str], name: str | None = None) -> tuple[str, tuple[int, int]]:
    """Format and size of an image file from its header; no pixel is decoded.

    Args:
        path: the file.
        name: the name in messages; the path by default.

    Returns:
        The format as in `ImageFile`, and (height, width) as stored: the orientation is not applied.

    Raises:
        ImageError: the file is missing, not an image, or its header is damaged.
    """
    name = name or os.fspath(path)
    with _reading(name):
        head = _head(path)
        kind = _format(head, name)
        if kind == 'PNG':
            width, height = struct.unpack('>II', head[16:24])
            return kind, (int(height), int(width))
        if kind == 'TIFF':
            import pyvips

            try:
                image = pyvips.Image.new_from_file(os.fspath(path), access='sequential')
            except pyvips.Error as error:
                raise ImageError(f'{name} cannot be read: {one_line(error)}') from None
            return kind, (image.height, image.width)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', Image.DecompressionBombWarning)
            try:
                with Image.open(path, formats=[kind]) as opened:
                    return kind, (opened.height, opened.width)
            except Image.UnidentifiedImageError:
                raise ImageError(f'{name} begins like {kind} but is damaged') from None
            except Image.DecompressionBombError as error:
                raise ImageError(f'{name} is too large: {one_line(error)}') from None


class Output:
    """An image file that is written row by row, and atomically by `finish`.

    Args:
        source: the input, for metadata and encoding.
        path: the path of the file; None to keep it in `content`.
        format: as in `ImageFile`.

    Attributes:
        content: the encoded file, where there is no path.
        notes: properties that the format cannot hold, as sentences.
    """

    def __init__(self, source: ImageFile, path: str | os.PathLike[str] | None, format: str) -> None:
        self.source, self.format = source, format
        self.path = None if path is None else os.fspath(path)
        self.content = b''
        self.notes: list[str] = []
        self._rows: list[Pixels] = []
        self._file: Any = None
        bits = source.dtype.itemsize * 8
        self.dtype = source.dtype
        if bits > BITS[format]:
            self.dtype = np.dtype(np.uint8 if BITS[format] == 8 else np.uint16)
            self.notes.append(
                f'{format} has no {bits}-bit channels: written with {self.dtype.itemsize * 8} bits'
            )
        self.channels = source.channels
        if source.channels in (2, 4) and format in ('JPEG', 'BMP'):
            self.channels -= 1
            self.notes.append(f'{format} has no transparency: alpha was dropped')
        if source.bytes > IN_MEMORY and self._streams:
            folder = os.path.dirname(self.path) if self.path else None
            self._file = tempfile.NamedTemporaryFile(dir=folder or None)  # noqa: SIM115 (closed by `close`)

    @property
    def _streams(self) -> bool:
        return self.format == 'TIFF' or (self.format == 'PNG' and self.dtype == np.uint16)

    def write(self, rows: Pixels) -> None:
        """Append rows (n, W, C) with the channels and type of the input."""
        rows = _converted(rows[..., : self.channels], self.dtype)
        if self._file is not None:
            self._file.write(np.ascontiguousarray(rows).data)
        else:
            self._rows.append(rows)

    def finish(self) -> None:
        """Encode and write the file.

        Raises:
            ImageError: it cannot be written; no partial file is left.
        """
        try:
            if self.path is None:
                with tempfile.TemporaryDirectory() as folder:
                    temporary = os.path.join(folder, 'image')
                    self._encode(temporary)
                    self.content = Path(temporary).read_bytes()
            else:
                write_atomically(self._encode, self.path)
        except (OSError, ValueError) as error:
            raise ImageError(f'{self.path or "the output"} cannot be written: {one_line(error)}') from None
        finally:
            self.close()

    def close(self) -> None:
        """Discard the rows written so far."""
        self._rows.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _encode(self, path: str) -> None:
        if self.format == 'TIFF':
            self._write_tiff(path)
        elif self._streams:
            self._write_vips_png(path)
        else:
            pixels = np.concatenate(self._rows) if len(self._rows) != 1 else self._rows[0]
            self._rows.clear()
            _save(pixels, path, self.format, self.source)

    def _strips(self, height: int) -> Iterator[Pixels]:
        """The rows written so far, in strips of `height` rows."""
        rows, width = self.source.size
        if self._file is None:
            pixels = np.concatenate(self._rows)
            yield from (pixels[top : top + height] for top in range(0, rows, height))
            return
        self._file.seek(0)
        for top in range(0, rows, height):
            count = min(height, rows - top)
            data = self._file.read(count * width * self.channels * self.dtype.itemsize)
            yield np.frombuffer(data, self.dtype).reshape(count, width, self.channels)

    def _write_tiff(self, path: str) -> None:
        import tifffile

        (height, width), metadata = self.source.size, self.source.metadata
        strip = max(1, STRIP // (width * self.channels * self.dtype.itemsize))
        grey, alpha = self.channels <= 2, self.channels in (2, 4)
        plain: dict[str, Any] = {} if self.channels == 1 else {'planarconfig': 'contig'}
        if alpha:
            plain['extrasamples'] = [self.source.settings.get('alpha', 2)]
        compressed = self.source.settings.get('compressed', True)
        if compressed:
            plain['compression'] = 'zlib'
            if self.dtype.kind == 'u':
                plain['predictor'] = 2
        exif = _exif(metadata.exif)
        # Placeholders for the pointers to the EXIF directories, which are appended below.  tifffile does not
        # write the tags of these pointers, so the placeholders have the tags before.
        directories = {tag: exif.get_ifd(tag) for tag in (EXIF_IFD, GPS_IFD)}
        directories = {tag: entries for tag, entries in directories.items() if entries}
        extra: list[tuple[Any, ...]] = [(tag - 1, 'I', 1, 0, True) for tag in directories]
        extra += [
            (tag, 's', 0, str(exif[tag]), True)
            for tag in (0x010E, 0x010F, 0x0110, 0x0132, 0x013B, 0x8298)
            if isinstance(exif.get(tag), str)
        ]
        if metadata.icc:
            extra.append((34675, 'B', len(metadata.icc), metadata.icc, True))
        if metadata.xmp:
            extra.append((700, 'B', len(metadata.xmp), metadata.xmp, True))
        large = self.source.settings.get('large', False) or self.source.bytes > LARGE_TIFF
        with tifffile.TiffWriter(path, bigtiff=large, byteorder='<') as writer:
            writer.write(
                (_encoded(part, compressed) for part in self._strips(strip)),
                shape=(height, width) if self.channels == 1 else (height, width, self.channels),
                dtype=self.dtype,
                photometric='minisblack' if grey else 'rgb',
                rowsperstrip=strip,
                resolution=metadata.dpi,
                resolutionunit='INCH' if metadata.dpi else None,
                extratags=extra,
                software=str(exif.get(0x0131, '')) or False,
                metadata=None,
                **plain,
            )
        if directories:
            _append_directories(path, directories)

    def _write_vips_png(self, path: str) -> None:
        import pyvips

        (height, width), metadata = self.source.size, self.source.metadata
        if self._file is None:
            pixels = np.concatenate(self._rows)
            image = pyvips.Image.new_from_memory(
                np.ascontiguousarray(pixels).data, width, height, self.channels, 'ushort'
            )
        else:
            self._file.flush()
            image = pyvips.Image.rawload(self._file.name, width, height, 2 * self.channels)
            image = image.copy(format='ushort', bands=self.channels)
        image = image.copy(interpretation='grey16' if self.channels <= 2 else 'rgb16')
        if metadata.dpi:
            image = image.copy(xres=metadata.dpi[0] / 25.4, yres=metadata.dpi[1] / 25.4)
        blobs = {'icc-profile-data': metadata.icc, 'xmp-data': metadata.xmp}
        if metadata.exif:
            blobs['exif-data'] = b'Exif\0\0' + metadata.exif
        for name, blob in blobs.items():
            if blob:
                image.set_type(pyvips.GValue.blob_type, name, blob)
        try:
            image.pngsave(path, compression=ZLIB_LEVEL, bitdepth=16)
        except pyvips.Error as error:
            raise ImageError(f'{self.path} cannot be written: {one_line(error)}') from None


def _encoded(strip: Pixels, compressed: bool) -> bytes:
    """A strip as TIFF stores it: as it is, or deflated, with differences between neighbours for integers."""
    strip = np.ascontiguousarray(strip, strip.dtype.newbyteorder('<'))
    if not compressed:
        return strip.tobytes()
    if strip.dtype.kind == 'u':
        strip = np.concatenate([strip[:, :1], strip[:, 1:] - strip[:, :-1]], axis=1)  # modulo 2^bits
    return zlib.compress(strip.tobytes(), ZLIB_LEVEL)


def _converted(rows: Pixels, dtype: np.dtype[Any]) -> Pixels:
    """Rows in another type; black and white stay what they are."""
    if rows.dtype == dtype:
        return rows
    most = [float(np.iinfo(kind).max) if kind.kind == 'u' else 1.0 for kind in (rows.dtype, dtype)]
    scaled = rows.astype(np.float32) * np.float32(most[1] / most[0])
    return (np.rint(scaled) if dtype.kind == 'u' else scaled).astype(dtype)


def _head(path: str | os.PathLike[str]) -> bytes:
    if os.path.isdir(path):
        raise ImageError(f'{os.fspath(path)} is a folder')
    with open(path, 'rb') as file:
        head = file.read(64)
    if not head:
        raise ImageError(f'{os.fspath(path)} is empty')
    return head


def _check_sides(name: str, width: int, height: int) -> None:
    if max(width, height) > MAX_SIDE:
        raise ImageError(
            f'{name} is {width}×{height}; sides of at most {MAX_SIDE} pixels are read: cut it into parts'
        )


def _check_jpeg_bytes(source: Any, name: str, width: int, height: int) -> None:
    """Refuse a JPEG of too few bytes for its pixels: decoders fill what is missing with grey, for seconds."""
    length = len(source) if isinstance(source, bytes) else os.path.getsize(source)
    if width * height > JPEG_PIXELS_PER_BYTE * length:
        raise ImageError(f'{name} is truncated: it has {length} bytes for {width}×{height} pixels')


# Pillow


def _open_pillow(source: Any, name: str, kind: str) -> ImageFile:
    stream = io.BytesIO(source) if isinstance(source, bytes) else source
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', Image.DecompressionBombWarning)  # the size is looked at below
        try:
            image = Image.open(stream, formats=['JPEG', 'PNG', 'WEBP', 'BMP'])
        except Image.DecompressionBombError:
            return _open_vips(source, name, kind)
        except Image.UnidentifiedImageError:
            raise ImageError(f'{name} begins like {kind} but is damaged') from None
    frames = getattr(image, 'n_frames', 1)
    if kind in ('PNG', 'WEBP') and frames > 1:
        raise ImageError(f'{name} is an animation of {frames} frames; save its frames as separate files')
    settings: dict[str, Any] = {}
    if kind == 'JPEG':
        _check_jpeg_bytes(source, name, *image.size)
        settings = {
            'tables': {key: list(table) for key, table in image.quantization.items()},  # type: ignore[attr-defined]
            'subsampling': JpegImagePlugin.get_sampling(image),
            'progressive': bool(image.info.get('progressive')),
            'comment': image.info.get('comment'),
        }
    elif kind == 'WEBP':
        settings = {'lossless': _webp_is_lossless(source)}
    notes: list[str] = []
    metadata = _metadata(image)
    try:
        image.load()
    except Image.DecompressionBombError as error:
        raise ImageError(f'{name}: {error}') from None
    pixels = np.asarray(_plain_mode(_turned(image), metadata, notes))
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    return ImageFile(
        name, kind, (pixels.shape[0], pixels.shape[1]), pixels.shape[2], pixels.dtype,
        lambda top, bottom: pixels[top:bottom], metadata, settings, notes,
    )  # fmt: skip


def _turned(image: Image.Image) -> Image.Image:
    """The image upright, by its EXIF data, which Pillow's `exif_transpose` would write again and fail at."""
    method = TURNS.get(image.getexif().get(ORIENTATION, 1))
    return image.copy() if method is None else image.transpose(method)  # a copy has a palette in any case


def _plain_mode(image: Image.Image, metadata: Metadata, notes: list[str]) -> Image.Image:
    """L, LA, RGB or RGBA."""
    if image.mode in ('CMYK', 'YCCK'):
        notes.append('converted from CMYK to sRGB')
        profile, metadata.icc = metadata.icc, None
        if profile:
            with contextlib.suppress(ImageCms.PyCMSError, OSError):
                converted = ImageCms.profileToProfile(
                    image, ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile('sRGB'),
                    outputMode='RGB',
                )  # fmt: skip
                if converted is not None:
                    return converted
        return image.convert('RGB')
    if image.mode in ('L', 'LA', 'RGB', 'RGBA') and 'transparency' not in image.info:
        return image
    if image.mode in ('1', 'L'):
        return image.convert('LA' if image.has_transparency_data else 'L')
    return image.convert('RGBA' if image.has_transparency_data else 'RGB')


def _metadata(image: Image.Image) -> Metadata:
    info = image.info
    exif = info.get('exif')
    if exif is None and (parsed := image.getexif()):
        with contextlib.suppress(TypeError, ValueError, KeyError, struct.error):  # damaged: not carried over
            exif = parsed.tobytes()
    dpi = info.get('dpi')
    text = getattr(image, 'text', None) or {}
    return Metadata(
        upright(exif) if exif else None,
        info.get('icc_profile'),
        info.get('xmp') or None,
        (float(dpi[0]), float(dpi[1])) if dpi and all(0 < float(value) < 1e6 for value in dpi) else None,
        {key: str(value) for key, value in text.items() if not key.lower().startswith('raw profile')},
    )


def upright(exif: bytes) -> bytes:
    """EXIF data with the orientation set to 1 (upright); every other byte is kept, maker notes too.

    Args:
        exif: with or without the prefix `Exif`; returned without.
    """
    data = bytearray(exif.removeprefix(b'Exif\0\0'))
    if data[:2] not in (b'II', b'MM') or len(data) < 8:
        return bytes(data)
    order = '<' if data[:2] == b'II' else '>'
    start = struct.unpack_from(f'{order}I', data, 4)[0]
    if start + 2 > len(data):
        return bytes(data)
    for i in range(struct.unpack_from(f'{order}H', data, start)[0]):
        entry = start + 2 + 12 * i
        if entry + 12 > len(data):
            break
        if struct.unpack_from(f'{order}H', data, entry)[0] == ORIENTATION:
            struct.pack_into(f'{order}HIHH', data, entry + 2, 3, 1, 1, 0)
    return bytes(data)


def _webp_is_lossless(source: Any) -> bool:
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    position = 12
    while position + 8 <= len(data):
        kind, size = data[position : position + 4], struct.unpack_from('<I', data, position + 4)[0]
        if kind in (b'VP8 ', b'VP8L'):
            return kind == b'VP8L'
        position += 8 + size + size % 2
    return False


def _save(pixels: Pixels, path: str, format: str, source: ImageFile) -> None:
    """Write 8-bit pixels with Pillow."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    metadata, settings = source.metadata, source.settings
    options: dict[str, Any] = {'icc_profile': metadata.icc, 'dpi': metadata.dpi}
    if metadata.exif:
        options['exif'] = b'Exif\0\0' + metadata.exif
    if format == 'JPEG':
        options |= jpeg_options(settings) if 'tables' in settings else {
            'quality': LOSSY_QUALITY, 'subsampling': 0
        }  # fmt: skip
        options['xmp'] = metadata.xmp
    elif format == 'WEBP':
        lossless = settings.get('lossless', source.format in ('PNG', 'BMP', 'TIFF'))
        options |= {'lossless': lossless, 'quality': 75 if lossless else LOSSY_QUALITY, 'exact': True}
        options['xmp'] = metadata.xmp
    elif format == 'PNG':
        from PIL.PngImagePlugin import PngInfo

        texts = PngInfo()
        for key, value in metadata.text.items():
            texts.add_itxt(key, value) if not value.isascii() else texts.add_text(key, value)
        if metadata.xmp and 'XML:com.adobe.xmp' not in metadata.text:
            texts.add_itxt('XML:com.adobe.xmp', metadata.xmp.decode('utf-8', 'replace'))
        options |= {'pnginfo': texts, 'compress_level': ZLIB_LEVEL}
    image.save(path, format, **{key: value for key, value in options.items() if value is not None})


def jpeg_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Pillow's options for a JPEG of at least the quality of the input.

    Args:
        settings: those of the input, see `ImageFile`.
    """
    tables = []
    for i, (_, given) in enumerate(sorted(settings['tables'].items())):
        fine = _tables(JPEG_QUALITY)[min(i, 1)]
        tables.append([min(a, b) for a, b in zip(given, fine, strict=True)])
    options: dict[str, Any] = {'qtables': tables[:2] if len(tables) > 1 else [tables[0], tables[0]]}
    options['subsampling'] = max(settings['subsampling'], 0)  # -1: grey, or an unnamed layout
    options['progressive'] = settings['progressive']
    if settings['comment']:
        options['comment'] = settings['comment']
    return options


def _tables(quality: int) -> list[list[int]]:
    """libjpeg's quantisation tables of a quality: luminance and chrominance."""
    buffer = io.BytesIO()
    Image.new('RGB', (8, 8)).save(buffer, 'JPEG', quality=quality)
    image: Any = Image.open(buffer)
    return [list(image.quantization[i]) for i in (0, 1)]


# libvips


def _open_vips(source: Any, name: str, kind: str) -> ImageFile:
    import pyvips

    try:
        return _opened_vips(pyvips, source, name, kind)
    except pyvips.Error as error:
        raise ImageError(f'{name} cannot be read: {one_line(error)}') from None


def _opened_vips(pyvips: Any, source: Any, name: str, kind: str) -> ImageFile:
    def load(access: str) -> Any:
        options = {'access': access, 'fail_on': 'error'}
        if isinstance(source, bytes):
            return pyvips.Image.new_from_buffer(source, '', **options)
        return pyvips.Image.new_from_file(os.fspath(source), **options)

    image = load('sequential')
    _check_sides(name, image.width, image.height)
    if kind == 'JPEG':
        _check_jpeg_bytes(source, name, image.width, image.height)
    fields = set(image.get_fields())
    if kind == 'TIFF' and 'n-pages' in fields and image.get('n-pages') > 1:
        raise ImageError(f'{name} has {image.get("n-pages")} pages; save them as separate files')
    metadata = Metadata()
    settings: dict[str, Any] = {}
    notes: list[str] = []
    if kind == 'TIFF':
        metadata, settings = _tiff_metadata(source, name)
    else:
        exif = image.get('exif-data') if 'exif-data' in fields else None
        metadata.exif = upright(bytes(exif)) if exif else None
    for key, attribute in (('icc-profile-data', 'icc'), ('xmp-data', 'xmp')):
        if key in fields:
            setattr(metadata, attribute, bytes(image.get(key)))
    if 'resolution-unit' in fields or image.xres != 1:
        metadata.dpi = (image.xres * 25.4, image.yres * 25.4)
    if 'orientation' in fields and image.get('orientation') != 1:
        image = load('random').autorot()  # rows of the result are columns of the file
    if image.interpretation == 'cmyk':
        notes.append('converted from CMYK to sRGB')
        if metadata.icc:
            image = image.icc_transform('srgb', embedded=True)
        else:
            image = image.colourspace('srgb')
        metadata.icc = None
    dtype = {'uchar': np.uint8, 'ushort': np.uint16, 'float': np.float32, 'double': np.float32}.get(
        image.format
    )
    if dtype is None or image.bands > 4 or image.interpretation in ('lab', 'xyz', 'labs'):
        raise ImageError(
            f'{name} has {image.bands} channels of {image.format} ({image.interpretation}); grey and RGB '
            'images of 8 or 16 bits, or floating point in [0, 1], can be restored'
        )
    if dtype == np.float32:
        try:
            least, most = load('sequential').min(), load('sequential').max()
        except pyvips.Error:  # all values are NaN
            least = most = float('nan')
        if not (least >= 0 and most <= 1):
            raise ImageError(
                f'{name} has floating-point values from {least:g} to {most:g}; scale them to [0, 1]'
            )
        image = image.cast('float')
    return ImageFile(
        name, kind, (image.height, image.width), image.bands, np.dtype(dtype),
        _Rows(pyvips, image, np.dtype(dtype), name), metadata, settings, notes,
    )  # fmt: skip


class _Rows:
    """Sequential access to rows of a libvips image; rows from the last `top` on are buffered."""

    def __init__(self, pyvips: Any, image: Any, dtype: np.dtype[Any], name: str) -> None:
        self.error, self.image, self.dtype, self.name = pyvips.Error, image, dtype, name
        self.region = pyvips.Region.new(image)
        self.top = 0
        self.kept = np.empty((0, image.width, image.bands), dtype)
        self.row_bytes = image.width * image.bands * dtype.itemsize

    def __call__(self, top: int, bottom: int) -> Pixels:
        """Rows `top` to `bottom`; `top` never decreases."""
        self.kept = self.kept[max(0, top - self.top) :]
        self.top = max(self.top, top)
        have = self.top + len(self.kept)
        parts = [self.kept]
        while have < bottom:
            # libvips decodes in strips of about this height.
            count = max(1, min(256, bottom - have, IN_MEMORY // self.row_bytes))
            try:
                data = self.region.fetch(0, have, self.image.width, count)
            except self.error as error:
                raise ImageError(f'{self.name} is damaged: {one_line(error)}') from None
            rows = np.frombuffer(data, self.dtype).reshape(count, self.image.width, self.image.bands)
            parts.append(rows)
            have += count
        self.kept = np.concatenate(parts) if len(parts) > 1 else self.kept
        return self.kept[: bottom - self.top]


# TIFF's directories


def _tiff_metadata(source: Any, name: str) -> tuple[Metadata, dict[str, Any]]:
    """Metadata that libvips does not read: descriptions, EXIF, and the compression."""
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, 'rb') as file:
        head = file.read(16)
        large = head[2:3] in (b'+',) or head[3:4] == b'+'
        head = head if large else head[:8]
        try:
            first = _directory(file, head, None)
            entries = {tag: _directory(file, head, first[tag]) for tag in (EXIF_IFD, GPS_IFD) if tag in first}
        except (SyntaxError, struct.error, KeyError, ValueError, TypeError) as error:
            raise ImageError(f'{name} is damaged: {one_line(error)}') from None
    exif = Image.Exif()
    for tag in (0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x8298):
        if isinstance(first.get(tag), str):
            exif[tag] = first[tag]
    for tag, directory in entries.items():
        exif.get_ifd(tag).update({key: value for key, value in directory.items() if key != 0x927C})
    settings = {'compressed': first.get(259, 1) != 1, 'large': large}
    if first.get(338):
        extra = first[338]
        settings['alpha'] = int(extra[0] if isinstance(extra, tuple) else extra)
    data = exif.tobytes() if len(exif) or entries else b''
    return Metadata(exif=data.removeprefix(b'Exif\0\0') or None), settings


def _directory(file: BinaryIO, head: bytes, offset: int | None) -> dict[int, Any]:
    """A directory of a TIFF file: the first, or the one at `offset`."""
    directory = TiffImagePlugin.ImageFileDirectory_v2(head)
    file.seek(directory.next if offset is None else offset)
    directory.load(file)
    found = {}
    for tag in directory:
        with contextlib.suppress(Exception):  # a tag that cannot be read is not carried over
            found[tag] = directory[tag]
    return found


def _exif(data: bytes | None) -> Image.Exif:
    exif = Image.Exif()
    if data:
        with contextlib.suppress(SyntaxError, struct.error, OSError, ValueError):
            exif.load(b'Exif\0\0' + data)
    return exif


def _append_directories(path: str, directories: Mapping[int, Mapping[int, Any]]) -> None:
    """Append EXIF directories to a little-endian TIFF that has an entry `tag - 1` for each of them."""
    with open(path, 'r+b') as file:
        large = file.read(4)[2:3] == b'+'
        # Where the first directory is written, and its number of entries; an entry; a pointer as entry.
        start_at, number, size, pointer = (8, '<Q', 20, '<HHQQ') if large else (4, '<H', 12, '<HHII')
        offset = '<Q' if large else '<I'
        file.seek(start_at)
        start = struct.unpack(offset, file.read(struct.calcsize(offset)))[0]
        file.seek(start)
        count = struct.unpack(number, file.read(struct.calcsize(number)))[0]
        places = {}
        for i in range(count):
            tag = struct.unpack('<H', file.read(size)[:2])[0]
            places[tag] = start + struct.calcsize(number) + size * i
        for tag, entries in directories.items():
            head = b'II+\0\x08\0\0\0' + bytes(8) if large else b'II*\0' + bytes(4)
            directory = TiffImagePlugin.ImageFileDirectory_v2(head, group=tag)
            for key, value in entries.items():
                with contextlib.suppress(Exception):
                    directory[key] = value
            end = file.seek(0, os.SEEK_END)
            end += file.write(b'\0' * (end % 2))
            data = directory.tobytes(end)
            if struct.unpack_from(number, data)[0] != len(directory):
                return  # older versions of Pillow cannot write directories of BigTIFF
            file.write(data)
            file.seek(places[tag - 1])
            kind = 16 if large else 4  # LONG8 or LONG: Pillow does not read IFD8
            file.write(struct.pack(pointer, tag, kind, 1, end))
