"""`dsgformer serve` as a process: how it starts, what it opens, and how it ends."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import requests
from PIL import Image

from dsgformer_arch import Deblurrer, zoo
from dsgformer_arch.cli import dsgformer
from dsgformer_arch.inference.images import Output, open_image
from dsgformer_arch.serving.server import is_local
from tests.serving.running import PATIENCE, decoded, pixels, png, until

pytest.importorskip('gradio', reason='needs the extra web')

STARTS = 180.0
"""Seconds that a busy machine may take to start a server."""

WATCHED = """
import os, sys

def watch(event, arguments):
    if event == 'socket.connect':
        told = arguments[1]
    elif event == 'socket.getaddrinfo':
        told = arguments[0]
    else:
        return
    with open(os.environ['WATCHED'], 'a') as file:
        file.write(repr(told) + '\\n')

sys.addaudithook(watch)
from dsgformer_arch.cli.dsgformer import main
sys.exit(main())
"""
"""What pip installs as `dsgformer`, with every connection and every look-up of a name written down."""


class Process:
    """A running `dsgformer serve`."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.temporary, self.watched = folder / 'temporary', folder / 'watched'
        self.temporary.mkdir()
        self.watched.touch()
        script = folder / 'dsgformer'  # under this name the package registers nothing by itself
        script.write_text(WATCHED)
        environment = {
            **os.environ, 'TMPDIR': str(self.temporary), 'WATCHED': str(self.watched),
            'DSGFORMER_HOME': str(folder / 'home'), 'PYTHONPATH': str(Path(__file__).parents[2]),
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, str(script), 'serve', '--port', '0', '--device', 'cpu', *arguments],
            env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.lines: list[str] = []
        self.errors: list[str] = []
        for stream, lines in ((self.process.stdout, self.lines), (self.process.stderr, self.errors)):
            threading.Thread(
                target=lambda stream=stream, lines=lines: lines.extend(stream), daemon=True
            ).start()

    @property
    def url(self) -> str:
        end = time.monotonic() + STARTS
        while time.monotonic() < end:
            assert self.process.poll() is None, ''.join(self.errors)
            for line in self.lines:
                if found := re.fullmatch(r'DSGformer serves on (http://\S+)/ \(Ctrl-C ends it\)\n', line):
                    return found[1].replace('0.0.0.0', '127.0.0.1')
            time.sleep(0.05)
        raise AssertionError(f'not started: {"".join(self.errors)}')

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    started: list[Process] = []

    def call(*arguments: str) -> Process:
        started.append(Process(tmp_path, *arguments))
        return started[-1]

    yield call
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()


def test_it_serves_from_its_folder_opens_no_connection_and_ends_cleanly(start: Any) -> None:
    server = start('--threads', '1', '--max-pixels', '20000000')
    url = server.url
    assert url.startswith('http://127.0.0.1:')
    assert not server.errors
    assert 'Restore' in requests.get(url, timeout=PATIENCE).text
    image = pixels(160, 200)
    answer = requests.post(f'{url}/api/deblur', data=png(image), timeout=PATIENCE)
    assert np.array_equal(decoded(answer.content), Deblurrer(device='cpu').restore(image))
    path = requests.post(
        f'{url}/gradio_api/upload', files={'files': ('a.png', png(image))}, timeout=PATIENCE
    ).json()[0]
    assert Path(path).is_relative_to(server.temporary)
    # Ended while one image is restored and another one waits: both are told.
    large = png(np.tile(image, (25, 20, 1)))
    with ThreadPoolExecutor(2) as pool:
        waiting = [
            pool.submit(requests.post, f'{url}/api/deblur?tile=64', data=large, timeout=PATIENCE)
            for _ in range(2)
        ]
        until(lambda: len(list(server.temporary.glob('*/jobs/*/source'))) == 2)
        time.sleep(1)
        assert server.end(signal.SIGTERM) == 0
        for one in waiting:
            assert one.result().status_code == 503
            assert one.result().json() == {'detail': 'the server is shutting down'}
    assert not list(server.temporary.glob('dsgformer-serve-*'))
    assert server.watched.read_text() == ''
    assert 'Traceback' not in ''.join(server.errors)


