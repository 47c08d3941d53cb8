"""The bounded queue of page and API; one image is restored at a time."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dsgformer_arch.inference.images import ImageError, Output, image_header, open_image
from dsgformer_arch.inference.weights import DEFAULT_MODEL
from dsgformer_arch.utils.errors import UserError

if TYPE_CHECKING:
    from dsgformer_arch.inference.deblurrer import Deblurrer

SUFFIXES = {'JPEG': '.jpg', 'PNG': '.png', 'TIFF': '.tif', 'WEBP': '.webp', 'BMP': '.bmp'}
"""Suffixes of results by format."""


class TooLargeError(UserError):
    """A file with more bytes, or an image with more pixels, than the limits allow."""


class BusyError(UserError):
    """The queue is full, or memory is short."""


class AbandonedError(UserError):
    """The job was abandoned by its client."""


class StoppedError(UserError):
    """The server is shutting down."""


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Attributes:
        most_bytes: largest size of an uploaded file.
        most_pixels: most pixels of an image.
        most_waiting: most images that wait while another one is restored.
    """

    most_bytes: int = 50_000_000
    most_pixels: int = 50_000_000
    most_waiting: int = 20


@dataclass(frozen=True)
class Settings:
    """How one image is restored; `model` is a key of the service's restorers, the rest as in `Deblurrer`."""

    model: str
    strength: float = 1.0
    tile: int | str = 'auto'
    precision: str = 'auto'


@dataclass
class Result:
    """A restored image.

    Attributes:
        path: the file.
        format: `'JPEG'`, `'PNG'`, `'TIFF'`, `'WEBP'` or `'BMP'`; that of the input.
        size: height and width, upright.
        seconds: for decoding, restoring and encoding.
        notes: sentences about what did not go as asked.
    """

    path: Path
    format: str
    size: tuple[int, int]
    seconds: float
    notes: list[str]


@dataclass(eq=False)
class Job:
    """One image in the queue.

    Attributes:
        source, target: the files to read and to write.
        name: name of the image in messages.
        settings: how to restore it.
        done: the future `Result`; raises `UserError` where the image cannot be restored, `AbandonedError`
            after `abandon`.
        fraction: restored fraction of the image, 0 to 1.
    """

    source: Path
    target: Path
    name: str
    settings: Settings
    done: Future[Result] = field(default_factory=Future)
    fraction: float = 0.0
    abandoned: bool = False


