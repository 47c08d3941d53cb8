"""Official weights: downloads from a server on the loopback interface, checks and the cache."""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from dsgformer_arch import zoo
from dsgformer_arch.inference import official_weights
from dsgformer_arch.inference.official_weights import BLOCK, OfficialWeights
from dsgformer_arch.utils.errors import UserError


class Server(ThreadingHTTPServer):
    """A file server with ranges, whose connections can break.

    Attributes:
        content: the file.
        cut: bytes after which each of the next connections breaks.
        statuses: what the next requests are answered with instead of the file.
        requests: the `Range` header of each request.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__(('127.0.0.1', 0), Handler)
        self.content, self.etag = content, '"1"'
        self.cut: list[int] = []
        self.statuses: list[int] = []
        self.requests: list[str | None] = []
        self.ranges = True

    @property
    def url(self) -> str:
        return f'http://127.0.0.1:{self.server_port}/weights.pth'


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        wanted = self.headers.get('Range')
        self.server.requests.append(wanted)
        if self.server.statuses:
            self.send_response(self.server.statuses.pop(0))
            self.send_header('Content-Length', '0')
            self.end_headers()
            return
        content, start = self.server.content, 0
        fresh = self.headers.get('If-Range') in (None, self.server.etag)
        if wanted and fresh and self.server.ranges:
            start = int(wanted.removeprefix('bytes=').rstrip('-'))
        self.send_response(206 if start else 200)
        self.send_header('ETag', self.server.etag)
        self.send_header('Content-Length', str(len(content) - start))
        self.end_headers()
        end = self.server.cut.pop(0) if self.server.cut else len(content)
        self.wfile.write(content[start:end])
        self.close_connection = True


def checkpoint(system: str) -> bytes:
    torch.manual_seed(0)
    file = io.BytesIO()
    torch.save({'params': zoo.create(system).state_dict()}, file)
    return file.getvalue()


@pytest.fixture(scope='module')
def content() -> bytes:
    return checkpoint('dsgformer_t')


@pytest.fixture
def server(content: bytes) -> Iterator[Server]:
    server = Server(content)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('DSGFORMER_HOME', str(tmp_path / 'home'))
    monkeypatch.setattr(official_weights, 'RETRY_SECONDS', 0.0)


def weights(server: Server, **changes: Any) -> OfficialWeights:
    return OfficialWeights(
        **{'system': 'dsgformer_t', 'name': 'motion', 'trained_on': 'GoPro', 'page': 'https://a.page',
           'url': server.url, **changes}
    )  # fmt: skip


def left(tmp_path: Path) -> set[str]:
    """Names of the files in the cache, locks left out."""
    return {path.name for path in (tmp_path / 'home').rglob('*') if path.is_file() and path.suffix != '.lock'}


def test_the_table_names_systems_of_the_zoo_once_each() -> None:
    keys = [entry.key for entry in official_weights.TABLE]
    assert len(keys) == len(set(keys))
    for entry in official_weights.TABLE:
        assert zoo.get(entry.system).licence == entry.licence
        assert entry.page.startswith('https://')
        assert entry.url is None or entry.url.startswith('https://')
    systems = {entry.system for entry in official_weights.TABLE}
    architectures = {zoo.get(name).architecture for name in zoo.names()} - {'DSGformer'}
    assert {zoo.get(name).architecture for name in systems} == architectures


def test_a_system_alone_means_its_first_checkpoint() -> None:
    assert official_weights.find('restormer').key == 'restormer/motion'
    assert official_weights.find('restormer/deraining').trained_on == 'Rain13K'


@pytest.mark.parametrize(
    ('key', 'hint'), [('restormer/motoin', 'restormer/motion'), ('restromer', 'restormer'), ('x', 'list')]
)
def test_unknown_keys_are_refused_with_a_hint(key: str, hint: str) -> None:
    with pytest.raises(UserError, match=hint):
        official_weights.find(key)


def test_a_download_is_kept_and_not_repeated(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    path = official_weights.get(weights(server), lambda *progress: seen.append(progress))
    assert path.read_bytes() == server.content
    assert seen[-1] == (len(server.content), len(server.content))
    assert official_weights.get(weights(server)) == path
    assert len(server.requests) == 1
    assert left(tmp_path) == {'motion.pth', 'motion.pth.json'}


def test_a_broken_connection_is_resumed_where_it_ended(server: Server) -> None:
    server.cut = [2 * BLOCK + 5, 4 * BLOCK + 5]
    path = official_weights.get(weights(server))
    assert path.read_bytes() == server.content
    assert server.requests == [None, f'bytes={2 * BLOCK}-', f'bytes={4 * BLOCK}-']


def test_an_interrupted_command_is_resumed_by_the_next(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        official_weights.get(weights(server), interrupt)
    path = official_weights.get(weights(server))
    assert path.read_bytes() == server.content
    assert server.requests[1] == f'bytes={BLOCK}-'


def test_a_file_that_changed_in_between_is_fetched_from_the_start(server: Server) -> None:
    server.cut = [2 * BLOCK]

    def replace(done: int, total: int | None) -> None:
        if server.etag == '"1"':
            server.content, server.etag = checkpoint('dsgformer_s'), '"2"'

    assert official_weights.get(weights(server), replace).read_bytes() == server.content
    assert server.requests == [None, f'bytes={2 * BLOCK}-']


def test_a_server_without_ranges_sends_the_whole_file_again(server: Server) -> None:
    server.cut, server.ranges = [100_000], False
    assert official_weights.get(weights(server)).read_bytes() == server.content


def test_a_busy_server_is_asked_again(server: Server) -> None:
    server.statuses = [503, 429]
    assert official_weights.get(weights(server)).read_bytes() == server.content
    assert len(server.requests) == 3


def test_a_missing_file_is_not_asked_for_again_and_the_page_is_named(server: Server) -> None:
    server.statuses = [404]
    with pytest.raises(UserError, match=r'404.*https://a\.page.*motion\.pth'):
        official_weights.get(weights(server))
    assert len(server.requests) == 1


def test_no_network_is_reported_in_one_sentence(server: Server) -> None:
    with pytest.raises(UserError, match=r'no connection to 127\.0\.0\.1'):
        official_weights.get(weights(server, url='http://127.0.0.1:9/weights.pth'))


def test_a_connection_that_always_breaks_leaves_what_it_got(server: Server, tmp_path: Path) -> None:
    server.cut = [BLOCK * (i + 1) for i in range(5)]
    with pytest.raises(UserError, match=r'ended early|no connection'):
        official_weights.get(weights(server))
    assert (tmp_path / 'home/weights/dsgformer_t/motion.pth.part').stat().st_size == 5 * BLOCK


def test_a_page_instead_of_a_file_is_recognised(server: Server, tmp_path: Path) -> None:
    server.content = b'<!DOCTYPE html><html>quota exceeded</html>'
    with pytest.raises(UserError, match='a page instead of the file'):
        official_weights.get(weights(server))
    assert not {name for name in left(tmp_path) if name.endswith(('.pth', '.part'))}


@pytest.mark.parametrize('damage', ['truncated', 'another system', 'no checkpoint'])
def test_another_file_never_enters_the_cache(server: Server, tmp_path: Path, damage: str) -> None:
    entry = weights(server)
    if damage == 'truncated':
        server.content = server.content[:-1000]
    elif damage == 'no checkpoint':
        server.content = b'x' * 1000
    else:
        entry = weights(server, system='nafnet32')
    with pytest.raises(UserError):
        official_weights.get(entry)
    assert left(tmp_path) == set()


def test_a_published_hash_is_demanded(server: Server, tmp_path: Path) -> None:
    right = hashlib.sha256(server.content).hexdigest()
    with pytest.raises(UserError, match='SHA-256'):
        official_weights.get(weights(server, sha256='0' * 64))
    assert left(tmp_path) == set()
    assert official_weights.get(weights(server, sha256=right)).is_file()


def test_the_first_hash_is_recorded_and_demanded_from_then_on(server: Server) -> None:
    path = official_weights.get(weights(server))
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(UserError, match='weights remove dsgformer_t/motion'):
        official_weights.get(weights(server))


def test_what_no_program_can_download_names_page_and_place(server: Server, content: bytes) -> None:
    entry = weights(server, url=None)
    with pytest.raises(UserError, match=r'https://a\.page.*motion\.pth'):
        official_weights.get(entry)
    path = official_weights.place(entry)
    path.write_bytes(content)
    assert official_weights.get(entry) == path


def test_removing_deletes_the_file_and_its_record(server: Server, tmp_path: Path) -> None:
    official_weights.get(weights(server))
    assert official_weights.remove(weights(server))
    assert left(tmp_path) == set()
    assert not official_weights.remove(weights(server))


def test_a_cache_that_cannot_be_written_is_named(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / 'file').write_text('', encoding='utf-8')
    monkeypatch.setenv('DSGFORMER_HOME', str(tmp_path / 'file'))
    with pytest.raises(UserError, match='DSGFORMER_HOME'):
        official_weights.get(weights(server))