@pytest.mark.long
def test_an_interrupt_ends_it_with_status_0_though_a_page_is_open(start: Any) -> None:
    file = Path(zoo.__file__).parents[1] / 'weights' / 'dsgformer_h.safetensors'
    server = start('--host', '0.0.0.0', '--weights', str(file))
    url = server.url
    assert server.errors == [
        'warning: --host 0.0.0.0 lets anyone on the network use this server and send it images\n'
    ]
    description = requests.get(f'{url}/openapi.json', timeout=PATIENCE).json()
    parameters = {one['name']: one for one in description['paths']['/api/deblur']['post']['parameters']}
    assert parameters['model']['schema']['enum'] == ['dsgformer_h.safetensors']
    with requests.get(f'{url}/gradio_api/heartbeat/visitor', stream=True, timeout=PATIENCE) as answer:
        assert next(answer.iter_content(5)) == b'data:'
        assert server.end(signal.SIGINT) == 0
    assert not list(server.temporary.glob('dsgformer-serve-*'))
    assert server.watched.read_text() == ''


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        dsgformer.main(['serve', '--port', '0', *arguments])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_a_port_in_use_is_reported_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = str(taken.getsockname()[1])
        assert refused(capsys, '--port', port) == (
            f'error: cannot listen on 127.0.0.1, port {port}: address already in use; choose another --port, '
            'or 0 for a free one\n'
        )


def test_wrong_options_are_reported_in_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv('DSGFORMER_HOME', str(tmp_path))
    threads = threading.active_count()
    assert 'no.such.host' in refused(capsys, '--host', 'no.such.host.invalid')
    assert "there is no system 'nafnet99'" in refused(capsys, '--model', 'nafnet99')
    assert 'dsgformer weights get restormer/motion' in refused(capsys, '--model', 'restormer/motion')
    assert 'there is no such file of weights' in refused(capsys, '--weights', str(tmp_path / 'mine.pth'))
    assert 'no device' in refused(capsys, '--device', 'abacus')
    for arguments in (('--port', '70000'), ('--queue', '-1'), ('--max-bytes', '0'), ('--threads', 'x')):
        assert arguments[0] in refused(capsys, *arguments)
    assert threading.active_count() == threads
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None if name == 'gradio' else 1)
    assert refused(capsys) == (
        'error: dsgformer serve needs gradio; install it with: pip install "dsgformer[web]"\n'
    )


def test_what_only_this_machine_reaches() -> None:
    assert all(is_local(host) for host in ('127.0.0.1', 'localhost', '::1', '127.0.0.2'))
    assert not any(is_local(host) for host in ('0.0.0.0', '::', '192.168.1.4', 'example.org'))


@pytest.mark.long
def test_a_hundred_requests_eight_at_a_time(start: Any, record_property: Any) -> None:
    """None is lost, each gets its own result, and memory stays flat."""
    server = start('--threads', '1', '--queue', '5')
    url = server.url
    formats = ('PNG', 'JPEG', 'WEBP', 'TIFF', 'BMP')
    images = [pixels(128 + 16 * (i % 3), 160, i) for i in range(10)]
    restorer = Deblurrer(device='cpu')
    contents, expected = [], []
    for number, image in enumerate(images):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, formats[number % 5])
        contents.append(buffer.getvalue())
        opened = open_image(contents[-1])
        output = Output(opened, None, opened.format)
        for band in restorer.bands(opened.rows, opened.size):
            output.write(band)
        output.finish()
        expected.append(decoded(output.content))

    def send(number: int) -> int:
        tries = 1
        while True:
            answer = requests.post(f'{url}/api/deblur', data=contents[number % 10], timeout=PATIENCE)
            if answer.status_code != 503:
                break
            tries += 1
            time.sleep(0.1)
        assert answer.status_code == 200, answer.text
        assert np.array_equal(decoded(answer.content), expected[number % 10])
        return tries

    def memory() -> float:
        return psutil.Process(server.process.pid).memory_info().rss / 2**20

    begun = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        tries = list(pool.map(send, range(20)))
        early = memory()
        tries += list(pool.map(send, range(20, 100)))
        late = memory()
    seconds = time.monotonic() - begun
    told = {
        'requests': len(tries), 'retries': sum(tries) - len(tries), 'seconds': round(seconds, 1),
        'MiB after 20': round(early), 'MiB after 100': round(late),
    }  # fmt: skip
    print(json.dumps(told))
    record_property('load', json.dumps(told))
    assert len(tries) == 100
    assert late < early + 40
    assert not list(server.temporary.glob('*/jobs/*'))
    assert server.end(signal.SIGTERM) == 0
