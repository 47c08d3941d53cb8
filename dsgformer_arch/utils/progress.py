"""Progress for long work: a bar on a terminal, sparse lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TextIO, TypeVar

from tqdm import tqdm

T = TypeVar('T')


def track(
    items: Iterable[T],
    what: str,
    total: int | None = None,
    every: float = 10.0,
    stream: TextIO | None = None,
    unit: str = '',
) -> Iterator[T]:
    """Yield `items`, showing the progress and the remaining time.

    On a terminal this is a tqdm bar.  In a log file, where a bar would leave
    thousands of lines, it is one line at most every `every` seconds and one at
    the end.

    Args:
        items: the items of the work.
        what: a noun phrase for the work, such as `'validating'`.
        total: number of items, where `items` has no length.
        every: seconds between two lines off a terminal.
        stream: where to write; standard error by default.
        unit: name of the items, such as `'frames'`; lines then show the items per second.
    """
    stream = stream or sys.stderr
    if total is None and hasattr(items, '__len__'):
        total = len(items)  # type: ignore[arg-type]
    if stream.isatty():
        name = f' {unit}' if unit else 'it'
        yield from tqdm(items, desc=what, total=total, file=stream, dynamic_ncols=True, unit=name)
        return
    start = last = time.monotonic()
    done = 0
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= every and done != total:
            last = now
            seconds = (now - start) / done * (total - done) if total else None
            left = '' if seconds is None else f', {timedelta(seconds=round(seconds))} left'
            speed = f', {done / (now - start):.2f} {unit} a second' if unit else ''
            print(f'{what}: {done}/{total or "?"}{speed}{left}', file=stream, flush=True)
    took = timedelta(seconds=round(time.monotonic() - start))
    print(f'{what}: {done} done in {took}', file=stream, flush=True)


class Stages:
    """Progress through stages of unequal speed, each of which reports its own fraction.

    Args:
        what: a noun phrase for the work.
        count: number of stages.
        every: seconds between two lines off a terminal.
    """

    def __init__(self, what: str, count: int, every: float = 30.0) -> None:
        self.what = what
        self.count = count
        self.every = every
        self.done = 0
        self.begun = self.last = time.monotonic()
        self.bar = tqdm(total=count, desc=what, dynamic_ncols=True) if sys.stderr.isatty() and count else None

    def tick(self, fraction: float) -> None:
        """Report the finished fraction of the current stage, 0 to 1."""
        position = self.done + fraction
        if self.bar is not None:
            self.bar.n = round(position, 2)
            self.bar.refresh()
            return
        now = time.monotonic()
        if now - self.last >= self.every and position:
            self.last = now
            left = timedelta(seconds=round((now - self.begun) / position * (self.count - position)))
            print(f'{self.what}: {position:.1f}/{self.count}, {left} left', file=sys.stderr, flush=True)

    def next(self) -> None:
        """Report the end of the current stage."""
        self.done += 1
        self.tick(0.0)
        if self.done == self.count and self.bar is not None:
            self.bar.close()
