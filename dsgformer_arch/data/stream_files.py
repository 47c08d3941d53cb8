"""Streams: image pairs in shards, in a folder or in an S3-compatible object store, as LitData writes them.

A stream is a LitData data set, that is `index.json` and shards `chunk-<tag>-<number>.bin`, and
`meta_info.txt` with the key and the size of each pair in the order of the shards.  An item has three leaves
of bytes: the pair's key, and the blurred and the sharp image as their files hold them.  `index.json` is
written last and lists every shard with its size and SHA-256, so a stream is whole or has no index.

A shard is, in little-endian uint32: the number of items n, n + 1 offsets, and the items; an item is the sizes
of its leaves, and the leaves (LitData 0.2.76: `streaming/writer.py`, `BinaryWriter._create_chunk`, and
`streaming/item_loader.py`, `PyTreeLoader.encode_data`).  It is read here and not by LitData, for two reasons.
A shard may come from a stranger: every offset is checked, and only bytes are read, where LitData also
unpickles what an index asks it to.  And samples are read in the order of `data/sampler.py`, whatever the
number of workers: LitData's `StreamingDataset` gives each worker shards of its own, and read by index it
either fetches each item by itself or drops a shard whenever another one is read.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import re
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, Field, ValidationError

from dsgformer_arch.data import meta_info
from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.files import write_atomically, write_bytes
from dsgformer_arch.utils.text import one_line

INDEX = 'index.json'
S3 = 's3://'
AGAIN = 'write the stream again with tools/create_stream.py'

MAX_INDEX_BYTES = 256 * 2**20
MAX_SHARD_BYTES = 2**32 - 1
"""Offsets in a shard have 32 bits."""

BUCKET = re.compile(r's3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(.*))?')


# --- the index ----------------------------------------------------------------------------------------------


class Shard(BaseModel):
    """An entry of `chunks` in `index.json`."""

    filename: Annotated[str, Field(pattern=r'^chunk-[0-9]{1,9}-[0-9]{1,9}\.bin$')]
    chunk_bytes: Annotated[int, Field(ge=1, le=MAX_SHARD_BYTES)]
    """Size of the file."""
    chunk_size: Annotated[int, Field(ge=1, le=2**28)]
    """Number of items."""
    sha256: Annotated[str, Field(pattern='^[0-9a-f]{64}$')]


class Config(BaseModel):
    """`config` in `index.json`: only what is read here is allowed."""

    data_format: tuple[Literal['bytes'], Literal['bytes'], Literal['bytes']]
    item_loader: Literal['PyTreeLoader']
    compression: None
    encryption: None


class Index(BaseModel):
    """`index.json`."""

    chunks: Annotated[list[Shard], Field(min_length=1, max_length=10**6)]
    config: Config
    meta_info_sha256: Annotated[str, Field(pattern='^[0-9a-f]{64}$')]
    made_from: dict[str, Any]
    """What `tools/create_stream.py` made it from."""

    @property
    def length(self) -> int:
        """Number of pairs."""
        return sum(shard.chunk_size for shard in self.chunks)


def parse_index(text: bytes, place: str) -> Index:
    """Check the content of `index.json`.

    Args:
        text: the content.
        place: the stream, for messages.

    Raises:
        UserError: it is damaged, or not an index that `tools/create_stream.py` wrote.
    """
    try:
        index = Index.model_validate_json(text)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ': '.join(str(part) for part in fault['loc'][:4])
        reason = f'{where}: {fault["msg"]}' if where else fault['msg']
        raise UserError(f'{place}/{INDEX} is damaged or of another kind ({reason}); {AGAIN}') from None
    if len({shard.filename for shard in index.chunks}) < len(index.chunks):
        raise UserError(f'{place}/{INDEX} is damaged (it lists a shard twice); {AGAIN}')
    return index


# --- where a stream is kept ---------------------------------------------------------------------------------


class Place(Protocol):
    """A folder or the prefix of a bucket, with a flat list of files."""

    address: str

    def read(self, name: str, most: int) -> bytes | None:
        """A file's content; None where there is no such file."""

    def size(self, name: str) -> int | None:
        """A file's size in bytes; None where there is no such file."""

    def write(self, name: str, content: bytes | Path) -> None:
        """Write or replace a file, whole or not at all; a `Path` is a file that is moved there."""

    def delete(self, name: str) -> None:
        """Remove a file, where there is one."""

    def names(self) -> list[str]:
        """All files."""


def place_of(address: str) -> Folder | Bucket:
    """The folder or the bucket of an address.

    Raises:
        UserError: the address is malformed, or S3 is asked for without LitData.
    """
    if address.startswith(S3):
        return Bucket(address)
    if '://' in address:
        raise UserError(f'{address} is neither a folder nor an address s3://bucket/prefix')
    return Folder(address)


