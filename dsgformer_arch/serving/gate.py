"""What stands before every request: bounded bodies, and no more of Gradio's routes than the page needs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import posixpath
from typing import Any
from urllib.parse import unquote

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsgformer_arch.serving.folder import ServerFolder
from dsgformer_arch.serving.service import Limits, too_many_bytes

OWN = ('/openapi.json', '/docs')
"""What describes the API."""

READ = (
    '/', '/config', '/theme.css', '/favicon.ico', '/manifest.json', '/robots.txt', '/assets/', '/static/',
    '/svelte/', '/gradio_api/startup-events', '/gradio_api/heartbeat/', '/gradio_api/queue/data',
    '/gradio_api/upload_progress', '/gradio_api/app_id',
)  # fmt: skip
"""What the page reads; a path that ends in / stands for all below it.  Files are looked at separately."""

UPLOAD = '/gradio_api/upload'

WRITE = ('/gradio_api/queue/join', '/gradio_api/cancel', '/gradio_api/reset')
"""What the page posts JSON to."""

FILES = '/gradio_api/file='
"""Route of the page's files, followed by their path."""

FORM = 1 << 16
"""Bytes that a multipart request may have beside the file, and that events of the page may have."""

DISCARDED = 100_000_000
"""Bytes of a body that is too large that are read and dropped, so that its sender gets the answer."""

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'"
)
"""Content Security Policy: the browser loads nothing from another server."""

HEADERS = [
    (b'content-security-policy', POLICY.encode()),
    (b'x-content-type-options', b'nosniff'),
    (b'referrer-policy', b'no-referrer'),
]


class Gate:
    """An ASGI application before another one.

    Gradio has more routes than this page needs (a proxy, a run history in the cloud, code generation), and
    where it is mounted it does not check that files named in an event were uploaded.

    Args:
        app: the application with the API and the page.
        folder: the only place that files are served from.
        limits: of uploads.
    """

    def __init__(self, app: ASGIApp, folder: ServerFolder, limits: Limits) -> None:
        self.app, self.folder, self.limits = app, folder, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope['type'] == 'websocket':
            await send({'type': 'websocket.close', 'code': 1008})
            return
        if scope['type'] != 'http':
            await self.app(scope, receive, send)
            return

        body = _Body(scope, receive)

        async def answer(message: Message) -> None:
            if message['type'] == 'http.response.start':
                await body.discard()
                message = {**message, 'headers': [*message.get('headers', []), *HEADERS]}
            await send(message)

        try:
            await self._pass(scope, body, answer)
        except HTTPException as error:
            reply = JSONResponse({'detail': error.detail}, error.status_code, error.headers)
            await reply(scope, body.receive, answer)

    async def _pass(self, scope: Scope, body: _Body, send: Send) -> None:
        path, method = scope['path'], scope['method']
        receive: Receive = body.receive
        if path == '/api/deblur':
            if method != 'POST':
                raise HTTPException(405, 'send the image with POST', {'Allow': 'POST'})
            await self._bound(body)
        elif method in ('GET', 'HEAD'):
            if not (path in OWN or self._is_file(path) or _is_among(path, READ)):
                raise HTTPException(404, 'there is nothing here')
        elif method == 'POST' and path == UPLOAD:
            await self._bound(body)
        elif method == 'POST' and path in WRITE:
            receive = await self._checked(body)
        else:
            raise HTTPException(404, 'there is nothing here')
        await self.app(scope, receive, send)

    def _is_file(self, path: str) -> bool:
        return path.startswith(FILES) and self.folder.contains(path.removeprefix(FILES))

    async def _bound(self, body: _Body) -> None:
        """Allow one file of the largest size, and a form around it."""
        if await asyncio.to_thread(self.folder.is_full):
            raise HTTPException(
                503, 'the server holds as many files as it may; try again later', {'Retry-After': '60'}
            )
        body.most = self.limits.most_bytes + FORM
        body.refusal = HTTPException(413, too_many_bytes('the file', self.limits), {'Connection': 'close'})
        if body.told > body.most:
            raise body.refusal

    async def _checked(self, body: _Body) -> Receive:
        """A small JSON body that names no files but uploaded ones."""
        body.most, body.refusal = FORM, HTTPException(413, 'the request is too large')
        content = b''
        while not body.ended:
            content += (await body.receive()).get('body', b'')
        try:
            data = json.loads(content)
        except ValueError:
            raise HTTPException(400, 'the request is not JSON') from None
        except RecursionError:
            raise HTTPException(400, 'the request is nested too deeply') from None
        if not self._names_only_uploads(data):
            raise HTTPException(403, 'the request names a file that was not uploaded here')
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                return await body.receive()
            sent = True
            return {'type': 'http.request', 'body': content, 'more_body': False}

        return replay

    def _names_only_uploads(self, data: Any) -> bool:
        """Whether every `path` in the JSON of an event lies among the page's files."""
        waiting = [data]
        while waiting:
            one = waiting.pop()
            if isinstance(one, list):
                waiting += one
            elif isinstance(one, dict):
                path = one.get('path')
                if path is not None and not (isinstance(path, str) and self.folder.contains(path)):
                    return False
                waiting += one.values()
        return True


def _is_among(path: str, paths: tuple[str, ...]) -> bool:
    # The path is decoded once already; what changes when it is decoded or resolved again is no asset.
    if posixpath.normpath(path) != (path.rstrip('/') or '/') or unquote(path) != path or '\\' in path:
        return False
    return any(path == one or (one.endswith('/') and len(one) > 1 and path.startswith(one)) for one in paths)


class _Body:
    """The body of a request, which is read to its end before the answer: a sender may listen only then.

    Attributes:
        told: bytes that the header tells; 0 where it does not.
        most: bytes that may be read; None for any number.
        refusal: raised where there are more.
        ended: whether all was read.
    """

    def __init__(self, scope: Scope, receive: Receive) -> None:
        headers = Headers(scope=scope)
        told = headers.get('content-length', '0')
        self.told = int(told) if told.isdecimal() else 0
        self.most: int | None = None
        self.refusal = HTTPException(413, 'the request is too large')
        self.ended = scope['method'] in ('GET', 'HEAD')
        self._waits = 'expect' in headers  # for an answer before it is sent
        self._receive, self._count = receive, 0

    async def receive(self) -> Message:
        """The next part."""
        message = await self._receive()
        self._waits = False
        self._count += len(message.get('body', b''))
        if message['type'] != 'http.request' or not message.get('more_body', False):
            self.ended = True
        if self.most is not None and self._count > self.most:
            raise self.refusal
        return message

    async def discard(self) -> None:
        """Read the rest, up to a limit, and forget it."""
        if self.ended or self._waits:
            return
        self.most, end = None, self._count + DISCARDED

        async def read() -> None:
            while not self.ended and self._count < end:
                await self.receive()

        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(read(), 60)
