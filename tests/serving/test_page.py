"""The page in a browser at the width of a desk and of a phone, and what its routes refuse."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from dsgformer_arch.serving.service import Limits
from tests import browser
from tests.serving.running import PATIENCE, Held, Running, darker, decoded, maker, pixels, png, running, until

pytest.importorskip('gradio', reason='needs the extra web')

LIMITS = Limits(most_bytes=400_000, most_pixels=300_000, most_waiting=12)
SIZES = {'desk': (1280, 900), 'phone': (390, 844)}


@pytest.fixture(scope='module')
def server() -> Iterator[Running]:
    with running({'darker': maker(), 'other': maker()}, LIMITS, page=True) as found:
        yield found


@pytest.fixture(scope='module')
def chromium() -> Iterator[Any]:
    if browser.executable() is None:
        pytest.skip('there is no Chromium here')
    api = pytest.importorskip('playwright.sync_api', reason='needs playwright')
    with api.sync_playwright() as playwright:
        program = playwright.chromium.launch(executable_path=browser.executable())
        yield program
        program.close()


class Visitor:
    """A page in a browser, and everything that it asked for."""

    def __init__(self, context: Any, server: Running) -> None:
        self.page = context.new_page()
        self.page.set_default_timeout(PATIENCE * 1000)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on('request', lambda request: self.requests.append(request.url))
        self.page.on('pageerror', lambda error: self.complaints.append(str(error)))
        self.page.on('console', self._hear)
        self.page.on('response', self._look)
        self.page.goto(server.url)
        self.page.wait_for_selector('#restore')

    def _hear(self, message: Any) -> None:
        # What could not be loaded comes by `_look` with its address.
        if message.type == 'error' and message.text != 'Response' and 'Failed to load' not in message.text:
            self.complaints.append(message.text)

    def _look(self, answer: Any) -> None:
        # Gradio's page asks for the progress of an upload that may be done by then.
        if answer.status >= 400 and '/gradio_api/upload_progress' not in answer.url:
            self.complaints.append(f'{answer.status} {answer.url}')

    def drop(self, name: str, content: bytes) -> None:
        if not self.page.locator('#upload input[type=file]').count():
            self.page.click('#upload button[aria-label="Clear"]')
        self.page.set_input_files(
            '#upload input[type=file]', {'name': name, 'mimeType': 'image/png', 'buffer': content}
        )

    def restore(self) -> None:
        self.page.click('#restore:not([disabled])')
        self.page.wait_for_selector('#slider img')

    def download(self) -> Any:
        with self.page.expect_download() as waiting:
            self.page.click('#download:not([disabled])')
        return waiting.value

    def status(self, kind: str = 'info') -> str:
        return str(self.page.locator(f'#status .{kind}').first.inner_text())


@pytest.fixture
def visit(chromium: Any, server: Running, request: pytest.FixtureRequest) -> Iterator[Visitor]:
    """A page as wide as the test's parameter says; afterwards: it asked no other server for anything."""
    width, height = SIZES[request.param]
    phone = request.param == 'phone'
    context = chromium.new_context(
        viewport={'width': width, 'height': height}, is_mobile=phone, has_touch=phone,
        device_scale_factor=2 if phone else 1,
    )  # fmt: skip
    visitor = Visitor(context, server)
    yield visitor
    wide = visitor.page.evaluate('document.documentElement.scrollWidth')
    context.close()
    foreign = [
        url
        for url in visitor.requests
        if not url.startswith((f'{server.url}/', 'data:', f'blob:{server.url}/'))
    ]
    assert foreign == []
    assert visitor.complaints == []
    assert wide <= width, 'the page is wider than the window'


