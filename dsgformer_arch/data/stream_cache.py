"""Shards of a stream on the local disk: downloads, a bound on their size, and reading ahead.

All processes of a machine share one folder.  A shard is downloaded under a lock into a temporary file,
checked, and renamed; where that would exceed the bound, the shards that were opened longest ago are removed
first.  A process keeps the files open that it reads from, so a shard that another process removes can still
be read; it is downloaded again where it is needed later.
"""

from __future__ import annotations

import os
import queue
import random
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from dsgformer_arch.data.stream_files import AGAIN, Bucket, Folder, Listing, Shard, check_shard
from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.files import sha256

DEFAULT_FOLDER = '~/.cache/dsgformer/streams'
GIGABYTE = 10**9


class Shards:
    """Open files of a stream's shards.

    Args:
        listing: the stream.
        folder: where downloaded shards are kept; not used for a stream in a folder.
        limit: most bytes of all downloaded shards in `folder`, whichever stream they belong to.
        most_open: files that are kept open.
    """

    def __init__(self, listing: Listing, folder: str, limit: int, most_open: int) -> None:
        self.listing = listing
        self.remote = isinstance(listing.place, Bucket)
        self.root = Path(folder).expanduser().absolute()
        self.folder = self.root / listing.version[:32] if self.remote else Path(listing.place.address)
        self.limit = limit
        self.most_open = most_open
        self._forget()

    def _forget(self) -> None:
        self._process = os.getpid()
        self._open: OrderedDict[int, int] = OrderedDict()
        self._ahead: ReadAhead | None = None

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in vars(self).items() if key not in ('_open', '_ahead')}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._forget()

    def __del__(self) -> None:
        if getattr(self, '_process', None) == os.getpid():
            for descriptor in self._open.values():
                os.close(descriptor)

    def descriptor(self, number: int) -> int:
        """The file of a shard, open for reading; downloaded if the cache lacks it.

        Raises:
            UserError: it is missing, truncated or damaged, or cannot be downloaded.
        """
        if self._process != os.getpid():
            self._forget()  # a loader worker; the thread that reads ahead did not come with it
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        shard = self.listing.index.chunks[number]
        while True:
            with _random_kept():
                path = self.fetch(shard) if self.remote else self.folder / shard.filename
            try:
                descriptor = os.open(path, os.O_RDONLY)
                break
            except FileNotFoundError:
                if not self.remote:
                    check_shard(self.listing.place.address, shard, None)
            except OSError as error:
                raise UserError(f'cannot read {path}: {error.strerror}') from None
        try:
            check_shard(str(self.folder), shard, os.fstat(descriptor).st_size)
        except UserError:
            os.close(descriptor)
            raise
        self._close_some()
        self._open[number] = descriptor
        return descriptor

    def _close_some(self) -> None:
        """Close removed shards, which take space until then, and the least recently used ones."""
        for number, descriptor in list(self._open.items()):
            if len(self._open) >= self.most_open or os.fstat(descriptor).st_nlink == 0:
                os.close(self._open.pop(number))

    def fetch(self, shard: Shard, wait: bool = True) -> Path:
        """Download a shard, unless the cache has it.

        Args:
            shard: the shard.
            wait: whether to wait for another process that is downloading it.

        Raises:
            UserError: it cannot be downloaded, is damaged, or the disk is full.
            Timeout: another process is downloading it, and `wait` is not set.
        """
        place, path = self.listing.place, self.folder / shard.filename
        assert not isinstance(place, Folder)
        if _touched(path):
            return path
        temporary = f'{path}.part'
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(f'{path}.lock', timeout=-1 if wait else 0):
                if _touched(path):
                    return path
                try:
                    check_shard(place.address, shard, place.size(shard.filename))
                    self.make_room(shard, path)
                    place.fetch(shard.filename, temporary)
                    if sha256(temporary) != shard.sha256:
                        raise UserError(
                            f'the shard {place.address}/{shard.filename} is damaged: its SHA-256 is not the '
                            f"index's; {AGAIN}"
                        )
                    os.replace(temporary, path)
                finally:
                    Path(temporary).unlink(missing_ok=True)
        except OSError as error:
            if isinstance(error, Timeout):
                raise
            raise UserError(
                f'cannot write to the cache {self.folder} ({error.strerror}); free some space, lower '
                'max_cache_size or set cache_dir to another folder'
            ) from None
        return path

    def make_room(self, shard: Shard, path: Path) -> None:
        """Remove the shards that were opened longest ago until this one fits.

        A sparse file reserves the space, so that concurrent downloads count each other.
        """
        with FileLock(self.root / 'lock'):
            kept = []
            total = shard.chunk_bytes
            for found in self.root.glob('*/chunk-*.bin*'):
                if found.suffix in ('.bin', '.part') and found != path.with_name(f'{path.name}.part'):
                    try:
                        status = found.stat()
                    except FileNotFoundError:
                        continue
                    total += status.st_size
                    kept.append((status.st_mtime_ns, found, status.st_size))
            for _, found, size in sorted(kept):
                if total <= self.limit:
                    break
                if _removed(found):
                    total -= size
            with open(f'{path}.part', 'wb') as file:
                file.truncate(shard.chunk_bytes)

    def expect(self, numbers: Iterable[int]) -> None:
        """Download shards in the background that will be needed soon."""
        if not self.remote:
            return
        if self._process != os.getpid():
            self._forget()
        if self._ahead is None:
            self._ahead = ReadAhead(self)
        self._ahead.want(numbers)


class ReadAhead:
    """A thread that downloads shards before they are needed.

    Errors are not reported here: reading the shard raises them again.
    """

    def __init__(self, shards: Shards) -> None:
        self.shards = shards
        self.wanted: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.last: tuple[int, ...] = ()
        threading.Thread(target=self.run, daemon=True, name='read-ahead').start()

    def want(self, numbers: Iterable[int]) -> None:
        """Ask for shards; the ones of the call before are not asked for again."""
        numbers = tuple(numbers)
        for number in numbers:
            if number not in self.last:
                self.wanted.put(number)
        self.last = numbers

    def run(self) -> None:
        while True:
            shard = self.shards.listing.index.chunks[self.wanted.get()]
            try:
                self.shards.fetch(shard, wait=False)
            except (UserError, Timeout, RuntimeError):  # RuntimeError: the interpreter is shutting down
                continue


@contextmanager
def _random_kept() -> Iterator[None]:
    """Leave the module `random` as it was: boto3 and LitData draw from it."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


def _touched(path: Path) -> bool:
    """Set the time at which a shard was opened last; False if there is no such file."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _removed(path: Path) -> bool:
    """Remove a shard, or what a killed process left of one; not what another process is downloading."""
    if path.suffix == '.part':
        try:
            with FileLock(path.with_suffix('.lock'), timeout=0):
                path.unlink(missing_ok=True)
        except Timeout:
            return False
    else:
        path.unlink(missing_ok=True)
    return True
