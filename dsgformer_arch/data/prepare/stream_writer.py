"""Image pairs → a stream in shards, in a folder or in an S3-compatible object store.

Each split becomes a stream of its own (`data/stream_files.py`).  Which pairs are in which shard follows from
the sizes of their files, so a run that was interrupted is continued: for each shard that is written, a file
below `partial/` says what it holds and what it was made from.  `index.json` is written last.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

from dsgformer_arch.data import meta_info
from dsgformer_arch.data.prepare.layouts import Pair, Split
from dsgformer_arch.data.prepare.pair_files import (
    PNG_LEVEL,
    Prepared,
    fingerprint,
    in_order,
    in_words,
    load,
    prepare,
    raise_problems,
)
from dsgformer_arch.data.stream_cache import Shards
from dsgformer_arch.data.stream_files import (
    INDEX,
    MAX_INDEX_BYTES,
    MAX_SHARD_BYTES,
    S3,
    Bucket,
    Folder,
    Index,
    open_stream,
    parse_index,
    place_of,
    read_item,
    require_litdata,
)
from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.files import disk_is_full, locked, sha256
from dsgformer_arch.utils.progress import track

DONE = 'partial/{}.json'
STAGING = '.create_stream.shard.'
SHARD = re.compile(r'chunk-[0-9]+-[0-9]+\.bin')
OURS = re.compile(
    r'(index\.json|meta_info\.txt|chunk-[0-9]+-[0-9]+\.bin)(\..*)?|partial/.*|\.create_stream\..*'
)
MAX_DONE_BYTES = 64 * 2**20


def create_streams(
    splits: Sequence[Split],
    out: str,
    preset: str,
    shard_bytes: int,
    workers: int = 1,
    verify: bool = False,
    force: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Write a stream of each split: all of them or, where an image is wrong, none.

    An existing stream that was made from the same files with the same settings is kept.

    Args:
        splits: what to write, from `layouts`.
        out: a folder, or `s3://bucket/prefix`; the streams are `<out>/<split>`.
        preset: name of the layout; part of the record.
        shard_bytes: a shard ends before it has more bytes of images; a larger pair is a shard of its own.
        workers: threads that read and check images.
        verify: compare every stored image with its file afterwards.
        force: replace existing streams, whatever they were made from.
        say: takes one line on what was done.

    Raises:
        UserError: LitData is missing; images are unpaired, unreadable, damaged or of different sizes (all of
            them named); other streams exist there; another run is writing; the place cannot be written.
    """
    require_litdata(out)
    targets = [_Target(split, out, preset, shard_bytes) for split in splits]
    missing = [target for target in targets if force or not target.is_finished()]
    if not force:
        _refuse_to_replace(missing)
    _refuse_other_files(missing)
    problems = [problem for split in splits for problem in split.problems]
    problems += [problem for target in missing for problem in target.too_large()]
    with ExitStack() as stack:
        for target in missing:
            stack.enter_context(_alone(target))
        dry = Event()
        if problems:
            dry.set()
        with _reported_errors(out):
            for target in missing:
                problems += _write(target, workers, dry, say)
            if problems:
                for target in missing:
                    target.discard()
                raise_problems(problems, 'stream')
            for target in missing:
                target.publish()
    for target in missing:
        say(f'wrote {target.place.address}: {target.describe()}')
    for target in targets:
        if target not in missing:
            say(f'kept {target.place.address}, complete already: {target.describe()}')
    if verify:
        damaged = [problem for target in targets for problem in _verify(target)]
        if damaged:
            listed = '\n  '.join(damaged)
            raise UserError(
                f'streams in {out} are damaged; run again with --force to replace them:\n  {listed}'
            )
        say(f'verified {len(targets)} streams: every image is stored as its file holds it')