class Folder:
    """A stream in a folder."""

    def __init__(self, address: str) -> None:
        self.path = Path(address).expanduser().absolute()
        self.address = str(self.path)

    def read(self, name: str, most: int) -> bytes | None:
        path = self.path / name
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode) or status.st_size > most:
                raise UserError(f'{path} is not an ordinary file of at most {most >> 20} MiB; {AGAIN}')
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise UserError(f'cannot read {path}: {error.strerror}') from None

    def size(self, name: str) -> int | None:
        try:
            return (self.path / name).stat().st_size
        except OSError:
            return None

    def write(self, name: str, content: bytes | Path) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):  # it was made below this folder
            write_atomically(lambda temporary: os.replace(content, temporary), path)
        else:
            write_bytes(content, path)

    def delete(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def names(self) -> list[str]:
        if not self.path.is_dir():
            return []
        files = (path for path in self.path.rglob('*') if path.is_file())
        return sorted(path.relative_to(self.path).as_posix() for path in files)


class Bucket:
    """A stream in an S3-compatible object store.

    Credentials, region and address are boto3's: `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`,
    `AWS_PROFILE`, a machine's role; `AWS_REGION`; `AWS_ENDPOINT_URL` for other stores than Amazon's.
    """

    def __init__(self, address: str) -> None:
        found = BUCKET.fullmatch(address)
        if found is None:
            raise UserError(f'{address} is not an address of the form s3://bucket/prefix')
        require_litdata(address)
        self.bucket = found[1]
        self.prefix = (found[2] or '').strip('/')
        self.address = f'{S3}{self.bucket}' + (f'/{self.prefix}' if self.prefix else '')

    def key(self, name: str) -> str:
        return f'{self.prefix}/{name}' if self.prefix else name

    def read(self, name: str, most: int) -> bytes | None:
        with self.reported_errors():
            try:
                found = client().get_object(Bucket=self.bucket, Key=self.key(name))
            except Exception as error:
                if _code(error) in ('NoSuchKey', '404'):
                    return None
                raise
            with contextlib.closing(found['Body']) as body:
                if found['ContentLength'] > most:
                    raise UserError(f'{self.address}/{name} has more than {most >> 20} MiB; {AGAIN}')
                content: bytes = body.read()
                return content

    def size(self, name: str) -> int | None:
        with self.reported_errors():
            try:
                return int(client().head_object(Bucket=self.bucket, Key=self.key(name))['ContentLength'])
            except Exception as error:
                if _code(error) in ('NoSuchKey', '404'):
                    return None
                raise

    def write(self, name: str, content: bytes | Path) -> None:
        with self.reported_errors():
            if isinstance(content, Path):
                client().upload_file(str(content), self.bucket, self.key(name))
                content.unlink()
            else:
                client().put_object(Bucket=self.bucket, Key=self.key(name), Body=content)

    def delete(self, name: str) -> None:
        with self.reported_errors():
            client().delete_object(Bucket=self.bucket, Key=self.key(name))

    def names(self) -> list[str]:
        start = self.key('')
        with self.reported_errors():
            pages = client().get_paginator('list_objects_v2').paginate(Bucket=self.bucket, Prefix=start)
            return [entry['Key'][len(start) :] for page in pages for entry in page.get('Contents', ())]

    def fetch(self, name: str, path: str) -> None:
        """Download a file with LitData, which reads its parts in parallel, into a file of that size.

        Raises:
            UserError: it cannot be downloaded.
        """
        with self.reported_errors(), open(path, 'r+b') as file:
            _downloader(self.address).download_fileobj(f'{self.address}/{name}', file)

    @contextlib.contextmanager
    def reported_errors(self) -> Iterator[None]:
        """Turn errors of the address, the credentials and the connection into a `UserError`."""
        from boto3.exceptions import Boto3Error
        from botocore import exceptions

        try:
            yield
        except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError):
            raise UserError(
                f'no credentials for {self.address} were found; set AWS_ACCESS_KEY_ID and '
                'AWS_SECRET_ACCESS_KEY, or AWS_PROFILE'
            ) from None
        except (exceptions.ConnectionError, exceptions.HTTPClientError) as error:
            raise UserError(
                f'{self.address} cannot be reached ({one_line(error)}); '
                'check the network and AWS_ENDPOINT_URL'
            ) from None
        except (exceptions.BotoCoreError, exceptions.ClientError, Boto3Error) as error:
            code = _code(error)
            if code == 'NoSuchBucket':
                reason = f'there is no bucket {self.bucket}; check the name and AWS_ENDPOINT_URL'
            elif code in ('403', 'AccessDenied', 'InvalidAccessKeyId', 'SignatureDoesNotMatch'):
                reason = f'access is denied ({code}); check the credentials and their rights'
            else:
                reason = one_line(error)
            raise UserError(f'{self.address}: {reason}') from None


