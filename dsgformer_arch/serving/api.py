"""The HTTP API: `POST /api/deblur` restores an image."""

from __future__ import annotations

import asyncio
import html
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.background import BackgroundTask
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from dsgformer_arch import __version__
from dsgformer_arch.inference.images import ImageError
from dsgformer_arch.restore import SMALLEST_TILE
from dsgformer_arch.serving.folder import ServerFolder, remove
from dsgformer_arch.serving.service import (
    SUFFIXES,
    BusyError,
    Job,
    RestorationService,
    Result,
    Settings,
    StoppedError,
    TooLargeError,
)
from dsgformer_arch.utils.errors import UserError

MEDIA_TYPES = {
    'JPEG': 'image/jpeg', 'PNG': 'image/png', 'TIFF': 'image/tiff', 'WEBP': 'image/webp', 'BMP': 'image/bmp',
}  # fmt: skip

FIELDS = 16
"""Fields that a multipart request may have in addition to the image."""

POLL = 0.5
"""Seconds between two checks whether the client is still connected."""

SWEEP = 60.0
"""Seconds between two sweeps of the folder; fewer where files are kept for less than twice that."""


class Parameters(BaseModel):
    """Settings of `POST /api/deblur`: in the query, or as fields of a multipart request."""

    model_config = ConfigDict(extra='forbid')

    model: Annotated[
        str | None, Field(description='one of the models of this server; by default the first')
    ] = None
    strength: Annotated[
        float, Field(ge=0, le=1, description='0 returns the input, 1 the restored image; between, a blend')
    ] = 1.0
    tile: Annotated[
        Literal['auto'] | Annotated[int, Field(ge=SMALLEST_TILE)],
        Field(description=f'largest side of tiles in pixels, from {SMALLEST_TILE} up, or auto'),
    ] = 'auto'
    precision: Literal['auto', 'fp32', 'bf16', 'fp16'] = 'auto'