@dataclass(eq=False)
class _Target:
    """One stream: what it is made from, and where it goes."""

    split: Split
    out: str
    preset: str
    shard_bytes: int
    place: Folder | Bucket = field(init=False)
    shards: list[list[Pair]] = field(init=False)
    """The pairs of each shard."""
    made_from: dict[str, Any] = field(init=False)
    tag: int = field(init=False)
    """Part of the shards' names, so that other files' shards are never overwritten."""
    done: list[dict[str, Any]] = field(default_factory=list, init=False)
    """What the files below `partial/` say, for the shards that are written."""

    def __post_init__(self) -> None:
        self.place = place_of(f'{self.out.rstrip("/")}/{self.split.name}')
        digest, sizes = fingerprint(self.split)
        self.made_from = {
            'format': 1,
            'preset': self.preset,
            'split': self.split.name,
            'pairs': len(self.split.pairs),
            'files': digest,
            'bytes': sum(sizes.values()),
            'shard_bytes': self.shard_bytes,
        }
        text = json.dumps(self.made_from, sort_keys=True)
        self.tag = int(hashlib.sha256(text.encode()).hexdigest()[:7], 16)
        self.shards = []
        filled = 0
        for pair in self.split.pairs:
            size = _size(pair)
            if not self.shards or filled + size > self.shard_bytes:
                self.shards.append([])
                filled = 0
            self.shards[-1].append(pair)
            filled += size

    def too_large(self) -> list[str]:
        """The pairs that no shard can hold."""
        return [
            f'{pair.lq}: it and its partner have more than 4 GB, which no shard can hold'
            for pair in self.split.pairs
            if _size(pair) > MAX_SHARD_BYTES - 2**20
        ]

    def index(self) -> Index | None:
        """The index of the existing stream; None if there is none, or a damaged one."""
        text = self.place.read(INDEX, MAX_INDEX_BYTES)
        if text is None:
            return None
        with suppress(UserError):
            return parse_index(text, self.place.address)
        return None

    def is_finished(self) -> bool:
        """Whether the stream is complete and was made from the files as they are now."""
        index = self.index()
        return (
            index is not None
            and index.made_from == self.made_from
            and all(self.place.size(shard.filename) == shard.chunk_bytes for shard in index.chunks)
        )

    def take_over(self) -> None:
        """Find the shards that an interrupted run has written."""
        for number in range(len(self.shards)):
            text = self.place.read(DONE.format(number), MAX_DONE_BYTES)
            try:
                entry = json.loads(text or b'')
                whole = (
                    entry['made_from'] == self.made_from
                    and self.place.size(entry['chunk']['filename']) == entry['chunk']['chunk_bytes']
                )
            except (ValueError, KeyError, TypeError):
                whole = False
            if not whole:
                return
            self.done.append(entry)

    def store(self, number: int, images: list[Prepared]) -> None:
        """Write a shard, then the file that says that it is whole."""
        from litdata.streaming import Cache

        with self._staging() as folder:
            cache = Cache(str(folder), chunk_size=len(images), writer_chunk_index=number)
            lines = []
            for place, prepared in enumerate(images):
                (lq,), (gt,) = prepared.images['lq'], prepared.images['gt']
                # Bytes, since LitData takes text that names a file for that file.
                cache[place] = lq.key.encode('ascii'), lq.data, gt.data
                shape = gt.shape
                entry = meta_info.Entry(lq.key, shape.height, shape.width, shape.channels, PNG_LEVEL)
                lines.append(entry.line())
            cache.done()
            (record,) = folder.glob('*.index.json')
            written = json.loads(record.read_text('utf-8'))
            (chunk,) = written['chunks']
            file = folder / chunk['filename']
            chunk |= {'filename': f'chunk-{self.tag}-{number}.bin', 'sha256': sha256(file)}
            self.place.write(chunk['filename'], file)
        done = {'made_from': self.made_from, 'chunk': chunk, 'config': written['config'], 'lines': lines}
        self.place.write(DONE.format(number), json.dumps(done).encode())
        self.done.append(done)

    @contextmanager
    def _staging(self) -> Iterator[Path]:
        """A folder for one shard: on the disk of the stream, or anywhere for one in an object store."""
        local = isinstance(self.place, Folder)
        with tempfile.TemporaryDirectory(prefix=STAGING, dir=self.place.address if local else None) as name:
            yield Path(name)

    def publish(self) -> None:
        """Write the list of the pairs and, last, the index; then remove what is not the stream's."""
        listing = ''.join(line for done in self.done for line in done['lines']).encode()
        self.place.write(meta_info.NAME, listing)
        chunks = [done['chunk'] for done in self.done]
        config = self.done[0]['config'] | {'chunk_size': None, 'chunk_bytes': self.shard_bytes}
        index = {
            'chunks': chunks,
            'config': config,
            'meta_info_sha256': hashlib.sha256(listing).hexdigest(),
            'made_from': self.made_from,
        }
        self.place.write(INDEX, json.dumps(index).encode())
        self._remove({chunk['filename'] for chunk in chunks})

    def discard(self) -> None:
        """Remove what was written; an existing stream stays."""
        index = self.index()
        if index is not None or self.place.size(INDEX) is None:
            self._remove({shard.filename for shard in index.chunks} if index else set())
        if isinstance(self.place, Folder):
            with suppress(OSError):  # where it holds nothing else
                self.place.path.rmdir()

    def _remove(self, kept: set[str]) -> None:
        """Remove shards other than these, and what says which are written."""
        for name in self.place.names():
            if name.startswith('partial/') or (SHARD.fullmatch(name) and name not in kept):
                self.place.delete(name)
        if isinstance(self.place, Folder):
            for folder in self.place.path.glob(f'{STAGING}*/'):
                shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):
                (self.place.path / 'partial').rmdir()

    def describe(self) -> str:
        index = self.index()
        assert index is not None
        total = sum(shard.chunk_bytes for shard in index.chunks)
        return f'{index.length} pairs in {len(index.chunks)} shards, {in_words(total)}'