def require_litdata(address: str) -> None:
    """Check that LitData is installed.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec('litdata') is None:
        raise UserError(
            f'{address} is read and written with LitData, which is missing; install it: pip install '
            "'dsgformer[stream]'"
        )


def _settings() -> Any:
    from botocore.config import Config

    # botocore's own limits, of minutes, would keep a run with a wrong address waiting.
    return Config(connect_timeout=10, read_timeout=60, retries={'total_max_attempts': 5, 'mode': 'standard'})


def client() -> Any:
    """boto3's client of this process: its connections do not survive a fork."""
    return _client(os.getpid(), os.environ.get('AWS_ENDPOINT_URL'))


@functools.lru_cache(maxsize=4)
def _client(process: int, endpoint: str | None) -> Any:
    import boto3

    return boto3.Session().client('s3', config=_settings())


@functools.lru_cache(maxsize=4)
def _downloader(address: str) -> Any:
    """LitData's downloader, whose client is one for each process."""
    from litdata.streaming.downloader import get_downloader

    return get_downloader(address, '', [], {'config': _settings()})


def _code(error: BaseException) -> str:
    response = getattr(error, 'response', None)
    return str(response.get('Error', {}).get('Code', '')) if isinstance(response, dict) else ''


# --- reading ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listing:
    """What a stream holds: its index, and the pairs in the order of its shards."""

    place: Folder | Bucket
    index: Index
    entries: list[meta_info.Entry]
    version: str
    """Digest of the address and the index."""


def open_stream(address: str) -> Listing:
    """Read and check the index of a stream and the list of its pairs; no shard is read.

    Raises:
        UserError: there is no stream, it is not finished, or its index or list is damaged.
    """
    place = place_of(address)
    if isinstance(place, Folder) and not place.path.is_dir():
        raise UserError(f'there is no folder {address}; tools/create_stream.py makes it')
    text = place.read(INDEX, MAX_INDEX_BYTES)
    if text is None:
        raise UserError(
            f'{place.address} holds no finished stream: it has no {INDEX}; run tools/create_stream.py'
        )
    index = parse_index(text, place.address)
    listing = place.read(meta_info.NAME, meta_info.MAX_BYTES)
    if listing is None or hashlib.sha256(listing).hexdigest() != index.meta_info_sha256:
        fault = 'is missing' if listing is None else f'does not belong to {INDEX}'
        raise UserError(f'{place.address}/{meta_info.NAME} {fault}; {AGAIN}')
    lines = listing.decode('utf-8', 'replace').splitlines()
    entries = list(meta_info.parse(lines, f'{place.address}/{meta_info.NAME}').values())
    if len(entries) != index.length:
        raise UserError(
            f'{place.address}: {INDEX} counts {index.length} pairs, but {meta_info.NAME} lists '
            f'{len(entries)}; {AGAIN}'
        )
    if isinstance(place, Folder):
        for shard in index.chunks:
            check_shard(place.address, shard, place.size(shard.filename))
    return Listing(place, index, entries, hashlib.sha256(place.address.encode() + b'\0' + text).hexdigest())


def check_shard(address: str, shard: Shard, size: int | None) -> None:
    """Refuse a shard of another size than the index says.

    Raises:
        UserError: it is missing, truncated or too large.
    """
    if size is None:
        raise UserError(f'{address} lacks the shard {shard.filename}; {AGAIN}')
    if size != shard.chunk_bytes:
        fault = 'is truncated' if size < shard.chunk_bytes else 'is too large'
        raise UserError(
            f'the shard {address}/{shard.filename} {fault}: it has {size} bytes instead of '
            f'{shard.chunk_bytes}; {AGAIN}'
        )


def read_item(descriptor: int, shard: Shard, number: int, place: str) -> tuple[bytes, bytes, bytes]:
    """Key, blurred image and sharp image of an item, as stored.

    Args:
        descriptor: the shard's file, open for reading.
        shard: its entry in the index.
        number: of the item within the shard.
        place: the stream, for messages.

    Raises:
        UserError: the shard is truncated or damaged.
    """
    damaged = UserError(f'the shard {place}/{shard.filename} is damaged or truncated; {AGAIN}')
    header = 4 * (shard.chunk_size + 2)
    head = os.pread(descriptor, 4, 0)
    offsets = os.pread(descriptor, 8, 4 * (number + 1))
    if len(head) < 4 or len(offsets) < 8 or struct.unpack('<I', head)[0] != shard.chunk_size:
        raise damaged
    start, end = struct.unpack('<II', offsets)
    if not header <= start <= end - 12 <= shard.chunk_bytes - 12:
        raise damaged
    item = os.pread(descriptor, end - start, start)
    if len(item) != end - start:
        raise damaged
    sizes = struct.unpack_from('<III', item)
    if 12 + sum(sizes) != len(item):
        raise damaged
    first, second = 12 + sizes[0], 12 + sizes[0] + sizes[1]
    return item[12:first], item[first:second], item[second:]
