"""The web page, a Gradio application: upload an image, compare before and after, download."""

from __future__ import annotations

import asyncio
import html
import math
import os
import shutil
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from fastapi import FastAPI
from PIL import Image

from dsgformer_arch.inference.images import open_image
from dsgformer_arch.serving.folder import ServerFolder
from dsgformer_arch.serving.service import SUFFIXES, Job, Limits, RestorationService, Result, Settings
from dsgformer_arch.utils.errors import UserError

TILES = ('auto', '256', '384', '512', '768', '1024')
"""Choices for the largest side of tiles."""

PRECISIONS = ('auto', 'fp32', 'bf16', 'fp16')

SHOWN_PIXELS = 12_000_000
"""Most pixels of an image in the slider; larger ones are downscaled for it, but not for the download."""

POLL = 0.25
"""Seconds between two updates of the progress."""

GONE = '{name} is no longer on this server; drop it again'

_shrinking = threading.Lock()
"""Held while an image is downscaled for the slider, so that only one is in memory."""

CSS = """
.gradio-container {width: 100%; max-width: 1280px !important; margin: 0 auto !important;}
#title h1 {margin: 0.2em 0 0.1em;}
#title p {margin: 0;}
#status p {margin: 0.2em 0;}
#status .error {color: var(--error-text-color); font-weight: 600;}
footer {display: none !important;}
"""


def create_page(service: RestorationService, folder: ServerFolder, keep: float) -> gr.Blocks:
    """Create the page; `mount` adds it to a server.

    Args:
        service: the queue.
        folder: the folder of the files that the page shows.
        keep: seconds until files are removed, for the note on the page.
    """
    limits = service.limits
    sessions: dict[str, list[Job]] = defaultdict(list)  # unfinished jobs of each visitor

    def uploaded(path: str | None) -> tuple[Any, Any, str, Any]:
        """Handle an uploaded or removed file: show its format and size, or why it cannot be restored."""
        message, valid = '', False
        if path is not None:
            try:
                kind, (height, width) = service.check(_uploaded(folder, path), Path(path).name)
                message, valid = _html(f'{kind}, {width}×{height} pixels'), True
            except UserError as error:
                message = _html(str(error), 'error')
        return None, gr.update(value=None, interactive=False), message, gr.update(interactive=valid)

    async def restore(
        path: str | None,
        model: str,
        strength: float,
        tile: str,
        precision: str,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (how Gradio passes it)
    ) -> tuple[Any, Any, str]:
        """Handle a click on the button: restore the image."""
        own = sessions[request.session_hash or '']
        settings = Settings(model, strength, tile if tile == 'auto' else int(tile), precision)
        try:
            upload = _uploaded(folder, path)
            shown, result, name = await _restored(service, folder, upload, settings, own, progress)
        except UserError as error:
            return None, gr.update(value=None, interactive=False), _html(str(error), 'error')
        finally:
            if not own:
                sessions.pop(request.session_hash or '', None)
        height, width = result.size
        message = _html(f'Restored {width}×{height} pixels in {result.seconds:.1f} s')
        message += ''.join(_html(f'Note: {note}') for note in result.notes)
        return shown, gr.update(value=str(name), interactive=True), message

    def left(request: gr.Request) -> None:
        """Handle a closed tab: abandon its jobs."""
        for job in list(sessions.get(request.session_hash or '', [])):
            service.abandon(job)

    with gr.Blocks(title='DSGformer', analytics_enabled=False) as page:
        gr.Markdown('# DSGformer\nRemoves motion blur from images.', elem_id='title')
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                file = gr.File(
                    label='Image', file_types=['image'], type='filepath', height=160, elem_id='upload'
                )
                status = gr.HTML(elem_id='status', padding=False)
                with gr.Accordion('Settings', open=False, elem_id='settings'):
                    model = gr.Dropdown(service.models, value=service.models[0], label='Model')
                    strength = gr.Slider(
                        0, 1, 1, step=0.05, label='Strength', info='0: the input, 1: restored'
                    )
                    tile = gr.Dropdown(list(TILES), value='auto', label='Tile', info='largest side in pixels')
                    precision = gr.Dropdown(list(PRECISIONS), value='auto', label='Precision')
                button = gr.Button('Restore', variant='primary', interactive=False, elem_id='restore')
                download = gr.DownloadButton('Download', interactive=False, elem_id='download')
            with gr.Column(scale=2, min_width=300):
                slider = gr.ImageSlider(
                    label='Before and after', type='filepath', interactive=False, buttons=['fullscreen'],
                    max_height=700, elem_id='slider',
                )  # fmt: skip
        gr.Markdown(
            f'JPEG, PNG, TIFF, WebP or BMP, at most {limits.most_bytes / 1e6:g} MB and '
            f'{limits.most_pixels / 1e6:g} megapixels. Images stay on this server and are removed after '
            f'{keep / 60:g} minutes. [API](docs)',
            elem_id='limits',
        )
        file.change(
            uploaded, file, [slider, download, status, button],
            show_progress='hidden', concurrency_limit=None, api_visibility='private',
        )  # fmt: skip
        button.click(
            restore, [file, model, strength, tile, precision], [slider, download, status],
            show_progress='full', show_progress_on=slider, concurrency_limit=None, api_visibility='private',
        )  # fmt: skip
        page.unload(left)
    page.queue(default_concurrency_limit=None)
    return page