def _size(pair: Pair) -> int:
    total = 0
    for path in (pair.lq, pair.gt):
        with suppress(OSError):  # reading it will fail too, and say why
            total += path.stat().st_size
    return total


def _refuse_other_files(targets: Sequence[_Target]) -> None:
    for target in targets:
        other = next((name for name in target.place.names() if not OURS.fullmatch(name)), None)
        if other is not None:
            raise UserError(f'{target.place.address} holds other files, such as {other}; give another place')


def _refuse_to_replace(targets: Sequence[_Target]) -> None:
    standing = [target for target in targets if target.place.size(INDEX) is not None]
    if standing:
        names = ', '.join(target.place.address for target in standing)
        raise UserError(
            f'{names} holds a stream already, made from other files or otherwise, or not whole; give another '
            'place, or --force to replace'
        )


@contextmanager
def _alone(target: _Target) -> Iterator[None]:
    """Keep a second run out of a folder; an object store has no locks."""
    if not isinstance(target.place, Folder):
        yield
        return
    folder = target.place.path
    with ExitStack() as stack:
        with _reported_errors(target.out):
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder, folder))
        yield


@contextmanager
def _reported_errors(out: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if disk_is_full(error):
            where = f'the disk of {tempfile.gettempdir()}' if out.startswith(S3) else f'the disk of {out}'
            raise UserError(
                f'{where} is full; free some space and run the same command again: it continues with the '
                'missing shards'
            ) from None
        raise UserError(f'cannot write to {out} ({error.strerror}); give another place') from None


def _write(target: _Target, workers: int, dry: Event, say: Callable[[str], None]) -> list[str]:
    """Write the shards of a stream that are missing; return what is wrong with the images.

    From the first problem on, here or in an earlier stream, `dry` is set: the rest is checked, not written.
    """
    if not dry.is_set():
        target.take_over()
        if target.done:
            count = len(target.done)
            say(f'took over {count} shards of {target.place.address}, which an interrupted run had written')
    problems: list[str] = []
    skipped = len(target.done)
    pairs = [pair for shard in target.shards[skipped:] for pair in shard]
    what = f'{"checking" if dry.is_set() else "writing"} {target.split.name}'
    read = partial(prepare, crop=None, raw=False, dry=dry)
    waiting: list[Prepared] = []
    for prepared in track(in_order(read, pairs, workers), what, len(pairs), unit='pairs'):
        problems += prepared.problems
        if prepared.problems:
            dry.set()
        if dry.is_set():
            waiting.clear()
            continue
        waiting.append(prepared)
        number = len(target.done)
        if len(waiting) == len(target.shards[number]):
            target.store(number, waiting)
            waiting = []
    return problems


def _verify(target: _Target) -> list[str]:
    """Compare every stored image with its file; return what differs."""
    problems: list[str] = []
    address = target.place.address
    with tempfile.TemporaryDirectory() as folder:
        try:
            listing = open_stream(address)
            shards = Shards(listing, folder, limit=1, most_open=1)
            chunks = listing.index.chunks
            items = (
                (number, item) for number, chunk in enumerate(chunks) for item in range(chunk.chunk_size)
            )
            pairs = track(zip(target.split.pairs, items, strict=True), f'verifying {target.split.name}',
                          listing.index.length)  # fmt: skip
            for pair, (number, item) in pairs:
                key, lq, gt = read_item(shards.descriptor(number), chunks[number], item, address)
                files = [load(pair.key, path) for path in (pair.lq, pair.gt)]
                problems += [file for file in files if isinstance(file, str)]
                stored = [file.data for file in files if not isinstance(file, str)]
                if len(stored) == 2 and (key.decode('ascii', 'replace'), lq, gt) != (pair.key, *stored):
                    problems.append(f'{pair.lq}: it or its partner differs from what is stored of it')
        except UserError as error:
            problems.append(str(error))
    return problems