@pytest.mark.parametrize('visit', SIZES, indirect=True)
def test_an_image_is_dropped_restored_compared_and_downloaded(visit: Visitor, server: Running) -> None:
    page, image = visit.page, pixels(240, 320)
    assert page.locator('#restore').is_disabled()
    assert page.locator('#download').is_disabled()
    visit.drop('my image.png', png(image))
    until(lambda: page.locator('#restore').is_enabled())
    assert visit.status() == 'PNG, 320×240 pixels'
    visit.restore()
    assert re.fullmatch(r'Restored 320×240 pixels in [0-9.]+ s', visit.status())

    before, after = page.locator('#slider img').all()
    shown = [requests.get(one.get_attribute('src'), timeout=PATIENCE).content for one in (before, after)]
    assert np.array_equal(decoded(shown[0]), image)
    assert np.abs(decoded(shown[1]).astype(int) - darker(image)).max() <= 1
    box = page.locator('#slider .slider-wrap').bounding_box()
    assert clipped(after) == pytest.approx(50, abs=1)
    page.locator('#slider').scroll_into_view_if_needed()
    handle = page.locator('#slider [data-testid=slider] .icon-wrap')
    box, wrap = handle.bounding_box(), page.locator('#slider .slider-wrap').bounding_box()
    page.mouse.move(box['x'] + box['width'] / 2, box['y'] + box['height'] / 2)
    page.mouse.down()
    page.mouse.move(wrap['x'] + 0.2 * wrap['width'], box['y'] + box['height'] / 2, steps=5)
    page.mouse.up()
    until(lambda: clipped(after) < 30)

    found = visit.download()
    assert found.suggested_filename == 'my image_deblurred.png'
    assert np.abs(decoded(Path(found.path()).read_bytes()).astype(int) - darker(image)).max() <= 1
    assert not list((server.folder / 'jobs').iterdir())


def clipped(image: Any) -> float:
    """The part of the image on the right that is hidden, in per cent of the width."""
    found = re.search(r'inset\(0px 0px 0px ([0-9.]+)%\)', image.get_attribute('style'))
    assert found is not None
    return float(found[1])


@pytest.mark.parametrize('visit', ['desk'], indirect=True)
def test_the_settings_are_used(visit: Visitor) -> None:
    page, image = visit.page, pixels(200, 200)
    visit.drop('a.png', png(image))
    page.click('#settings button')
    page.get_by_label('Strength').and_(page.locator('input[type=number]')).fill('0.5')
    page.keyboard.press('Tab')
    for label, choice in (('Model', 'other'), ('Tile', '256'), ('Precision', 'fp32')):
        page.get_by_role('combobox', name=label).click()
        page.get_by_role('option', name=choice, exact=True).click()
    visit.restore()
    half = (image.astype(float) + darker(image)) / 2
    assert np.abs(decoded(Path(visit.download().path()).read_bytes()) - half).max() <= 1


@pytest.mark.parametrize('visit', SIZES, indirect=True)
def test_other_files_or_too_large_images_gets_a_sentence(visit: Visitor) -> None:
    page = visit.page
    visit.drop('note.png', b'a text, whatever it is called')
    assert visit.status('error') == 'note.png is not an image; JPEG, PNG, TIFF, WebP and BMP can be read'
    assert page.locator('#restore').is_disabled()
    visit.drop('wide.png', png(np.zeros((10, 40_000, 3), np.uint8)))
    until(lambda: 'wide.png' in visit.status('error'))
    assert visit.status('error') == 'wide.png has 40000×10 pixels; this server takes at most 0.3 megapixels'
    visit.drop('big.png', b'x' * 400_001)
    page.wait_for_selector('text=exceed the maximum allowed size')
    assert page.locator('#restore').is_disabled()
    # After all that, an image is restored.
    visit.drop('a.png', png(pixels()))
    visit.restore()


def test_an_image_that_browsers_do_not_show_is_shown(chromium: Any, server: Running) -> None:
    """A 16-bit TIFF: the slider has 8 bits, the download 16."""
    import tifffile

    context = chromium.new_context()
    visitor = Visitor(context, server)
    image = pixels(200, 220).astype(np.uint16) * 257
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, image)
    visitor.drop('scan.tif', buffer.getvalue())
    visitor.restore()
    images = visitor.page.locator('#slider img').all()
    for one, expected in zip(images, (image, image - 0.1 * 65535), strict=True):
        until(lambda one=one: one.evaluate('image => image.naturalWidth') == 220)
        shown = requests.get(one.get_attribute('src'), timeout=PATIENCE)
        assert shown.headers['content-type'] == 'image/jpeg'
        assert np.abs(decoded(shown.content) - expected / 257).mean() < 3
    found = visitor.download()
    assert found.suggested_filename == 'scan_deblurred.tif'
    assert np.abs(tifffile.imread(found.path()) - (image - 0.1 * 65535)).max() <= 2
    context.close()


