"""Containers with check sums, taken apart and put together again, so that mutations reach what is inside."""

from __future__ import annotations

import io
import random
import struct
import zipfile
import zlib
from collections.abc import Callable

Mutate = Callable[[bytes], bytes]

PNG_SIGNATURE = b'\x89PNG\r\n\x1a\n'


def mutate_png(data: bytes, rng: random.Random, mutate: Mutate) -> bytes:
    """Change the body of one chunk of a PNG, removing or repeating chunks now and then; CRCs are right."""
    chunks = _chunks(data)
    if not chunks:
        return mutate(data)
    at = rng.randrange(len(chunks))
    kind, body = chunks[at]
    action = rng.random()
    if action < 0.1:
        del chunks[at]
    elif action < 0.2:
        chunks.insert(rng.randrange(len(chunks) + 1), (kind, body))
    elif action < 0.4 and kind == b'IDAT':
        chunks[at] = kind, zlib.compress(mutate(_inflated(body)))
    else:
        chunks[at] = kind, mutate(body)
    return PNG_SIGNATURE + b''.join(_chunk(*each) for each in chunks)


def _chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    found, position = [], len(PNG_SIGNATURE)
    if not data.startswith(PNG_SIGNATURE):
        return []
    while position + 12 <= len(data):
        length, kind = struct.unpack_from('>I4s', data, position)
        found.append((kind, data[position + 8 : position + 8 + length]))
        position += 12 + length
    return found


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))


def _inflated(body: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(body, 1 << 20)
    except zlib.error:
        return body


def mutate_zip(data: bytes, rng: random.Random, mutate: Mutate) -> bytes:
    """Change one record of a zip archive, removing or renaming it now and then; CRCs are right."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = [(each.filename, archive.read(each)) for each in archive.infolist()]
    except Exception:  # whatever zipfile raises for an archive that an earlier mutation damaged
        return mutate(data)
    if not records:
        return mutate(data)
    # The pickle is what the reader interprets.
    pickles = [i for i, (name, _) in enumerate(records) if name.endswith('data.pkl')]
    at = rng.choice(pickles) if pickles and rng.random() < 0.7 else rng.randrange(len(records))
    name, body = records[at]
    action = rng.random()
    if action < 0.05:
        del records[at]
    elif action < 0.1:
        records.append((name, mutate(body)))
    elif action < 0.15:
        records[at] = mutate(name.encode()).decode('utf-8', 'replace')[:200], body
    else:
        records[at] = name, mutate(body)
    buffer = io.BytesIO()
    import warnings

    with warnings.catch_warnings(), zipfile.ZipFile(buffer, 'w') as archive:
        warnings.simplefilter('ignore')  # a name that stands twice is meant
        for name, body in records:
            archive.writestr(zipfile.ZipInfo(name or 'x'), body)
    return buffer.getvalue()


def mutate_safetensors(data: bytes, rng: random.Random, mutate: Mutate) -> bytes:
    """Change the header or the tensors of a safetensors file; the length of the header is right."""
    if len(data) < 8:
        return mutate(data)
    length = struct.unpack_from('<Q', data)[0]
    header, body = data[8 : 8 + length], data[8 + length :]
    if rng.random() < 0.8:
        header = mutate(header)
    else:
        body = mutate(body)
    return struct.pack('<Q', len(header)) + header + body
