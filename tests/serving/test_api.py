"""`POST /api/deblur` over a socket: results, every refusal, and what is left behind."""

from __future__ import annotations

import io
import json
import socket
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import requests
from PIL import Image
from torch import Tensor

from dsgformer_arch.inference.images import open_image
from dsgformer_arch.serving.service import Limits
from tests.serving.running import (
    PATIENCE,
    Darker,
    Held,
    Running,
    darker,
    decoded,
    maker,
    pixels,
    png,
    running,
    until,
)

pytest.importorskip('fastapi', reason='needs the extra web')

LIMITS = Limits(most_bytes=300_000, most_pixels=100_000, most_waiting=2)


@pytest.fixture(scope='module')
def server() -> Iterator[Running]:
    with running({'darker': maker(), 'other': maker()}, LIMITS) as found:
        yield found


def post(server: Running, query: str = '', **kwargs: Any) -> requests.Response:
    return requests.post(f'{server.url}/api/deblur{query}', timeout=PATIENCE, **kwargs)


def encoded(image: np.ndarray[Any, Any], format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format, **options)
    return buffer.getvalue()


def left(server: Running) -> list[Path]:
    return [path for path in server.folder.rglob('*') if path.is_file()]


@pytest.mark.parametrize(
    ('format', 'kind', 'suffix'),
    [
        ('PNG', 'image/png', 'png'),
        ('JPEG', 'image/jpeg', 'jpg'),
        ('TIFF', 'image/tiff', 'tif'),
        ('WEBP', 'image/webp', 'webp'),
        ('BMP', 'image/bmp', 'bmp'),
    ],
)
def test_an_image_comes_back_restored_in_its_format(
    server: Running, format: str, kind: str, suffix: str
) -> None:
    image = pixels()
    options = {'lossless': True} if format == 'WEBP' else {'quality': 98} if format == 'JPEG' else {}
    content = encoded(image, format, **options)
    answer = post(server, files={'image': (f'my holiday.{suffix}', content)})
    assert answer.status_code == 200, answer.text
    assert answer.headers['content-type'] == kind
    assert f'my%20holiday_deblurred.{suffix}' in answer.headers['content-disposition']
    assert float(answer.headers['deblur-seconds']) >= 0
    assert Image.open(io.BytesIO(answer.content)).format == format
    difference = decoded(answer.content).astype(int) - darker(decoded(content))
    assert np.abs(difference).max() <= (12 if format == 'JPEG' else 1)
    # The same bytes as the body of the request give the same result.
    raw = post(server, data=content, headers={'Content-Type': kind})
    assert raw.content == answer.content
    until(lambda: not left(server))


def test_16_bits_stay_16_bits(server: Running, tmp_path: Path) -> None:
    import tifffile

    image = pixels().astype(np.uint16) * 257
    tifffile.imwrite(tmp_path / 'deep.tif', image)
    answer = post(server, data=(tmp_path / 'deep.tif').read_bytes())
    opened = open_image(answer.content)
    assert opened.dtype == np.uint16
    restored = opened.rows(0, 48)
    assert np.abs(restored - (image - 0.1 * 65535)).max() <= 2


def test_settings_come_from_the_query_or_from_fields(server: Running) -> None:
    image = pixels()
    half = (image.astype(float) + darker(image)) / 2
    for answer in (
        post(server, '?strength=0.5&tile=64&precision=fp32&model=other', data=png(image)),
        post(server, '?tile=64', files={'image': png(image)}, data={'strength': '0.5', 'model': 'other'}),
        post(server, files={'image': png(image)}, data={'strength': '0.5', 'tile': 'auto'}),
    ):
        assert answer.status_code == 200, answer.text
        assert np.abs(decoded(answer.content) - half).max() <= 1


def test_notes_report_deviations(server: Running) -> None:
    content = encoded(pixels(), 'PNG')
    assert 'deblur-notes' not in post(server, data=content).headers
    buffer = io.BytesIO()
    Image.fromarray(pixels()).convert('CMYK').save(buffer, 'JPEG')
    answer = post(server, data=buffer.getvalue())
    assert json.loads(answer.headers['deblur-notes']) == ['converted from CMYK to sRGB']