@pytest.mark.long
def test_ten_visitors_at_once_each_get_their_own_image(chromium: Any) -> None:
    held = Held()
    images = [pixels(120, 160, seed) for seed in range(10)]
    with running({'held': maker(held)}, LIMITS, page=True) as server:
        # A browser opens six connections to a server at most; ten people have ten browsers.
        contexts = [chromium.new_context() for _ in images]
        visitors = [Visitor(context, server) for context in contexts]
        for visitor, image in zip(visitors, images, strict=True):
            visitor.drop('a.png', png(image))
        for visitor in visitors:
            visitor.page.click('#restore:not([disabled])')
        until(lambda: len(server.service._waiting) == 9)
        visitors[9].page.wait_for_selector('text=waiting: 9 before this image')
        held.open.set()
        for visitor, image in zip(visitors, images, strict=True):
            visitor.page.wait_for_selector('#slider img')
            content = Path(visitor.download().path()).read_bytes()
            assert np.abs(decoded(content).astype(int) - darker(image)).max() <= 1
        assert held.together == 1
        for context in contexts:
            context.close()


@pytest.mark.long
def test_a_full_queue_and_a_visitor_who_leaves(chromium: Any) -> None:
    held = Held()
    with running({'held': maker(held)}, Limits(most_waiting=1), page=True) as server:
        contexts = [chromium.new_context() for _ in range(3)]
        first, second, third = (Visitor(context, server) for context in contexts)
        for visitor in (first, second, third):
            visitor.drop('a.png', png(pixels()))
        for count, visitor in enumerate((first, second)):
            visitor.page.click('#restore:not([disabled])')
            until(lambda count=count: held.calls and len(server.service._waiting) == count)
        third.page.click('#restore:not([disabled])')
        until(lambda: third.page.locator('#status .error').count())
        assert third.status('error').startswith('the queue is full: 1 images wait already')
        contexts[1].close()
        until(lambda: not server.service._waiting)
        third.page.click('#restore:not([disabled])')
        until(lambda: len(server.service._waiting) == 1)
        held.open.set()
        third.page.wait_for_selector('#slider img')
        first.page.wait_for_selector('#slider img')
        assert held.calls == 2
        for context in contexts:
            context.close()


# What the routes of the page refuse, without a browser


def upload(server: Running, content: bytes, name: str = 'a.png') -> Any:
    return requests.post(
        f'{server.url}/gradio_api/upload', files={'files': (name, content)}, timeout=PATIENCE
    )


def raw(server: Running, target: str, method: str = 'GET') -> tuple[int, bytes]:
    """Ask for a path exactly as it is written."""
    import http.client

    connection = http.client.HTTPConnection(server.url.removeprefix('http://'), timeout=PATIENCE)
    connection.putrequest(method, target)
    connection.putheader('Content-Length', '0')
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_files_outside_the_page_are_not_served(server: Running, tmp_path: Path) -> None:
    outside = tmp_path / 'secret.png'
    outside.write_bytes(png(pixels()))
    within = server.folder / 'jobs' / 'secret.png'
    within.write_bytes(b'x')
    inside = upload(server, png(pixels())).json()[0]
    assert raw(server, f'/gradio_api/file={inside}')[0] == 200
    up = '../' * 12
    for path in (
        '/etc/passwd', f'{outside}', f'{within}', f'{inside}/../../../../{up}etc/passwd',
        f'{server.folder}/page/{up}etc/passwd', f'{up}etc/passwd', f'%2e%2e/{up}etc/passwd', f'file://{outside}',
        f'http://{server.url[7:]}/docs', 'https://example.org/', f'{inside}%00.png', f'{server.folder}/page',
    ):  # fmt: skip
        status, content = raw(server, f'/gradio_api/file={path}')
        assert status in (403, 404), path
        assert b'root:' not in content
    for path in (
        f'/assets/{up}etc/passwd', f'/static/{up}etc/passwd', '/assets/..%2f..%2f..%2fgradio/routes.py',
        '/static/%2e%2e/%2e%2e/index.html', '/assets/..%5c..%5croutes.py', f'//{up}etc/passwd',
        '/svelte/../config', f'/gradio_api/file/{outside}', f'/file={outside}', f'/{up}etc/passwd',
    ):  # fmt: skip
        status, content = raw(server, path)
        assert status == 404, path
        assert b'root:' not in content
    within.unlink()