def mount(app: FastAPI, page: gr.Blocks, limits: Limits) -> None:
    """Add the page to the application of the API, at the root."""
    gr.mount_gradio_app(
        app, page, '/', theme=_theme(), css=CSS, footer_links=[], run_history=False, show_error=False,
        max_file_size=limits.most_bytes, ssr_mode=False, mcp_server=False, enable_monitoring=False, pwa=False,
    )  # fmt: skip
    # Gradio checks the paths of uploaded files only in applications that are marked as launched.
    page.has_launched = True
    page.is_running = True


def _theme() -> gr.themes.Base:
    """Gradio's default theme with system fonts, which need no download."""
    plain = ('ui-sans-serif', 'system-ui', 'sans-serif')
    return gr.themes.Default(font=plain, font_mono=('ui-monospace', 'monospace'))


async def _restored(
    service: RestorationService,
    folder: ServerFolder,
    upload: Path,
    settings: Settings,
    own: list[Job],
    progress: gr.Progress,
) -> tuple[tuple[str, str], Result, Path]:
    """Restore an uploaded image.

    Args:
        service: the queue.
        folder: the folder of the files that the page shows.
        upload: the image.
        settings: how to restore it.
        own: unfinished jobs of the visitor; contains this one until it is finished.
        progress: the progress display.

    Returns:
        The paths of both images for the slider, the result, and the path of the download.
    """
    name = upload.name
    with folder.job() as place:
        source = place / 'source'
        # The upload may be swept while the image waits; a second link to it is not.
        await asyncio.to_thread(_link, upload, source)
        job = await asyncio.to_thread(service.submit, source, place / 'result', name, settings)
        own.append(job)
        waiting = asyncio.wrap_future(job.done)
        try:
            while not (await asyncio.wait({waiting}, timeout=POLL))[0]:
                ahead = service.ahead(job)
                if ahead:
                    progress(0, desc=f'waiting: {ahead} before this image')
                else:
                    progress(job.fraction, desc='restoring' if job.fraction < 1 else 'writing')
            result = waiting.result()
        finally:
            service.abandon(job)  # no effect on a finished job
            own.remove(job)
        shown = folder.shown()
        target = shown / f'{upload.stem}_deblurred{SUFFIXES[result.format]}'
        os.replace(result.path, target)
        before = await asyncio.to_thread(_shown, source, result, shown / 'before')
        after = await asyncio.to_thread(_shown, target, result, shown / 'after')
    return (str(before), str(after)), result, target


def _shown(path: Path, result: Result, target: Path) -> Path:
    """An image that a browser can show: the file itself, or an 8-bit downscaled copy named `target`."""
    height, width = result.size
    factor = math.ceil(math.sqrt(height * width / SHOWN_PIXELS))
    if factor == 1 and result.format != 'TIFF':
        if path.suffix:  # the result, which is below the folder of the page already
            return path
        target = target.with_suffix(SUFFIXES[result.format])
        _link(path, target)
        return target
    with _shrinking:
        opened = open_image(path, path.name)
        pixels = opened.rows(0, height)
        if pixels.dtype == np.uint16:
            pixels = (pixels >> 8).astype(np.uint8)
        elif pixels.dtype != np.uint8:
            pixels = np.rint(pixels * np.float32(255)).astype(np.uint8)
        image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).reduce(factor)
        kind = 'PNG' if pixels.shape[-1] in (2, 4) else 'JPEG'
        target = target.with_suffix(SUFFIXES[kind])
        # Both images are compressed with the same quality, so that the comparison is fair.
        image.save(target, kind, quality=95, compress_level=1, icc_profile=opened.metadata.icc)
    return target


def _link(path: Path, target: Path) -> None:
    """Create a hard link, or a copy where the file system has no links."""
    try:
        os.link(path, target)
    except FileNotFoundError:
        raise UserError(GONE.format(name=path.name)) from None
    except OSError:
        shutil.copyfile(path, target)


def _uploaded(folder: ServerFolder, path: str | None) -> Path:
    """The path of a file that was uploaded.

    Raises:
        UserError: there is none.
    """
    if path is None or not folder.contains(path):
        raise UserError('drop an image first')
    if not os.path.isfile(path):
        raise UserError(GONE.format(name=Path(path).name))
    return Path(path)


def _html(sentence: str, kind: str = 'info') -> str:
    role = 'alert' if kind == 'error' else 'status'
    return f'<p class="{kind}" role="{role}">{html.escape(sentence)}</p>'
