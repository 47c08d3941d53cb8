"""ASGI middleware: limits the size of requests, and blocks routes of Gradio that the page does not use."""

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
"""Routes of the API's documentation."""

READ = (
    '/', '/config', '/theme.css', '/favicon.ico', '/manifest.json', '/robots.txt', '/assets/', '/static/',
    '/svelte/', '/gradio_api/startup-events', '/gradio_api/heartbeat/', '/gradio_api/queue/data',
    '/gradio_api/upload_progress', '/gradio_api/app_id',
)  # fmt: skip
"""Routes that the page reads; one that ends with / includes all below it.  `FILES` has its own check."""

UPLOAD = '/gradio_api/upload'

WRITE = ('/gradio_api/queue/join', '/gradio_api/cancel', '/gradio_api/reset')
"""Routes to which the page posts JSON."""

FILES = '/gradio_api/file='
"""Route of files of the page, followed by their path."""

FORM = 1 << 16
"""Bytes that a multipart request may have in addition to the file; also the limit of a page event."""

DISCARDED = 100_000_000
"""Bytes of an oversized body that are read and discarded, so that its sender gets the response."""

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
    """Middleware that filters the requests of an ASGI application.

    Gradio has more routes than this page uses (a proxy, a run history in the cloud, code generation), and a
    mounted application does not check that files named in an event were uploaded.

    Args:
        app: the application with the API and the page.
        folder: the only folder that files are served from.
        limits: limits of uploads.
    """

    def __init__(self, app: ASGIApp, folder: ServerFolder, limits: Limits) -> None:
        self.app, self.folder, self.limits = app, folder, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
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
        """Limit a body to one file of the largest size and a form around it."""
        if await asyncio.to_thread(self.folder.is_full):
            raise HTTPException(
                503, 'the server holds as many files as it may; try again later', {'Retry-After': '60'}
            )
        body.most = self.limits.most_bytes + FORM
        body.refusal = HTTPException(413, too_many_bytes('the file', self.limits), {'Connection': 'close'})
        if body.declared > body.most:
            raise body.refusal

    async def _checked(self, body: _Body) -> Receive:
        """Read a small JSON body and check that it names uploaded files only."""
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
        """Whether every `path` in the JSON of an event is below the folder of the page."""
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
    # The path has been decoded once; one that changes when it is decoded or resolved again is refused.
    if posixpath.normpath(path) != (path.rstrip('/') or '/') or unquote(path) != path or '\\' in path:
        return False
    return any(path == one or (one.endswith('/') and len(one) > 1 and path.startswith(one)) for one in paths)


class _Body:
    """The body of a request.  It is read to its end before the response: some clients do not listen before.

    Attributes:
        declared: value of the header Content-Length; 0 without one.
        most: the largest number of bytes; None for no limit.
        refusal: raised for a larger body.
        ended: whether the body has been read to its end.
    """

    def __init__(self, scope: Scope, receive: Receive) -> None:
        headers = Headers(scope=scope)
        length = headers.get('content-length', '0')
        self.declared = int(length) if length.isdecimal() else 0
        self.most: int | None = None
        self.refusal = HTTPException(413, 'the request is too large')
        self.ended = scope['method'] in ('GET', 'HEAD')
        self._waits = 'expect' in headers  # the body is sent only after an interim response
        self._receive, self._count = receive, 0

    async def receive(self) -> Message:
        """The next message."""
        message = await self._receive()
        self._waits = False
        self._count += len(message.get('body', b''))
        if message['type'] != 'http.request' or not message.get('more_body', False):
            self.ended = True
        if self.most is not None and self._count > self.most:
            raise self.refusal
        return message

    async def discard(self) -> None:
        """Read and discard the rest, up to `DISCARDED` bytes and for at most 60 s."""
        if self.ended or self._waits:
            return
        self.most, end = None, self._count + DISCARDED

        async def read() -> None:
            while not self.ended and self._count < end:
                await self.receive()

        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(read(), 60)
