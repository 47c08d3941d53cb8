"""A server in this process, with networks whose results and timing a test knows."""

from __future__ import annotations

import io
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dsgformer_arch import Deblurrer
from dsgformer_arch.archs.layers.network import RestorationNetwork
from dsgformer_arch.serving.folder import ServerFolder
from dsgformer_arch.serving.service import Limits, RestorationService

PATIENCE = 60.0
"""Seconds to wait for what must happen; a busy machine is slow."""


class Darker(RestorationNetwork):
    """Subtracts 0.1: what came out says exactly what went in."""

    pad_multiple = 8

    def forward_padded(self, x: Tensor) -> Tensor:
        return x - 0.1


class Held(Darker):
    """Computes only while `open` is set; `calls` and `together` tell how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.began = threading.Event(), threading.Event()
        self.calls = self.together = self.now = 0

    def forward_padded(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.now += 1
        self.together = max(self.together, self.now)
        self.began.set()
        assert self.open.wait(PATIENCE)
        self.now -= 1
        return super().forward_padded(x)


def maker(network: Any = None) -> Callable[[], Deblurrer]:
    """What makes a restorer of a network; of `Darker` by default."""
    return lambda: Deblurrer(network or Darker(), device='cpu', precision='fp32')


def pixels(height: int = 48, width: int = 64, seed: int = 0) -> NDArray[np.uint8]:
    """A smooth image with values that `Darker` clips nowhere."""
    rng = np.random.default_rng(seed)
    small = rng.integers(60, 200, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def png(image: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, 'PNG')
    return buffer.getvalue()


def decoded(content: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(content)))


def darker(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What `Darker` makes of an image."""
    return np.rint(np.clip(image / 255.0 - 0.1, 0, 1) * 255).astype(np.uint8)


def until(condition: Callable[[], Any]) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.01)


@dataclass
class Running:
    """A server: its address, its queue and its folder."""

    url: str
    service: RestorationService
    folder: Path


@contextmanager
def running(
    restorers: Mapping[str, Callable[[], Deblurrer]],
    limits: Limits | None = None,
    *,
    page: bool = False,
    keep: float = 600.0,
) -> Iterator[Running]:
    """The API, and the page too if it is wanted, on a free port of this machine."""
    import uvicorn

    from dsgformer_arch.serving.api import create_api
    from dsgformer_arch.serving.gate import Gate
    from dsgformer_arch.serving.server import address, application, listen

    limits = limits or Limits()
    with tempfile.TemporaryDirectory() as root:
        service = RestorationService(restorers, limits)
        if page:
            app = application(service, Path(root), keep)
        else:
            folder = ServerFolder(Path(root), 10**9)
            app = Gate(create_api(service, folder, keep), folder, limits)
        listener = listen('127.0.0.1', 0)
        config = uvicorn.Config(
            app, log_level='warning', lifespan='on', ws='none', timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        url = address(listener).rstrip('/')
        thread = threading.Thread(target=server.run, kwargs={'sockets': [listener]})
        thread.start()
        try:
            until(lambda: server.started)
            yield Running(url, service, Path(root).resolve())
        finally:
            service.stop()
            server.should_exit = True
            thread.join(PATIENCE)
            assert service.join(PATIENCE)
