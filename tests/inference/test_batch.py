"""`dsgformer batch`: its parts without a cluster, and whole jobs on a local Ray cluster (long).

The jobs run in processes of their own: a cluster ends with its driver.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from PIL import Image

from dsgformer_arch import Deblurrer
from dsgformer_arch.cli import dsgformer
from dsgformer_arch.cli.commands.batch import Maker
from dsgformer_arch.inference import batch
from dsgformer_arch.inference.batch import Attempts, Pool, Work, prepare, restored, room
from dsgformer_arch.inference.deblur import Result, deblur
from dsgformer_arch.inference.jobs import Tree, plan
from dsgformer_arch.utils.errors import UserError
from tests.small_systems import save_gentle_weights

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small network whose result differs from its input, but by little."""
    return save_gentle_weights(tmp_path_factory.mktemp('weights') / 'net.pth')


@pytest.fixture(scope='module')
def restorer(weights: Path) -> Deblurrer:
    return Deblurrer(weights=weights, device='cpu')


def scene(seed: int, height: int = 48, width: int = 72) -> NDArray[np.uint8]:
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack([x / width, y / height, (x // 9 + y // 9 + seed) % 2], -1) * 0.6 + 0.2
    return (image * 255).astype(np.uint8)


def fill(folder: Path, count: int) -> list[str]:
    """Images in three subfolders; returns their relative paths."""
    names = [f'{"abc"[i % 3]}/{i:03}.{("png", "jpg", "tif")[i % 3]}' for i in range(count)]
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene(i)).save(folder / name)
    return names


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


class TestTree:
    def test_a_folder_gives_the_jobs_of_deblur(self, tmp_path: Path) -> None:
        fill(tmp_path / 'in', 7)
        tree = Tree(str(tmp_path / 'in'), str(tmp_path / 'out'), '.png')
        assert [tree.job(path) for path in tree.checked_paths()] == plan(
            [str(tmp_path / 'in')], str(tmp_path / 'out'), '.png'
        )

    def test_files_are_found_while_they_are_asked_for(self, tmp_path: Path) -> None:
        """The folder is not searched to its end first."""
        fill(tmp_path / 'in', 3)
        paths = Tree(str(tmp_path / 'in'), str(tmp_path / 'out')).checked_paths()
        assert next(paths) == 'a/000.png'
        (tmp_path / 'in' / 'c' / 'later.png').touch()
        assert list(paths) == ['b/001.jpg', 'c/002.tif', 'c/later.png']

    def test_a_list(self, tmp_path: Path) -> None:
        names = fill(tmp_path, 4)
        listed = tmp_path / 'list.txt'
        listed.write_text('\n'.join([names[2], '', f'./{names[0]}', names[2]]) + '\n', encoding='utf-8')
        tree = Tree(str(tmp_path), str(tmp_path / 'out'), listed=str(listed))
        assert list(tree.checked_paths()) == [names[2], names[0]]

    @pytest.mark.parametrize(
        ('line', 'message'),
        [
            ('../x.png', 'line 1: ../x.png is not below'),
            ('/x.png', 'line 1: /x.png is not below'),
            ('notes.txt', 'line 1: notes.txt is not an image'),
            ('out/a.png', 'results are not inputs'),
        ],
    )
    def test_bad_lines(self, tmp_path: Path, line: str, message: str) -> None:
        listed = tmp_path / 'list.txt'
        listed.write_text(line + '\n', encoding='utf-8')
        with pytest.raises(UserError, match=message):
            list(Tree(str(tmp_path), str(tmp_path / 'out'), listed=str(listed)).checked_paths())

    @pytest.mark.parametrize('listed', [False, True])
    def test_two_inputs_with_one_result(self, tmp_path: Path, listed: bool) -> None:
        (tmp_path / 'in').mkdir()
        for name in ('a.jpg', 'a.png', 'list.txt'):
            (tmp_path / 'in' / name).write_text('a.jpg\na.png\n')
        file = str(tmp_path / 'in' / 'list.txt') if listed else None
        tree = Tree(str(tmp_path / 'in'), str(tmp_path / 'out'), '.tif', file)
        with pytest.raises(UserError, match='both be written'):
            list(tree.checked_paths())
        assert len(list(Tree(tree.folder, tree.out, None, file).checked_paths())) == 2

    @pytest.mark.parametrize('out', ['in', '.', 'link'])
    def test_results_never_lie_over_inputs(self, tmp_path: Path, out: str) -> None:
        fill(tmp_path / 'in', 1)
        (tmp_path / 'link').symlink_to(tmp_path / 'in')
        with pytest.raises(UserError, match='is inside'):
            list(Tree(str(tmp_path / 'in'), str(tmp_path / out)).checked_paths())


def test_listing(tmp_path: Path) -> None:
    pytest.importorskip('pyarrow')
    names = fill(tmp_path / 'in', 5)
    tree = Tree(str(tmp_path / 'in'), str(tmp_path / 'out'))
    assert batch.listing(tree).to_pylist() == sorted(names)
    (tmp_path / 'list.txt').write_bytes(b'\xff.png\n')
    with pytest.raises(UserError, match=r'list.txt cannot be read'):
        batch.listing(Tree(str(tmp_path), tree.out, listed=str(tmp_path / 'list.txt')))
    with open(os.path.join(os.fsencode(tmp_path), b'in', b'\xff.png'), 'wb'):
        pass
    with pytest.raises(UserError, match='is not a name in UTF-8'):
        batch.listing(tree)


class TestWorker:
    def work(self, folder: Path, restorer: Deblurrer, **settings: Any) -> Work:
        (folder / 'out').mkdir(exist_ok=True)
        tree = Tree(str(folder / 'in'), str(folder / 'out'))
        return Work(tree, lambda: restorer, restorer.fingerprint, **settings)

    def test_files_are_restored_skipped_and_failed_as_by_deblur(
        self, tmp_path: Path, restorer: Deblurrer
    ) -> None:
        names = fill(tmp_path / 'in', 4)
        (tmp_path / 'in' / names[1]).write_bytes(b'\xff\xd8\xff and no more')
        deblur(plan([str(tmp_path / 'in')], str(tmp_path / 'alone')), lambda: restorer)
        work = self.work(tmp_path, restorer)
        first = restored(work, restorer, names[:2])
        assert [found['status'] for found in first] == ['restored', 'failed']
        assert names[1] in first[1]['error']
        again = restored(work, restorer, names)
        assert [found['status'] for found in again] == ['skipped', 'failed', 'restored', 'restored']
        assert contents(tmp_path / 'out') == contents(tmp_path / 'alone')
        assert first[0]['megapixels'] == pytest.approx(48 * 72 / 1e6)
        sizes = [(tmp_path / side / names[0]).stat().st_size for side in ('in', 'out')]
        assert first[0]['bytes'] == sum(sizes)
        forced = restored(self.work(tmp_path, restorer, force=True), restorer, names[:1])
        assert forced[0]['status'] == 'restored'

    def test_records_travel_as_arrow_tables_of_one_type(self, tmp_path: Path, restorer: Deblurrer) -> None:
        pytest.importorskip('pyarrow')
        names = fill(tmp_path / 'in', 2)
        records = restored(self.work(tmp_path, restorer), restorer, names)
        table = batch.as_table(records)
        assert table.to_pylist() == records
        assert table.schema == batch.as_table([]).schema

    def test_a_link_among_the_results_does_not_lead_to_the_inputs(
        self, tmp_path: Path, restorer: Deblurrer
    ) -> None:
        names = fill(tmp_path / 'in', 3)
        before = contents(tmp_path / 'in')
        work = self.work(tmp_path, restorer)
        (tmp_path / 'out' / 'a').symlink_to(tmp_path / 'in' / 'a')
        found = {found['input']: found for found in restored(work, restorer, names)}
        failed = found[str(tmp_path / 'in' / names[0])]
        assert failed['status'] == 'failed'
        assert 'not overwritten' in failed['error']
        assert contents(tmp_path / 'in') == before

    def test_a_file_that_ends_its_workers_fails_in_the_end(self, tmp_path: Path, restorer: Deblurrer) -> None:
        """The files beside it are restored; a file that is done leaves no counter."""
        names = fill(tmp_path / 'in', 3)
        work = self.work(tmp_path, restorer)
        attempts = Attempts(str(tmp_path / 'attempts'))
        begun = []

        class Ended(BaseException):
            """Stands for the end of the process."""

        def run(jobs: Any) -> Any:
            begun.extend(jobs)
            if jobs[0].source.endswith(names[1]):
                raise Ended
            return deblur(jobs, lambda: restorer)

        jobs = [work.tree.job(name) for name in names]
        for _ in range(batch.MAX_ATTEMPTS):
            with pytest.raises(Ended):
                [attempts.counted(job, run) for job in jobs]
        statuses = [attempts.counted(job, run)[0].status for job in jobs]
        assert statuses == ['skipped', 'failed', 'restored']
        assert [job.source.endswith(names[1]) for job in begun].count(True) == batch.MAX_ATTEMPTS
        assert len(list((tmp_path / 'attempts').iterdir())) == 1

    def test_a_machine_that_differs_from_the_driver_s_is_refused(
        self, tmp_path: Path, restorer: Deblurrer
    ) -> None:
        fill(tmp_path / 'in', 1)
        assert prepare(self.work(tmp_path, restorer)) is restorer
        tree = Tree(str(tmp_path / 'in'), str(tmp_path / 'out'))
        missing = Tree(str(tmp_path / 'in'), str(tmp_path / 'nowhere'))
        for work, message in (
            (Work(tree, lambda: restorer, restorer.fingerprint, version='9.9'), 'the driver 9.9'),
            (Work(tree, lambda: restorer, '0' * 64), 'weights .* differ'),
            (Work(missing, lambda: restorer, restorer.fingerprint), 'does not see the folder .*nowhere'),
        ):
            with pytest.raises(UserError, match=message):
                prepare(work)


def test_blocks_are_small_enough_for_all_workers_to_end_together() -> None:
    assert batch.block_rows(1_000_000, 10) == batch.BLOCK
    assert batch.block_rows(1000, 10) == 12
    assert batch.block_rows(3, 8) == 1


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in ('a.png', 'b.png.part7', 'c.partial', 'd/e.part', '.attempts/0'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / 'a.png.part12').touch()  # of a killed worker: another one finished the file
    (tmp_path / 'f.png').touch()
    (tmp_path / 'f.png.part3').touch()  # newer than the result: someone writes it now
    os.utime(tmp_path / 'a.png.part12', (1, 1))
    os.utime(tmp_path / 'f.png', (1, 1))
    batch.remove_leftovers(str(tmp_path))
    assert set(contents(tmp_path)) == {
        'a.png',
        'b.png.part7',
        'c.partial',
        'd/e.part',
        'f.png',
        'f.png.part3',
    }


def test_output_of_ray_and_of_the_command_part(capfd: pytest.CaptureFixture[str]) -> None:
    with batch.separate_output() as (out, err, log):
        for descriptor in (1, 2):
            os.write(descriptor, b'noise\n')
        print('result', file=out, flush=True)
        print('progress', file=err, flush=True)
        assert Path(log).read_text(encoding='utf-8') == 'noise\nnoise\n'
    assert not os.path.exists(log)
    for descriptor in (1, 2):
        os.write(descriptor, b'after\n')
    assert capfd.readouterr() == ('result\nafter\n', 'progress\nafter\n')


class TestCluster:
    """Without Ray: `fake` stands for its module."""

    @pytest.fixture
    def fake(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
        for name in ('RAY_USAGE_STATS_ENABLED', 'RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER'):
            monkeypatch.delenv(name, raising=False)
        module = SimpleNamespace(calls=[])
        module.init = lambda **options: module.calls.append(options)
        monkeypatch.setitem(sys.modules, 'ray', module)
        yield module
        for name in ('RAY_USAGE_STATS_ENABLED', 'RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER'):
            os.environ.pop(name, None)

    @pytest.mark.parametrize(
        'address', ['cluster', ':6379', 'host:', 'host:http', 'host:70000', 'ray://h:10001']
    )
    def test_no_address(self, fake: Any, address: str) -> None:
        with pytest.raises(UserError, match='give HOST:PORT, auto, or local'):
            batch.connect(address)
        assert not fake.calls

    def test_no_server_listens(self, fake: Any) -> None:
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            port = probe.getsockname()[1]
        with pytest.raises(UserError, match=f'--ray 127.0.0.1:{port}: connection refused'):
            batch.connect(f'127.0.0.1:{port}')
        assert not fake.calls

    @pytest.mark.parametrize('answer', [b'', b'HTTP/1.1 400 Bad Request\r\n\r\n', None])
    def test_something_else_listens(
        self, fake: Any, answer: bytes | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(batch, 'ANSWER', 0.5)
        with socket.create_server(('127.0.0.1', 0)) as server:

            def serve() -> None:
                connection, _ = server.accept()
                with connection:
                    connection.recv(100)
                    if answer is None:
                        connection.recv(100)  # silent until the other side gives up
                    else:
                        connection.sendall(answer)

            thread = threading.Thread(target=serve)
            thread.start()
            with pytest.raises(UserError, match=r'no answer|not a Ray cluster'):
                batch.connect(f'127.0.0.1:{server.getsockname()[1]}')
            thread.join()
        assert not fake.calls

    def test_other_versions_are_reported_in_one_sentence(self, fake: Any) -> None:
        def init(**_: Any) -> None:
            raise RuntimeError(
                'Version mismatch: The cluster was started with:\n    Ray: 2.9.0\n    Python: 3.9\n'
            )

        fake.init = init
        with pytest.raises(UserError) as caught:
            batch.connect('auto')
        assert str(caught.value).startswith(
            '--ray auto: Version mismatch: The cluster was started with: Ray: 2.9.0'
        )
        assert '\n' not in str(caught.value)

    def test_a_cluster_asks_for_its_token(self, fake: Any) -> None:
        def init(**_: Any) -> None:
            raise ConnectionError('Failed to connect') from RuntimeError('RPC error: InvalidAuthToken: …')

        fake.init = init
        with pytest.raises(UserError, match='--ray auto: the cluster asks for its token; set RAY_AUTH_MODE'):
            batch.connect('auto')

    def test_a_local_cluster_is_reached_from_this_machine_only_and_sends_no_reports(self, fake: Any) -> None:
        batch.connect('local')
        assert fake.calls[0]['include_dashboard'] is False
        assert fake.calls[0]['address'] == 'local'
        assert os.environ['RAY_USAGE_STATS_ENABLED'] == '0'
        assert os.environ['RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER'] == '0'

    @pytest.mark.parametrize(
        ('pool', 'machines', 'expected'),
        [
            (Pool(), [{'CPU': 2.0}], (1, {'num_cpus': 2}, 'cpu')),
            (Pool(cpus=1), [{'CPU': 2.0}], (2, {'num_cpus': 1}, 'cpu')),
            (Pool(), [{'CPU': 16.0}, {'CPU': 64.0}], (20, {'num_cpus': 4}, 'cpu')),
            (Pool(workers=3), [{'CPU': 16.0}], (3, {'num_cpus': 4}, 'cpu')),
            (
                Pool(),
                [{'CPU': 16.0}, {'CPU': 64.0, 'GPU': 8.0}, {'CPU': 64.0, 'GPU': 4.0}],
                (12, {'num_gpus': 1, 'num_cpus': 1}, 'cuda'),
            ),
            (Pool(per_gpu=2), [{'CPU': 64.0, 'GPU': 8.0}], (16, {'num_gpus': 0.5, 'num_cpus': 1}, 'cuda')),
            (Pool(device='cpu'), [{'CPU': 64.0, 'GPU': 8.0}], (16, {'num_cpus': 4}, 'cpu')),
        ],
    )
    def test_room(self, fake: Any, pool: Pool, machines: list[Any], expected: Any) -> None:
        dead = {'Alive': False, 'Resources': {'CPU': 1000.0, 'GPU': 1000.0}}
        fake.nodes = lambda: [dead, *({'Alive': True, 'Resources': machine} for machine in machines)]
        assert room(pool) == expected

    @pytest.mark.parametrize(
        ('pool', 'machines', 'message'),
        [
            (Pool(device='cuda'), [{'CPU': 2.0}], 'no machine of the cluster has a GPU'),
            (Pool(cpus=8), [{'CPU': 4.0}, {'CPU': 6.0}], '--cpus 8: the largest machine .* has 6 cores'),
            (Pool(), [{}], 'no machine of the cluster has a free core'),
        ],
    )
    def test_no_room(self, fake: Any, pool: Pool, machines: list[Any], message: str) -> None:
        fake.nodes = lambda: [{'Alive': True, 'Resources': machine} for machine in machines]
        with pytest.raises(UserError, match=message):
            room(pool)


class TestDriver:
    """What the driver does with the records of its workers, without Ray."""

    @pytest.fixture
    def drive(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
        pytest.importorskip('pyarrow')
        fill(tmp_path / 'in', 3)
        tree = Tree(str(tmp_path / 'in'), str(tmp_path / 'out'))
        monkeypatch.setattr(batch, 'connect', lambda address: None)
        monkeypatch.setattr(batch, 'room', lambda pool: (1, {'num_cpus': 1}, 'cpu'))

        def drive(records: Callable[[], Iterator[dict[str, Any]]], **options: Any) -> Any:
            monkeypatch.setattr(batch, '_records', lambda *arguments: records())
            made = SimpleNamespace(fingerprint='')
            return batch.batch(tree, lambda device: made, Pool(), **options)  # type: ignore[arg-type, return-value]

        return drive

    def test_failures_are_listed_and_counted(
        self, drive: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(batch, 'LISTED', 1)
        statuses = ('restored', 'failed', 'skipped', 'failed')
        found = [
            batch.record(Result(f'{i}', f'o{i}', status, error=f'{i}: broken' if status == 'failed' else ''))
            for i, status in enumerate(statuses)
        ]
        tally = drive(lambda: iter(found), as_json=True)
        assert (tally.restored, tally.skipped, tally.failed) == (1, 1, 2)
        out, err = capfd.readouterr()
        assert [json.loads(line) for line in out.splitlines()] == found
        assert 'error: 1: broken' in err
        assert 'error: 3: broken' not in err
        assert '… and 1 more' in err
        listed = (tmp_path / 'out' / batch.FAILED).read_text(encoding='utf-8').splitlines()
        assert [json.loads(line) for line in listed] == [found[1], found[3]]
        drive(lambda: iter(found[:1]))
        assert not (tmp_path / 'out' / batch.FAILED).exists()

    def test_a_worker_that_cannot_work_ends_the_job(self, drive: Any) -> None:
        refused = batch.record(Result('', '', 'refused', error='the worker on a: it has dsgformer 9'))
        with pytest.raises(UserError, match='the worker on a: it has dsgformer 9'):
            drive(lambda: iter([refused]))

    def test_what_ray_says_at_the_end_is_reported_in_one_sentence(self, drive: Any, tmp_path: Path) -> None:
        class ActorDiedError(Exception):
            pass

        ActorDiedError.__module__ = 'ray.exceptions'

        def records() -> Iterator[dict[str, Any]]:
            os.write(2, b'many lines of Ray')
            raise ActorDiedError('Traceback\n  somewhere\nThe actor died because its node died.\n')
            yield {}

        with pytest.raises(UserError) as caught:
            drive(records)
        message = str(caught.value)
        assert message.startswith('Ray ended the work: The actor died because its node died.; see ')
        log = (tmp_path / 'out' / batch.RAY_LOG).read_text(encoding='utf-8')
        assert 'many lines of Ray' in log
        assert 'ActorDiedError' in log

    def test_a_folder_that_cannot_be_written_is_named(
        self, drive: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def makedirs(path: str, exist_ok: bool) -> None:
            raise PermissionError(13, 'Permission denied', path)

        monkeypatch.setattr(os, 'makedirs', makedirs)
        with pytest.raises(UserError, match='out: permission denied'):
            drive(lambda: iter([]))


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['nowhere', 'out'], 'nowhere: no such folder'),
        (['@nowhere.txt', 'out'], 'nowhere.txt: there is no such file'),
        (['empty', 'out'], 'no image or video in'),
        (['in', 'in'], 'is inside'),
        (['in', 'in/a/000.png'], 'is a file'),
        (['in', 'out', '--device', 'cuda:1'], 'Ray chooses the GPU'),
        (['in', 'out', '--weights', 'nowhere.pth'], 'no such file'),
        (['in', 'out', '--workers', '0'], "'0' is not a whole number of at least 1"),
        (['in', 'out', '--format', 'gif'], 'choose one of'),
        (['in'], 'OUT'),
    ],
)
def test_mistakes_end_with_status_2_and_write_nothing(
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip('ray')
    fill(tmp_path / 'in', 1)
    (tmp_path / 'empty').mkdir()
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as caught:
        dsgformer.main(['batch', *arguments])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert 'Traceback' not in err
    assert contents(tmp_path) == before
    assert not (tmp_path / 'out').exists()


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(UserError, match=r'dsgformer\[cluster\]'):
        batch.batch(Tree(str(tmp_path), str(tmp_path / 'out')), lambda _: None, Pool())  # type: ignore[arg-type]


def test_the_command_line_travels_to_the_workers(
    weights: Path, restorer: Deblurrer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A worker has another working directory, and gets what `dsgformer deblur` would use."""
    import pickle

    monkeypatch.chdir(weights.parent)
    arguments = dsgformer.parser().parse_args(['batch', 'in', 'out', '--weights', 'net.pth', '--tile', '96'])
    maker = pickle.loads(pickle.dumps(Maker(arguments)))
    monkeypatch.chdir(tmp_path)
    made = maker('cpu')
    assert made.fingerprint == restorer.fingerprint
    assert made.tile == 96


# On a local cluster


class Driver:
    """`dsgformer batch` with two workers, in a process of its own.

    Attributes:
        process: the driver.
        log: file with its standard error.
    """

    def __init__(self, folder: Path, *arguments: str | Path, command: list[str] | None = None) -> None:
        self.log = folder / 'driver.log'
        command = command or ['-m', 'dsgformer_arch.cli.dsgformer', 'batch']
        with self.log.open('wb') as log:
            self.process = subprocess.Popen(
                [sys.executable, *command, *map(str, arguments)], stdout=subprocess.PIPE, stderr=log,
                env=os.environ | {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}, cwd=folder, text=True,
            )  # fmt: skip

    def workers(self) -> list[psutil.Process]:
        """The processes of the actors."""

        def is_worker(process: psutil.Process) -> bool:
            with contextlib.suppress(psutil.NoSuchProcess):
                return 'ray::MapWorker' in ' '.join(process.cmdline())
            return False

        return list(filter(is_worker, psutil.Process(self.process.pid).children(recursive=True)))

    def wait_for(self, condition: Callable[[], Any]) -> Any:
        """Wait until something holds; returns it."""
        while not (found := condition()):
            assert self.process.poll() is None, self.text()
            time.sleep(0.02)
        return found

    def end(self) -> int:
        """The exit status, after standard output was read into `out`."""
        self.out, _ = self.process.communicate()
        return self.process.returncode

    def text(self) -> str:
        return self.log.read_text(encoding='utf-8')


def results(folder: Path) -> dict[str, int]:
    """Result files, and when each was written."""
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in folder.rglob('*')
        if path.suffix in ('.png', '.jpg', '.tif')
    }


@pytest.mark.long
def test_a_worker_is_killed_and_the_job_ends_as_without(
    tmp_path: Path, weights: Path, restorer: Deblurrer
) -> None:
    pytest.importorskip('ray')
    names = fill(tmp_path / 'in', 240)
    broken = tmp_path / 'in' / 'b' / 'broken.jpg'
    broken.write_bytes((tmp_path / 'in' / names[1]).read_bytes()[:300])
    deblur(plan([str(tmp_path / 'in')], str(tmp_path / 'alone')), lambda: restorer)
    driver = Driver(tmp_path, 'in', 'out', '--weights', weights, '--cpus', '1', '--json')
    driver.wait_for(lambda: len(results(tmp_path / 'out')) > 20 and len(driver.workers()) == 2)
    victim = driver.workers()[0]
    os.kill(victim.pid, signal.SIGKILL)
    assert len(results(tmp_path / 'out')) < len(names)
    assert driver.end() == 1, driver.text()
    expected, found = contents(tmp_path / 'alone'), contents(tmp_path / 'out')
    listed = [json.loads(line) for line in found.pop(batch.FAILED).decode().splitlines()]
    assert found == expected
    assert [line['input'] for line in listed] == [str(broken)]
    assert 'b/broken.jpg' in listed[0]['error']
    records = [json.loads(line) for line in driver.out.splitlines()]
    assert sorted(found['input'] for found in records) == sorted(
        [str(broken), *(str(tmp_path / 'in' / name) for name in names)]
    )
    text = driver.text()
    assert f'error: {listed[0]["error"]}' in text
    assert 'raylet' not in text
    assert 'Traceback' not in text


@pytest.mark.long
def test_a_killed_driver_is_started_again_and_redoes_nothing(
    tmp_path: Path, weights: Path, restorer: Deblurrer
) -> None:
    pytest.importorskip('ray')
    names = fill(tmp_path / 'in', 240)
    arguments = ('in', 'out', '--weights', weights, '--cpus', '1')
    driver = Driver(tmp_path, *arguments)
    driver.wait_for(lambda: len(results(tmp_path / 'out')) > 20)
    workers = driver.workers()
    driver.process.kill()
    driver.end()
    _, alive = psutil.wait_procs(workers, timeout=300)
    assert workers
    assert not alive, 'workers outlive their driver'
    before = results(tmp_path / 'out')
    assert 20 < len(before) < len(names)
    driver = Driver(tmp_path, *arguments)
    assert driver.end() == 0, driver.text()
    after = results(tmp_path / 'out')
    redone = [name for name in before if after[name] != before[name]]
    print(
        f'{len(before)} of {len(names)} were done when the driver was killed; {len(redone)} were done again'
    )
    assert not redone
    assert f'restored {len(names) - len(before)}, skipped {len(before)} done before' in driver.text()
    deblur(plan([str(tmp_path / 'in')], str(tmp_path / 'alone')), lambda: restorer)
    assert contents(tmp_path / 'out') == contents(tmp_path / 'alone')


DEADLY = (40, 40)
"""Height and width of the image that ends the process which restores it."""

SCRIPT = """
import sys
from dsgformer_arch.inference.batch import Pool, batch
from dsgformer_arch.inference.jobs import Tree
from tests.inference.test_batch import Deadly
print(batch(Tree(sys.argv[1], sys.argv[2]), Deadly(sys.argv[3]), Pool(sys.argv[4], cpus=1)))
"""


class Deadly:
    """Makes restorers that end their process with the image of the size `DEADLY`."""

    def __init__(self, weights: str) -> None:
        self.weights = weights

    def __call__(self, device: str) -> Deblurrer:
        made = Deblurrer(weights=self.weights, device=device)
        bands = made.bands

        def deadly(rows: Any, size: tuple[int, int], *rest: Any) -> Any:
            if size == DEADLY:
                os.kill(os.getpid(), signal.SIGKILL)
            return bands(rows, size, *rest)

        made.bands = deadly  # type: ignore[method-assign]
        return made


TOKEN = {'RAY_AUTH_MODE': 'token', 'RAY_AUTH_TOKEN': 'f00d' * 16}
"""What the cluster of the tests asks for, as Ray's clusters do unless they are told otherwise."""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[str]:
    """A Ray cluster of two cores that was there before; its address."""
    pytest.importorskip('ray')
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, '-m', 'ray.scripts.scripts', 'start', '--head', '--block', '--port', str(port),
        '--num-cpus', '2', '--include-dashboard', 'false', '--object-store-memory', str(1 << 28),
    ]  # fmt: skip
    environment = os.environ | {'PYTHONPATH': str(ROOT), 'RAY_USAGE_STATS_ENABLED': '0'} | TOKEN
    with (tmp_path / 'cluster.log').open('wb') as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    while 'Ray runtime started' not in (tmp_path / 'cluster.log').read_text(encoding='utf-8'):
        assert process.poll() is None, (tmp_path / 'cluster.log').read_text(encoding='utf-8')
        time.sleep(0.1)
    yield f'127.0.0.1:{port}'
    process.terminate()
    process.wait()


@pytest.mark.long
def test_an_image_that_kills_every_worker_is_listed(
    tmp_path: Path, weights: Path, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a cluster that runs already and asks for a token."""
    for name, value in TOKEN.items():
        monkeypatch.setenv(name, value)
    names = fill(tmp_path / 'in', 12)
    Image.fromarray(scene(0, *DEADLY)).save(tmp_path / 'in' / 'deadly.png')
    driver = Driver(
        tmp_path, tmp_path / 'in', tmp_path / 'out', weights, cluster, command=['-c', SCRIPT]
    )  # fmt: skip
    assert driver.end() == 0, driver.text()
    assert 'failed=1' in driver.out
    assert set(results(tmp_path / 'out')) == set(names)
    (line,) = (tmp_path / 'out' / batch.FAILED).read_text(encoding='utf-8').splitlines()
    assert 'deadly.png' in json.loads(line)['error']
    assert 'workers ended' in json.loads(line)['error']
    assert not (tmp_path / 'out' / batch.ATTEMPTS).exists()