def test_routes_that_the_page_does_not_need_are_closed(server: Running) -> None:
    for path in (
        '/gradio_api/info', '/gradio_api/openapi.json', '/gradio_api/proxy=http://127.0.0.1/', '/monitoring',
        '/gradio_api/runs', '/gradio_api/run-history/buckets', '/gradio_api/deep_link', '/redoc', '/login',
        '/gradio_api/vibe-code', '/gradio_api/stream/a/b/1/playlist-file', '/gradio_api/queue/status',
    ):  # fmt: skip
        assert raw(server, path)[0] == 404, path
    for path in (
        '/gradio_api/run/restore', '/gradio_api/call/restore', '/gradio_api/api/restore', '/login',
        '/gradio_api/component_server', '/gradio_api/vibe-edit', '/gradio_api/process_recording', '/',
        '/gradio_api/run-history/connect', '/gradio_api/stream/x',
    ):  # fmt: skip
        assert raw(server, path, 'POST')[0] == 404, path


def join(server: Running, *data: Any, fn_index: int = 0) -> requests.Response:
    event = {'data': list(data), 'fn_index': fn_index, 'session_hash': 'test', 'event_data': None}
    return requests.post(f'{server.url}/gradio_api/queue/join', json=event, timeout=PATIENCE)


def test_events_name_no_files_but_uploaded_ones(server: Running, tmp_path: Path) -> None:
    outside = tmp_path / 'secret.png'
    outside.write_bytes(png(pixels()))
    meta = {'_type': 'gradio.FileData'}
    for path in (str(outside), f'{server.url}/docs', 'https://example.org/a.png', '/etc/passwd', 5, {}):
        one = {'path': path, 'meta': meta}
        for answer in (join(server, one), join(server, {'deep': [one]}), join(server, 1, one)):
            assert answer.status_code == 403
            assert answer.json() == {'detail': 'the request names a file that was not uploaded here'}
    inside = upload(server, png(pixels())).json()[0]
    assert join(server, {'path': inside, 'meta': meta}).status_code == 200
    address = f'{server.url}/gradio_api/queue/join'
    assert requests.post(address, data=b'{', timeout=PATIENCE).status_code == 400
    assert requests.post(address, data=b'[' * 50_000, timeout=PATIENCE).status_code == 400
    assert requests.post(address, data=b' ' * 10**6, timeout=PATIENCE).status_code == 413


def test_uploads_to_the_page_are_bounded_and_stay_in_the_folder(server: Running) -> None:
    for content, name in ((b'x' * 400_001, 'a.png'), (b'x' * 3_000_000, 'a.png')):
        assert upload(server, content, name).status_code == 413
    several = [('files', (f'{i}.png', b'x' * 200_000)) for i in range(10)]
    answer = requests.post(f'{server.url}/gradio_api/upload', files=several, timeout=PATIENCE)
    assert answer.status_code == 413
    for name in ('../../../evil.png', '/tmp/evil.png', '..\\..\\evil.png', '....//evil.png'):
        path = Path(upload(server, b'x', name).json()[0])
        assert path.resolve().is_relative_to(server.folder / 'page')


def test_files_of_the_page_are_removed_after_a_time() -> None:
    with running({'darker': maker()}, LIMITS, page=True, keep=1.0) as server:
        path = upload(server, png(pixels())).json()[0]
        assert raw(server, f'/gradio_api/file={path}')[0] == 200
        until(lambda: not [one for one in (server.folder / 'page').rglob('*') if one.is_file()])
        assert raw(server, f'/gradio_api/file={path}')[0] in (403, 404)


def test_an_upload_that_is_gone_is_reported() -> None:
    from dsgformer_arch.serving.page import _uploaded
    from dsgformer_arch.utils.errors import UserError

    class Everything:
        def contains(self, path: str) -> bool:
            return True

    with pytest.raises(UserError, match=r'^a\.png is no longer on this server; drop it again$'):
        _uploaded(Everything(), '/nowhere/a.png')  # type: ignore[arg-type]


def test_addresses_follow_the_reverse_proxy(server: Running) -> None:
    headers = {'X-Forwarded-Host': 'deblur.example.org', 'X-Forwarded-Proto': 'https'}
    answer = requests.get(server.url, headers=headers, timeout=PATIENCE)
    assert '"root":"https://deblur.example.org"' in answer.text


def test_the_page_sends_and_loads_nothing(server: Running) -> None:
    answer = requests.get(server.url, timeout=PATIENCE)
    config = json.loads(re.search(r'window.gradio_config = (\{.*?\});</script>', answer.text)[1])  # type: ignore[index]
    assert config['analytics_enabled'] is False
    assert not config.get('run_history')
    loaded = re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(https?:)?//', answer.text)
    assert loaded == []