def create_api(service: RestorationService, folder: ServerFolder, keep: float) -> FastAPI:
    """Create the application with `POST /api/deblur`, `/openapi.json` and plain documentation at `/docs`.

    Args:
        service: the queue.
        folder: the folder for images during restoration.
        keep: seconds until files of the page are removed.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async def sweep() -> None:
            while True:
                await asyncio.sleep(min(keep / 2, SWEEP))
                await asyncio.to_thread(folder.sweep, keep)

        task = asyncio.create_task(sweep())
        try:
            yield
        finally:
            task.cancel()

    app = FastAPI(
        title='DSGformer',
        version=__version__,
        description='Removes motion blur from images.',
        docs_url=None,  # FastAPI's pages load scripts from another server
        redoc_url=None,
        lifespan=lifespan,
    )
    limits = service.limits
    error = {'content': {'application/json': {'schema': {'$ref': '#/components/schemas/Error'}}}}
    image = {'schema': {'type': 'string', 'format': 'binary'}}

    @app.post(
        '/api/deblur',
        summary='Restore an image',
        description=(
            f'The image is the body of the request, or the field `image` of a multipart request: JPEG, PNG, '
            f'TIFF, WebP or BMP, at most {limits.most_bytes} bytes and {limits.most_pixels} pixels. '
            f'The result has its format and depth. Models: {", ".join(service.models)}. One image is '
            f'restored at a time; {limits.most_waiting} may wait.'
        ),
        response_class=FileResponse,
        responses={
            200: {
                'description': 'the restored image',
                'content': dict.fromkeys(MEDIA_TYPES.values(), image),
                'headers': {
                    'Deblur-Seconds': {
                        'description': 'time to decode, restore and encode', 'schema': {'type': 'number'}
                    },
                    'Deblur-Notes': {
                        'description': 'JSON list of sentences about what did not go as asked',
                        'schema': {'type': 'string'},
                    },
                },
            },
            400: {'description': 'no image in the request', **error},
            413: {'description': 'too many bytes or pixels', **error},
            415: {'description': 'not an image that can be read and restored', **error},
            422: {'description': 'wrong parameter', **error},
            500: {'description': 'a fault of the server; its log says which', **error},
            503: {'description': 'the queue is full, or memory is short: try again later', **error},
        },
        openapi_extra={
            'requestBody': {
                'required': True,
                'content': {
                    **dict.fromkeys(MEDIA_TYPES.values(), image),
                    'application/octet-stream': image,
                    'multipart/form-data': {
                        'schema': {
                            'type': 'object',
                            'required': ['image'],
                            'properties': {
                                'image': {'type': 'string', 'format': 'binary'},
                                **Parameters.model_json_schema()['properties'],
                            },
                        }
                    },
                },
            }
        },
    )  # fmt: skip
    async def deblur(request: Request, parameters: Annotated[Parameters, Query()]) -> Response:
        service.refuse_if_full()  # before the body is read
        place = folder.new_job()
        try:
            source = place / 'source'
            name, fields = await _receive(request, source)
            if fields:
                parameters = Parameters.model_validate(
                    {**parameters.model_dump(exclude_unset=True), **fields}
                )
            settings = Settings(
                service.models[0] if parameters.model is None else parameters.model,
                parameters.strength,
                parameters.tile,
                parameters.precision,
            )
            # The result needs no suffix: its format is that of the input.
            job = await asyncio.to_thread(service.submit, source, place / 'result', name, settings)
            result = await _finished(service, job, request)
            source.unlink()
        except BaseException:
            remove(place)
            raise
        headers = {'Deblur-Seconds': f'{result.seconds:.3f}'}
        if result.notes:
            headers['Deblur-Notes'] = json.dumps(result.notes)  # ASCII
        return FileResponse(
            result.path,
            media_type=MEDIA_TYPES[result.format],
            filename=f'{Path(name).stem}_deblurred{SUFFIXES[result.format]}',
            headers=headers,
            background=BackgroundTask(remove, place),
        )

    @app.get('/docs', include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(_plain_docs(app.openapi()))

    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(ValidationError, _on_validation)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(UserError, _on_user_error)
    app.add_exception_handler(Exception, _on_fault)
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = generate()
            schemas = found.setdefault('components', {}).setdefault('schemas', {})
            for unused in ('HTTPValidationError', 'ValidationError'):
                schemas.pop(unused, None)
            schemas['Error'] = {
                'type': 'object',
                'required': ['detail'],
                'properties': {'detail': {'type': 'string', 'description': 'one sentence'}},
            }
            for parameter in found['paths']['/api/deblur']['post'].get('parameters', []):
                if parameter['name'] == 'model':
                    parameter['schema'] = {'type': 'string', 'enum': service.models}
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]
    return app


async def _receive(request: Request, target: Path) -> tuple[str, dict[str, str]]:
    """Write the image of a request to a file; returns its name and the other fields.

    Raises:
        HTTPException: 400, the request has no image.
    """
    kind = request.headers.get('content-type', '').partition(';')[0].strip().lower()
    if kind != 'multipart/form-data':  # of any type: curl --data-binary sends a raw body as a form
        with open(target, 'wb') as file:
            async for block in request.stream():
                file.write(block)
        if not target.stat().st_size:
            raise HTTPException(400, 'the request has no image: send one as the body, or as the field image')
        return 'the image', {}
    async with request.form(max_files=1, max_fields=FIELDS) as form:
        files = [(key, value) for key, value in form.multi_items() if isinstance(value, UploadFile)]
        if len(files) != 1 or files[0][0] != 'image':
            raise HTTPException(400, 'a multipart request has one file, in the field image')
        upload = files[0][1]
        with open(target, 'wb') as file:
            while block := await upload.read(1 << 20):
                file.write(block)
        name = (upload.filename or '').replace('\\', '/').rpartition('/')[2]
        name = ''.join(letter for letter in name if letter.isprintable())[:100]
        return name or 'the image', {key: value for key, value in form.items() if isinstance(value, str)}


async def _finished(service: RestorationService, job: Job, request: Request) -> Result:
    """Wait for the result of a job; abandon the job if the client disconnects."""
    waiting = asyncio.wrap_future(job.done)
    try:
        while not (await asyncio.wait({waiting}, timeout=POLL))[0]:
            if await request.is_disconnected():
                raise HTTPException(499, 'the client disconnected')
        return waiting.result()
    except BaseException:
        service.abandon(job)
        raise


def _answer(status: int, sentence: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({'detail': sentence}, status, headers)


async def _on_http(request: Request, error: Any) -> Response:
    return _answer(error.status_code, str(error.detail), error.headers)


async def _on_user_error(request: Request, error: Exception) -> Response:
    if isinstance(error, TooLargeError):
        return _answer(413, str(error))
    if isinstance(error, (BusyError, StoppedError)):
        return _answer(503, str(error), {'Retry-After': '5'})
    return _answer(415 if isinstance(error, ImageError) else 422, str(error))


async def _on_fault(request: Request, error: Exception) -> Response:
    """A fault of the program; its traceback is in the server's log."""
    return _answer(500, 'the server failed to restore this image; its log says why')


async def _on_validation(request: Request, error: Any) -> Response:
    """The first error as one sentence."""
    first = error.errors()[0]
    name = next((part for part in first['loc'] if part in Parameters.model_fields), first['loc'][-1])
    if first['type'] == 'extra_forbidden':
        known = ', '.join(Parameters.model_fields)
        return _answer(422, f'there is no parameter {name!r}; there are {known}')
    if name == 'tile':
        return _answer(422, f'tile: give auto or a number of pixels from {SMALLEST_TILE} up')
    message = first['msg'][0].lower() + first['msg'][1:]
    return _answer(422, f'{name}: {message}, not {str(first["input"])[:50]!r}')


def _plain_docs(description: dict[str, Any]) -> str:
    """The documentation of the API as HTML without scripts."""
    post = description['paths']['/api/deblur']['post']
    rows = ''.join(
        f'<tr><td><code>{html.escape(one["name"])}</code></td><td>{html.escape(json.dumps(one["schema"]))}</td></tr>'
        for one in post['parameters']
    )
    statuses = ''.join(
        f'<tr><td>{status}</td><td>{html.escape(one["description"])}</td></tr>'
        for status, one in post['responses'].items()
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>DSGformer: API</title>'
        '<meta name="viewport" content="width=device-width">'
        '<style>body{font-family:system-ui,sans-serif;max-width:50rem;margin:2rem auto;padding:0 1rem;'
        'line-height:1.5}td{padding:.2rem 1rem .2rem 0;vertical-align:top;overflow-wrap:anywhere}</style>'
        f'<h1>POST /api/deblur</h1><p>{html.escape(post["description"])}</p>'
        f'<h2>Parameters</h2><table>{rows}</table><h2>Answers</h2><table>{statuses}</table>'
        '<p>The whole description: <a href="openapi.json">openapi.json</a></p></html>'
    )