class RestorationService:
    """Restores images one after another in a background thread.

    Args:
        restorers: constructor of the `Deblurrer` of each model, the default model first; called at the first
            use of the model, or by `load`.
        limits: see `Limits`.
    """

    def __init__(self, restorers: Mapping[str, Callable[[], Deblurrer]], limits: Limits) -> None:
        self.limits = limits
        self._makers = dict(restorers)
        self._restorers: dict[str, Deblurrer] = {}
        self._waiting: deque[Job] = deque()
        self._current: Job | None = None
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name='restoration', daemon=True)
        self._thread.start()

    @property
    def models(self) -> list[str]:
        """Names of the models, the default model first."""
        return list(self._makers)

    def load(self, model: str) -> Deblurrer:
        """The restorer of a model, constructed at the first call.

        Not thread-safe: the thread of the service calls it too, so it must not be called while jobs run.

        Raises:
            UserError: its weights cannot be loaded.
        """
        if model not in self._restorers:
            self._restorers[model] = self._makers[model]()
        return self._restorers[model]

    def check(self, path: str | os.PathLike[str], name: str) -> tuple[str, tuple[int, int]]:
        """Format and (height, width) of an uploaded file, by its header.

        Raises:
            TooLargeError: more bytes or pixels than the limits.
            ImageError: no image.
        """
        size = os.path.getsize(path)
        if size > self.limits.most_bytes:
            raise TooLargeError(too_many_bytes(name, self.limits))
        if size == 0:
            raise ImageError(f'{name} is empty')
        kind, (height, width) = image_header(path, name)
        if height * width > self.limits.most_pixels:
            raise TooLargeError(
                f'{name} has {width}×{height} pixels; this server takes at most '
                f'{self.limits.most_pixels / 1e6:g} megapixels'
            )
        return kind, (height, width)

    def submit(self, source: Path, target: Path, name: str, settings: Settings) -> Job:
        """Put an image in the queue.

        Args:
            source: the image; it must exist until the job is done.
            target: the path of the result, which has the format of the input.
            name: name of the image in messages.
            settings: how to restore it.

        Raises:
            UserError: unknown model.
            TooLargeError, ImageError: see `check`.
            BusyError: the queue is full.
            StoppedError: the server is shutting down.
        """
        if settings.model not in self._makers:
            raise UserError(
                f'there is no model {settings.model!r} on this server; choose one of {", ".join(self.models)}'
            )
        self.check(source, name)
        job = Job(source, target, name, settings)
        with self._changed:
            if self._stopped:
                raise StoppedError('the server is shutting down')
            self._refuse_if_full()
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    def refuse_if_full(self) -> None:
        """Raise `BusyError` if the queue is full."""
        with self._changed:
            self._refuse_if_full()

    def _refuse_if_full(self) -> None:
        waiting = len(self._waiting) + (self._current is not None)
        if waiting > self.limits.most_waiting:
            raise BusyError(
                f'the queue is full: {self.limits.most_waiting} images wait already; try again in a moment'
            )

    def ahead(self, job: Job) -> int:
        """The number of images before a job; 0 once it has started."""
        with self._changed:
            if job not in self._waiting:
                return 0
            return self._waiting.index(job) + (self._current is not None)

    def abandon(self, job: Job) -> None:
        """Cancel a job: remove it from the queue, or stop it at its next tile."""
        with self._changed:
            job.abandoned = True
            if job in self._waiting:
                self._waiting.remove(job)
                job.done.set_exception(AbandonedError(f'{job.name} was dropped'))

    def stop(self) -> None:
        """Shut down: waiting jobs get `StoppedError`, the current one stops at its next tile."""
        with self._changed:
            self._stopped = True
            for job in self._waiting:
                job.done.set_exception(StoppedError('the server is shutting down'))
            self._waiting.clear()
            if self._current is not None:
                self._current.abandoned = True
            self._changed.notify_all()

    def join(self, seconds: float) -> bool:
        """Wait for the thread to end after `stop`; returns whether it did."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopped)
                if self._stopped:
                    return
                job = self._current = self._waiting.popleft()
                job.done.set_running_or_notify_cancel()
            try:
                result = self._restore(job)
            except BaseException as error:  # whatever fails, the thread continues with the next image
                outcome: Result | BaseException = self._reason(job, error)
            else:
                outcome = result
            # A client may submit its next image as soon as this one is done: make room in the queue first.
            with self._changed:
                self._current = None
            if isinstance(outcome, Result):
                job.done.set_result(outcome)
            else:
                with contextlib.suppress(OSError):
                    job.target.unlink(missing_ok=True)
                job.done.set_exception(outcome)

    def _reason(self, job: Job, error: BaseException) -> BaseException:
        """The exception for the client of a failed job."""
        if job.abandoned:
            if self._stopped:
                return StoppedError('the server is shutting down')
            return AbandonedError(f'{job.name} was dropped')
        from dsgformer_arch.restore import is_out_of_memory

        if isinstance(error, MemoryError) or is_out_of_memory(error):
            return BusyError(
                f'not enough memory for {job.name} now; choose a smaller tile or try again later'
            )
        return error

    def _restore(self, job: Job) -> Result:
        from dsgformer_arch.inference.deblurrer import Report

        begun = time.perf_counter()
        restorer = self.load(job.settings.model)
        # Only this thread restores, so one network can be used with all settings.
        restorer.strength, restorer.tile = job.settings.strength, job.settings.tile
        restorer.precision, restorer.report = job.settings.precision, Report()
        image = open_image(job.source, job.name)

        def tick(fraction: float) -> None:
            if job.abandoned:
                raise AbandonedError
            job.fraction = fraction

        output = Output(image, job.target, image.format)
        try:
            for band in restorer.bands(image.rows, image.size, tick):
                output.write(band)
            output.finish()
        finally:
            output.close()
        notes = [*image.notes, *output.notes, *restorer.report.notes]
        return Result(job.target, image.format, image.size, time.perf_counter() - begun, notes)


def too_many_bytes(name: str, limits: Limits) -> str:
    """The error message for a file with too many bytes."""
    return f'{name} is too large; this server takes files of at most {limits.most_bytes / 1e6:g} MB'


def offered(
    models: list[str] | None = None, weights: str | None = None, device: str = 'auto'
) -> dict[str, Callable[[], Deblurrer]]:
    """Constructors of the restorers by model; nothing is loaded yet.

    Args:
        models: systems, or official weights such as `restormer/motion`, the default one first; None for the
            weights in the package and all official weights that were downloaded.
        weights: a checkpoint to serve instead; `models` may name its system.
        device: as in `Deblurrer`.

    Raises:
        UserError: several models for one file of weights.
    """
    from dsgformer_arch.inference import official_weights

    def maker(model: str | None, file: str | Path | None) -> Callable[[], Deblurrer]:
        def make() -> Deblurrer:
            from dsgformer_arch.inference.deblurrer import Deblurrer

            return Deblurrer(model, weights=file, device=device)

        return make

    if weights is not None:
        if models and len(models) > 1:
            raise UserError('--weights is one file of one system; give --model once, or not at all')
        return {Path(weights).name: maker(models[0] if models else None, weights)}
    if models:
        return {name: maker(name, None) for name in models}
    # A model that is named by its file is never downloaded, even if the file is removed later.
    files = {entry: official_weights.cached(entry) for entry in official_weights.TABLE}
    found = {entry.key: maker(entry.system, file) for entry, file in files.items() if file}
    return {DEFAULT_MODEL: maker(DEFAULT_MODEL, None), **found}
