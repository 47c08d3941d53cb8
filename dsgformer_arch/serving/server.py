"""Run the page and the API with uvicorn until SIGINT or SIGTERM."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from dsgformer_arch.serving.folder import ServerFolder
from dsgformer_arch.serving.service import Limits, RestorationService
from dsgformer_arch.utils.errors import UserError

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from dsgformer_arch.inference.deblurrer import Deblurrer

QUIET = {
    'GRADIO_ANALYTICS_ENABLED': 'False',
    'GRADIO_RUN_HISTORY': 'False',
    'GRADIO_MCP_SERVER': 'False',
    'GRADIO_SSR_MODE': 'False',
    'GRADIO_VIBE_MODE': '',
    'GRADIO_WATCH_DIRS': '',
    'HF_HUB_DISABLE_TELEMETRY': '1',
    'HF_HUB_OFFLINE': '1',
    'DO_NOT_TRACK': '1',
}
"""Environment that switches off telemetry and extra services of Gradio; set before it is imported."""

GRACE = 3
"""Seconds until open connections are closed after a signal; those of open pages never end by themselves."""

PATIENCE = 10.0
"""Seconds to wait after that for the current image to stop at its next tile."""


@dataclass(frozen=True)
class Options:
    """Settings of the server.

    Attributes:
        host: the address to listen on.
        port: 0 for any free one.
        limits: limits of uploads and of the queue.
        keep: seconds until files of the page are removed.
    """

    host: str = '127.0.0.1'
    port: int = 7860
    limits: Limits = field(default_factory=Limits)
    keep: float = 1800.0


class _Signalled(BaseException):
    """Raised by SIGINT and SIGTERM."""


def serve(
    options: Options,
    make: Callable[[], dict[str, Callable[[], Deblurrer]]],
    load: list[str] | None = None,
) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit status.

    Args:
        options: see `Options`.
        make: returns a constructor for each model, the default model first; see `service.offered`.
        load: models to load before the first request; the default model if None.

    Raises:
        UserError: the address cannot be listened on, Gradio is not installed, or a model cannot be loaded.
    """
    with _signals():
        try:
            return _serve(options, make, load)
        except _Signalled:
            return 0


def _serve(
    options: Options, make: Callable[[], dict[str, Callable[[], Deblurrer]]], load: list[str] | None
) -> int:
    _check_extra()
    listener = listen(options.host, options.port)
    with contextlib.closing(listener), tempfile.TemporaryDirectory(prefix='dsgformer-serve-') as root:
        # Libraries write temporary files, such as large uploads, to this folder too.
        before, tempfile.tempdir = tempfile.tempdir, root
        try:
            service = RestorationService(make(), options.limits)
            try:
                for model in load or service.models[:1]:
                    service.load(model)
                _run(listener, service, Path(root), options)
            finally:
                service.stop()
                ended = service.join(PATIENCE)
        finally:
            tempfile.tempdir = before
    if not ended:
        # A tile of a slow network takes minutes.  Python cannot stop its thread; a normal exit would crash.
        sys.stdout.flush()
        os._exit(0)
    return 0


def _run(listener: socket.socket, service: RestorationService, root: Path, options: Options) -> None:
    app = application(service, root, options.keep)
    import uvicorn

    config = uvicorn.Config(
        app, log_level='warning', access_log=False, server_header=False, lifespan='on', ws='none',
        timeout_graceful_shutdown=GRACE, timeout_keep_alive=30, proxy_headers=True,
    )  # fmt: skip

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                print(f'DSGformer serves on {address(listener)} (Ctrl-C ends it)', flush=True)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            service.stop()
            super().handle_exit(sig, frame)

    Server(config).run(sockets=[listener])


def application(service: RestorationService, root: Path, keep: float) -> ASGIApp:
    """The whole application: gate, API and page.

    Args:
        service: the queue.
        root: an empty folder for uploads and results.
        keep: seconds until files of the page are removed.
    """
    limits = service.limits
    # Twice the size of a full queue, for results and for uploads that are not submitted yet.
    folder = ServerFolder(root, 4 * (limits.most_waiting + 2) * limits.most_bytes)
    os.environ.update(QUIET, GRADIO_TEMP_DIR=str(folder.page), GRADIO_EXAMPLES_CACHE=str(folder.page))
    from dsgformer_arch.serving.api import create_api
    from dsgformer_arch.serving.gate import Gate
    from dsgformer_arch.serving.page import create_page, mount

    app = create_api(service, folder, keep)
    mount(app, create_page(service, folder, keep), limits)
    return Gate(app, folder, limits)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        UserError: the port is in use, or the address does not belong to this machine.
    """
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=512)
    except socket.gaierror:
        raise UserError(f'--host {host}: there is no such address') from None
    except OverflowError:
        raise UserError(f'--port {port}: ports go from 0 to 65535') from None
    except OSError as error:
        reason = os.strerror(error.errno).lower() if error.errno else str(error)
        raise UserError(
            f'cannot listen on {host}, port {port}: {reason}; choose another --port, or 0 for a free one'
        ) from None


def address(listener: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f'http://{f"[{host}]" if ":" in host else host}:{port}/'


def is_local(host: str) -> bool:
    """Whether a host is a loopback address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == 'localhost'


def _check_extra() -> None:
    import importlib.util

    for name in ('gradio', 'fastapi', 'uvicorn', 'multipart'):
        if importlib.util.find_spec(name) is None:
            raise UserError(f'dsgformer serve needs {name}; install it with: pip install "dsgformer[web]"')


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGINT and SIGTERM raise `_Signalled`; uvicorn handles them while it runs, and raises them again."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: Any) -> None:
        raise _Signalled

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