def huge_png() -> bytes:
    """A header that claims 30000×30000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    header = struct.pack('>IIBBBBB', 30000, 30000, 8, 2, 0, 0, 0)
    return (
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', header)
        + chunk(b'IDAT', zlib.compress(b'\0' * 1000))
        + chunk(b'IEND', b'')
    )


def animation() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.fromarray(pixels(seed=seed)) for seed in range(2)]
    frames[0].save(buffer, 'WEBP', save_all=True, append_images=frames[1:])
    return buffer.getvalue()


@pytest.mark.parametrize(
    ('query', 'request_', 'status', 'sentence'),
    [
        ('', {}, 400, 'the request has no image'),
        ('', {'files': {'photo': b'x'}}, 400, 'in the field image'),
        ('', {'files': [('image', b'x'), ('image', b'y')]}, 400, 'Too many files'),
        ('', {'data': b'--x', 'headers': {'Content-Type': 'multipart/form-data; boundary=y'}}, 400, ''),
        ('', {'data': b'--x', 'headers': {'Content-Type': 'multipart/form-data'}}, 400, 'boundary'),
        ('', {'files': {'image': ('note.png', b'a text\n')}}, 415, 'note.png is not an image; JPEG, PNG'),
        ('', {'files': {'image': ('../../etc/passwd', b'a')}}, 415, 'passwd is not an image'),
        ('', {'files': {'image': ('empty.png', b'')}}, 415, 'empty.png is empty'),
        ('', {'data': encoded(pixels(), 'GIF')}, 415, 'is not an image'),
        ('', {'data': animation()}, 415, 'animation of 2 frames'),
        ('', {'data': png(pixels())[:-300]}, 415, 'cannot be read'),
        ('', {'data': huge_png()}, 413, '30000×30000 pixels; this server takes at most 0.1 megapixels'),
        ('', {'data': b'x' * 310_000}, 413, 'at most 0.3 MB'),
        ('', {'data': b'x' * 5_000_000}, 413, 'at most 0.3 MB'),
        ('', {'data': iter([b'x' * 100_000] * 50)}, 413, 'at most 0.3 MB'),
        ('', {'files': {'image': ('big.png', b'x' * 5_000_000)}}, 413, 'at most 0.3 MB'),
        ('?strength=2', {}, 422, 'strength: input should be less than or equal to 1'),
        ('?strength=nan', {}, 422, 'strength: '),
        ('?strenght=1', {}, 422, "no parameter 'strenght'; there are model, strength, tile, precision"),
        ('?tile=63', {}, 422, 'tile: give auto or a number of pixels from 64 up'),
        ('?precision=fp64', {}, 422, "precision: input should be 'auto'"),
        ('?model=nafnet32', {'data': png(pixels())}, 422, "no model 'nafnet32' on this server"),
        ('?model=/etc/passwd', {'data': png(pixels())}, 422, "no model '/etc/passwd'"),
        ('', {'files': {'image': b'x'}, 'data': {'tile': '9'}}, 422, 'tile: give auto'),
        ('', {'files': {'image': b'x'}, 'data': {'path': '/'}}, 422, "no parameter 'path'"),
    ],
)
def test_every_refusal_is_reported_in_one_sentence(
    server: Running, query: str, request_: dict[str, Any], status: int, sentence: str
) -> None:
    answer = post(server, query, **request_)
    assert answer.status_code == status, answer.text
    assert answer.json().keys() == {'detail'}
    assert sentence in answer.json()['detail']
    assert '\n' not in answer.json()['detail']
    assert str(server.folder) not in answer.text
    until(lambda: not left(server))


def test_only_post_is_answered(server: Running) -> None:
    for method in ('GET', 'PUT', 'DELETE'):
        answer = requests.request(method, f'{server.url}/api/deblur', timeout=PATIENCE)
        assert (answer.status_code, answer.headers['allow']) == (405, 'POST')
        assert answer.json() == {'detail': 'send the image with POST'}


def test_a_sender_that_waits_for_leave_does_not_get_it(server: Running) -> None:
    address = server.url.removeprefix('http://').split(':')
    with socket.create_connection((address[0], int(address[1])), PATIENCE) as connection:
        connection.sendall(
            b'POST /api/deblur HTTP/1.1\r\nHost: x\r\nContent-Length: 900000000\r\n'
            b'Expect: 100-continue\r\n\r\n'
        )
        assert connection.recv(4096).startswith(b'HTTP/1.1 413 ')


def test_a_full_queue_is_reported_at_once_and_no_one_else_suffers() -> None:
    held = Held()
    with running({'held': maker(held)}, LIMITS) as server, ThreadPoolExecutor(3) as pool:
        image = pixels()
        waiting = [pool.submit(post, server, data=png(image)) for _ in range(3)]
        until(lambda: not_full(server))
        for request in ({'data': png(image)}, {'data': b'x' * 5_000_000}):
            answer = post(server, **request)
            assert answer.status_code in (503, 413)
            assert answer.status_code == 413 or answer.headers['retry-after'] == '5'
        assert post(server, data=png(image)).json()['detail'].startswith('the queue is full: 2 images wait')
        held.open.set()
        for one in waiting:
            assert np.abs(decoded(one.result().content).astype(int) - darker(image)).max() <= 1
        assert held.together == 1
        assert post(server, data=png(image)).status_code == 200


def not_full(server: Running) -> bool:
    try:
        server.service.refuse_if_full()
    except Exception:
        return True
    return False


def test_an_image_whose_sender_went_away_is_dropped() -> None:
    held = Held()
    with running({'held': maker(held)}, LIMITS) as server, ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, server, data=png(pixels()))
        assert held.began.wait(PATIENCE)
        host, port = server.url.removeprefix('http://').split(':')
        body = png(pixels())
        with socket.create_connection((host, int(port)), PATIENCE) as connection:
            head = f'POST /api/deblur HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n'
            connection.sendall(head.encode() + body)
            until(lambda: len(list((server.folder / 'jobs').iterdir())) == 2)
            until(lambda: len(server.service._waiting) == 1)
        until(lambda: not server.service._waiting)
        held.open.set()
        assert first.result().status_code == 200
        until(lambda: not left(server))
        assert held.calls == 1


def test_a_fault_of_the_program_is_a_sentence_and_the_next_image_is_restored() -> None:
    class Failing(Darker):
        fails = True

        def forward_padded(self, x: Tensor) -> Tensor:
            if self.fails:
                raise RuntimeError('secret of the server')
            return super().forward_padded(x)

    network = Failing()
    with running({'failing': maker(network)}, LIMITS) as server:
        answer = post(server, data=png(pixels()))
        assert answer.status_code == 500
        assert answer.json() == {'detail': 'the server failed to restore this image; its log says why'}
        network.fails = False
        assert post(server, data=png(pixels())).status_code == 200
        until(lambda: not left(server))


def test_a_server_whose_folder_is_full_takes_no_files(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('dsgformer_arch.serving.folder.SPARE', 10**18)
    answer = post(server, data=png(pixels()))
    assert answer.status_code == 503
    assert 'as many files as it may' in answer.json()['detail']


def test_the_description_says_what_the_server_does(server: Running) -> None:
    description = requests.get(f'{server.url}/openapi.json', timeout=PATIENCE).json()
    assert description['openapi'].startswith('3.')
    post_ = description['paths']['/api/deblur']['post']
    parameters = {one['name']: one['schema'] for one in post_['parameters']}
    assert set(parameters) == {'model', 'strength', 'tile', 'precision'}
    assert parameters['model']['enum'] == ['darker', 'other']
    assert (parameters['strength']['minimum'], parameters['strength']['maximum']) == (0, 1)
    assert set(post_['responses']) == {'200', '400', '413', '415', '422', '500', '503'}
    assert set(post_['responses']['200']['content']) == {
        'image/jpeg', 'image/png', 'image/tiff', 'image/webp', 'image/bmp'
    }  # fmt: skip
    form = post_['requestBody']['content']['multipart/form-data']['schema']
    assert form['required'] == ['image']
    assert set(form['properties']) == {'image', *parameters}
    for reference in {
        one['content']['application/json']['schema']['$ref']
        for status, one in post_['responses'].items()
        if status != '200'
    }:
        schema = description['components']['schemas'][reference.rpartition('/')[2]]
        jsonschema.validate(post(server).json(), schema)
    assert list(description['paths']) == ['/api/deblur']


def test_the_page_about_the_api_needs_nothing_else(server: Running) -> None:
    answer = requests.get(f'{server.url}/docs', timeout=PATIENCE)
    assert 'POST /api/deblur' in answer.text
    assert 'strength' in answer.text
    for part in ('<script', 'http://', 'https://', 'src='):
        assert part not in answer.text


def test_answers_forbid_browsers_to_load_from_elsewhere(server: Running) -> None:
    for path in ('/docs', '/openapi.json', '/nothing'):
        headers = requests.get(server.url + path, timeout=PATIENCE).headers
        assert headers['content-security-policy'].startswith("default-src 'self'; ")
        assert headers['x-content-type-options'] == 'nosniff'
