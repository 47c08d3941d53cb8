"""Restore millions of files on a Ray cluster.

The driver lists the inputs as Arrow strings and sends them in blocks to a pool of Ray Data actors.
Each actor holds one `Deblurrer` and restores its files as `dsgformer deblur` does: it skips finished files,
reads ahead, and writes results atomically.  The result files are the checkpoint; there is no other state.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import itertools
import json
import logging
import os
import re
import shutil
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import dsgformer_arch
from dsgformer_arch.inference.deblur import Result, Tally, deblur
from dsgformer_arch.inference.jobs import Job, Tree, inside
from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.progress import track
from dsgformer_arch.utils.text import one_line

if TYPE_CHECKING:
    from dsgformer_arch.inference.deblurrer import Deblurrer

FAILED = 'failed.jsonl'
"""File in the folder of the results: one JSON object for each image that failed."""

RAY_LOG = 'ray.log'
"""File in the folder of the results: the output of Ray, kept where Ray failed."""

ATTEMPTS = '.attempts'
"""Folder in the folder of the results: see `Attempts`."""

MAX_ATTEMPTS = 2
"""Restarted workers that may crash on a file before it counts as failed."""

BLOCK = 64
"""The most files in a block."""

CPUS = 4
"""Cores of a worker without a GPU."""

LOCAL_STORE = 512 << 20
"""Bytes of a local cluster's object store: it holds paths and records, never pixels."""

ANSWER = 5.0
"""Seconds until a cluster counts as unreachable."""

LISTED = 20
"""The most failed files that are named on standard error; `FAILED` names all of them."""


# Worker


@dataclass(frozen=True)
class Work:
    """The job description that all workers share.

    Attributes:
        tree: the files.
        make: makes the restorer.
        fingerprint: `Deblurrer.fingerprint` of the weights on the driver.
        force: also restore files whose result is up to date.
        threads: of PyTorch, in a worker without a GPU; None leaves them as they are.
        version: of this package.
    """

    tree: Tree
    make: Callable[[], Deblurrer]
    fingerprint: str
    force: bool = False
    threads: int | None = None
    version: str = dsgformer_arch.__version__


class Worker:
    """An actor of the pool: called with a table of paths, returns a table of records.

    A worker that cannot start returns a record of the status `'refused'` with the reason: Ray would wrap an
    exception in a long traceback.
    """

    def __init__(self, work: Work) -> None:
        import ray

        self.work = work
        # Only a restarted worker counts its attempts: that makes few files on the shared disk, not millions.
        restarted = ray.get_runtime_context().was_current_actor_reconstructed
        self.attempts = Attempts(os.path.join(work.tree.out, ATTEMPTS)) if restarted else None
        self.refusal = ''
        try:
            self.restorer = prepare(work)
        except UserError as error:
            self.refusal = f'the worker on {socket.gethostname()}: {error}'

    def __call__(self, table: Any) -> Any:
        paths = table['path'].to_pylist()
        if self.refusal:
            return as_table([record(Result('', '', 'refused', error=self.refusal))])
        return as_table(restored(self.work, self.restorer, paths, self.attempts))


def prepare(work: Work) -> Deblurrer:
    """The restorer of a worker.

    Raises:
        UserError: this machine has another version of the package, other weights, no such device, or no
            access to the files.
    """
    import torch

    from dsgformer_arch.utils.allocator import keep_freed_memory

    if dsgformer_arch.__version__ != work.version:
        raise UserError(
            f'it has dsgformer {dsgformer_arch.__version__} and the driver {work.version}; install the same '
            'version on all machines'
        )
    for folder in (work.tree.folder, work.tree.out):
        if not os.path.isdir(folder):
            raise UserError(
                f'it does not see the folder {folder}; inputs and results have to be on a file system that '
                'all machines mount at the same place'
            )
    if work.threads is not None:
        torch.set_num_threads(work.threads)
        keep_freed_memory()
    restorer = work.make()
    if restorer.fingerprint != work.fingerprint:
        raise UserError(f'its weights of {restorer.name} differ from those of the driver; copy the same file')
    return restorer


def restored(
    work: Work, restorer: Deblurrer, paths: Iterable[str], attempts: Attempts | None = None
) -> list[dict[str, Any]]:
    """Restore files, as `deblur` does; returns one record for each, see `record`.

    Args:
        work: the job description.
        restorer: the network.
        paths: see `Tree.paths`.
        attempts: counter of attempts; with it files are restored one at a time.
    """
    records, jobs = [], []
    for path in paths:
        job = work.tree.job(path)
        if _leads_to_inputs(work.tree, os.path.dirname(job.target)):
            error = f'{job.target} leads to {work.tree.folder} through a link; inputs are not overwritten'
            records.append(record(Result(job.source, job.target, 'failed', error=error)))
        else:
            jobs.append(job)
    run = functools.partial(deblur, make=lambda: restorer, force=work.force)
    if attempts is None:
        results = run(jobs)
    else:
        results = [result for job in jobs for result in attempts.counted(job, run)]
    return records + [record(result) for result in results]


def record(result: Result) -> dict[str, Any]:
    """The record of a file for the driver: a `Result`, and the bytes that were read and written."""
    done = result.status == 'restored'
    return {**asdict(result), 'bytes': _size(result.input) + _size(result.output) if done else 0}


def as_table(records: Sequence[dict[str, Any]]) -> Any:
    """An Arrow table of records with a fixed schema."""
    import pyarrow

    types = {
        'input': pyarrow.string(), 'output': pyarrow.string(), 'status': pyarrow.string(),
        'seconds': pyarrow.float64(), 'network_seconds': pyarrow.float64(),
        'megapixels': pyarrow.float64(), 'frames': pyarrow.int64(),
        'bytes': pyarrow.int64(), 'error': pyarrow.string(), 'notes': pyarrow.list_(pyarrow.string()),
    }  # fmt: skip
    return pyarrow.Table.from_pylist(list(records), schema=pyarrow.schema(list(types.items())))


class Attempts:
    """Counts in files how often restarted workers started to restore each input.

    Ray restarts a crashed worker and sends it the same files again.  A file that crashes every worker, for
    instance in the decoder, would otherwise be restored forever.

    Args:
        folder: folder of the counters.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def counted(self, job: Job, run: Callable[[Sequence[Job]], list[Result]]) -> list[Result]:
        """Restore a file, unless it has crashed `MAX_ATTEMPTS` workers."""
        counter = Path(self.folder, hashlib.sha256(job.target.encode()).hexdigest()[:32])
        if _size(counter) >= MAX_ATTEMPTS:
            error = (
                f'{job.source}: {MAX_ATTEMPTS} restarted workers ended while they restored it; '
                'restore it alone with `dsgformer deblur`, or with a smaller --tile'
            )
            return [Result(job.source, job.target, 'failed', error=error)]
        counter.parent.mkdir(exist_ok=True)
        with counter.open('ab') as file:
            file.write(b'.')
        results = run([job])
        counter.unlink()
        return results


def _size(path: str | os.PathLike[str]) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


@functools.lru_cache(maxsize=1024)
def _leads_to_inputs(tree: Tree, folder: str) -> bool:
    """Whether a folder of results is one of the inputs' folders, through a symbolic link."""
    place = os.path.realpath(folder)
    return inside(place, os.path.realpath(tree.folder)) and not inside(place, os.path.realpath(tree.out))


# Driver


@dataclass(frozen=True)
class Pool:
    """The workers.

    Attributes:
        address: of the cluster, `HOST:PORT`; `'auto'` for the one that runs on this machine; `'local'` to
            start one on this machine.
        workers: how many at most; None for as many as the cluster has room for.
        cpus: cores of a worker without a GPU; None for `CPUS`, or less where a machine has less.
        per_gpu: workers on each GPU; more than one pays off where encoding takes longer than the network.
        device: `'auto'` (GPUs where the cluster has some), `'cuda'` or `'cpu'`.
    """

    address: str = 'local'
    workers: int | None = None
    cpus: int | None = None
    per_gpu: int = 1
    device: str = 'auto'


def batch(
    tree: Tree,
    make: Callable[[str], Deblurrer],
    pool: Pool,
    *,
    force: bool = False,
    as_json: bool = False,
) -> Tally:
    """Restore a tree of files on a Ray cluster.

    Failed files are listed in `FAILED` and do not stop the others.  A crashed worker is restarted and its
    files are restored again.  A repeated call skips files whose result is up to date.

    Args:
        tree: inputs and results, with absolute paths that are the same on all machines.
        make: makes a restorer for a device, `'cpu'` or `'cuda'`; called here once and in each worker.
        pool: the workers.
        force: also restore files whose result is up to date.
        as_json: print one JSON object for each file on standard output.

    Raises:
        UserError: nothing to restore, no Ray, no cluster, no resources for a worker, or one cannot start.
    """
    if pool.device not in ('auto', 'cpu', 'cuda', 'mps'):
        raise UserError(f'--device {pool.device}: Ray chooses the GPU of each worker; give auto, cuda or cpu')
    if importlib.util.find_spec('ray') is None or importlib.util.find_spec('pyarrow') is None:
        raise UserError('batch needs Ray; install it with pip install "dsgformer[cluster]"')
    paths = listing(tree)
    # A wrong model or checkpoint is reported before a cluster is started.
    fingerprint = make('cpu').fingerprint
    tally = Tally()
    failures: list[str] = []
    with separate_output() as (out, err, log):
        try:
            connect(pool.address)
            size, needs, device = room(pool)
            os.makedirs(tree.out, exist_ok=True)
            remove_leftovers(tree.out)
            threads = None if device == 'cuda' else int(needs['num_cpus'])
            work = Work(tree, functools.partial(make, device), fingerprint, force, threads)
            records = _records(work, paths, min(size, len(paths)), needs)
            with open_late(os.path.join(tree.out, FAILED)) as failed:
                for found in track(records, 'restoring', len(paths), stream=err, unit='images'):
                    if found['status'] == 'refused':
                        raise UserError(found['error'])
                    tally.add(found['status'], found['megapixels'])
                    if found['status'] == 'failed':
                        failed(json.dumps(found) + '\n')
                        failures += [found['error']] if len(failures) < LISTED else []
                    if as_json:
                        print(json.dumps(found), file=out, flush=True)
        except OSError as error:
            raise UserError(f'{error.filename or tree.out}: {one_line(error)}') from None
        except Exception as error:
            if isinstance(error, UserError) or not type(error).__module__.startswith('ray.'):
                raise
            os.makedirs(tree.out, exist_ok=True)
            kept = shutil.copy(log, os.path.join(tree.out, RAY_LOG))
            with open(kept, 'a', encoding='utf-8') as file:
                traceback.print_exc(file=file)
            raise UserError(
                f'Ray ended the work: {_last_line(error)}; see {kept}, then give the same command again: '
                'finished files are skipped'
            ) from None
        finally:
            if 'ray' in sys.modules:
                sys.modules['ray'].shutdown()
    remove_leftovers(tree.out)
    for text in failures:
        print(f'error: {text}', file=sys.stderr)
    if tally.failed > len(failures):
        print(f'error: … and {tally.failed - len(failures)} more', file=sys.stderr)
    if tally.failed:
        print(f'error: {os.path.join(tree.out, FAILED)} lists the failed files', file=sys.stderr, flush=True)
    return tally


def listing(tree: Tree) -> Any:
    """The inputs as an Arrow array of strings: 1 million of 30 characters take 35 MB.

    Raises:
        UserError: there are none, or results would overwrite something; see `Tree.checked_paths`.
    """
    import pyarrow

    found = track(tree.checked_paths(), 'listing', unit='files', every=30)
    chunks = []
    try:
        while True:
            chunks.append(pyarrow.array(itertools.islice(found, 10_000), pyarrow.string()))
            if not len(chunks[-1]):
                break
    except UnicodeEncodeError as error:
        raise UserError(f'{os.fsencode(error.object)!r} is not a name in UTF-8; rename the file') from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{tree.listed or tree.folder} cannot be read: {one_line(error)}') from None
    paths = pyarrow.chunked_array(chunks)
    if not len(paths):
        raise UserError(f'no image or video in {tree.listed or tree.folder}')
    return paths


def connect(address: str) -> None:
    """Connect to a cluster, or start one on this machine that is reachable from this machine only.

    Raises:
        UserError: no cluster answers at the address, or it has another version of Ray or Python.
    """
    os.environ['RAY_USAGE_STATS_ENABLED'] = '0'
    options: dict[str, Any] = {'address': address}
    if address == 'local':
        # Makes Ray use the loopback address, its default on Windows and macOS only.
        os.environ['RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER'] = '0'
        options |= {'include_dashboard': False, 'object_store_memory': LOCAL_STORE}
        if hasattr(os, 'sched_getaffinity'):
            options['num_cpus'] = len(os.sched_getaffinity(0))
    elif address != 'auto':
        _check_address(address)
    import ray

    try:
        ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        if 'AuthToken' in ''.join(traceback.format_exception(error)):
            raise UserError(
                f'--ray {address}: the cluster asks for its token; set RAY_AUTH_MODE=token and '
                'RAY_AUTH_TOKEN to that of the cluster'
            ) from None
        raise UserError(
            f'--ray {address}: {one_line(error)}; start a cluster with `ray start --head`, join this '
            'machine to one with `ray start --address HOST:PORT`, or leave out --ray to start one here'
        ) from None
    except Exception as error:  # other versions, a cluster that does not start: Ray has no common base class
        raise UserError(f'--ray {address}: {one_line(error)}') from None


def _check_address(address: str) -> None:
    """Check within seconds whether a cluster answers: Ray itself retries for minutes.

    Raises:
        UserError: the address is malformed, or no gRPC server answers there.
    """
    host, _, port = address.rpartition(':')
    if not host or '://' in address or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f'--ray {address}: give HOST:PORT, auto, or local')
    try:
        with socket.create_connection((host.strip('[]'), int(port)), ANSWER) as connection:
            if os.environ.get('RAY_USE_TLS', '0') in ('0', ''):
                # The first bytes of HTTP/2, with an empty frame of settings (RFC 9113, section 3.4).
                connection.sendall(b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n' + b'\0\0\0\4\0\0\0\0\0')
                if connection.recv(9)[3:4] != b'\4':
                    raise OSError('the server is not a Ray cluster')
    except OSError as error:
        reason = 'no answer' if isinstance(error, TimeoutError) else one_line(error)
        raise UserError(f'--ray {address}: {reason}; `ray start --head` prints the address') from None


def room(pool: Pool) -> tuple[int, dict[str, Any], str]:
    """The number of workers, the resources of each, and their device.

    Raises:
        UserError: the cluster has no resources for a single worker.
    """
    import ray

    machines = [node['Resources'] for node in ray.nodes() if node['Alive']]
    gpus = int(sum(machine.get('GPU', 0) for machine in machines))
    if pool.device == 'cuda' and not gpus:
        raise UserError('--device cuda: no machine of the cluster has a GPU')
    if gpus and pool.device in ('auto', 'cuda'):
        needs = {'num_gpus': 1 / pool.per_gpu, 'num_cpus': 1}
        return pool.workers or gpus * pool.per_gpu, needs, 'cuda'
    cores = [int(machine.get('CPU', 0)) for machine in machines if machine.get('CPU', 0) >= 1]
    if not cores:
        raise UserError('no machine of the cluster has a free core or a GPU')
    cpus = pool.cpus or min(CPUS, *cores)
    fitting = sum(count // cpus for count in cores)
    if not fitting:
        raise UserError(f'--cpus {cpus}: the largest machine of the cluster has {max(cores)} cores')
    return pool.workers or fitting, {'num_cpus': cpus}, 'cpu' if pool.device == 'auto' else pool.device


def _records(work: Work, paths: Any, workers: int, needs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Send the files to the workers; yields a record for each as soon as its block is done."""
    import pyarrow
    import ray.data

    logging.getLogger('ray.data').setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_consecutive_actor_init_deaths = 10  # machines may be pre-empted while they load the network
    rows = block_rows(len(paths), workers)
    tables = [
        # Not a slice: Arrow would send the whole array with each.
        pyarrow.table({'path': pyarrow.array(paths[start : start + rows].to_pylist(), pyarrow.string())})
        for start in range(0, len(paths), rows)
    ]
    data: Any = ray.data.from_arrow(tables)
    del tables
    data = data.map_batches(
        Worker,
        fn_constructor_args=(work,),
        # Starts as many as fit, and continues with fewer where machines are lost.
        compute=ray.data.ActorPoolStrategy(
            min_size=1, max_size=workers, initial_size=workers, max_tasks_in_flight_per_actor=2
        ),
        batch_size=None,
        batch_format='pyarrow',
        max_restarts=-1,
        max_task_retries=-1,
        **needs,
    )
    for table in data.iter_batches(batch_size=None, batch_format='pyarrow', prefetch_batches=0):
        yield from table.to_pylist()


def block_rows(files: int, workers: int) -> int:
    """Files in a block: few enough that all workers finish at about the same time."""
    return max(1, min(BLOCK, files // (8 * workers)))


@contextlib.contextmanager
def separate_output() -> Iterator[tuple[TextIO, TextIO, str]]:
    """Redirect file descriptors 1 and 2, to which Ray prints from Python and C++, to a temporary file.

    Yields:
        Streams of the original standard output and standard error, and the path of the file.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(tempfile.NamedTemporaryFile(prefix='dsgformer-ray-', suffix='.log'))
        streams = []
        for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
            kept = os.dup(descriptor)
            stack.callback(os.close, kept)
            encoding = getattr(stream, 'encoding', None) or 'utf-8'
            led = open(kept, 'w', encoding=encoding, errors='backslashreplace', closefd=False)  # noqa: SIM115
            streams.append(stack.enter_context(led))
            os.dup2(file.fileno(), descriptor)
            stack.callback(os.dup2, kept, descriptor)
        stack.callback(sys.stderr.flush)
        stack.callback(sys.stdout.flush)
        yield streams[0], streams[1], file.name


@contextlib.contextmanager
def open_late(path: str) -> Iterator[Callable[[str], None]]:
    """Yields a function that writes a line to a file; the file is created with the first line."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)
    file: TextIO | None = None

    def write(line: str) -> None:
        nonlocal file
        file = file or open(path, 'w', encoding='utf-8', buffering=1)  # noqa: SIM115 (closed below)
        file.write(line)

    try:
        yield write
    finally:
        if file is not None:
            file.close()


def remove_leftovers(out: str) -> None:
    """Remove the leftovers of killed workers below a folder: counters and temporary files."""
    shutil.rmtree(os.path.join(out, ATTEMPTS), ignore_errors=True)
    for parent, _, names in os.walk(out):
        for name in names:
            # A temporary file that is newer than its result may belong to another run, which writes it now.
            if match := re.fullmatch(r'(.+)\.part\d+', name):
                part, result = os.path.join(parent, name), os.path.join(parent, match[1])
                with contextlib.suppress(OSError):
                    if os.stat(part).st_mtime <= os.stat(result).st_mtime:
                        os.remove(part)


def _last_line(error: BaseException) -> str:
    """The last line of Ray's message, which is the cause at the end of a traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]


def absolute(tree: Tree) -> Tree:
    """The same tree with absolute paths."""
    listed = tree.listed and os.path.abspath(tree.listed)
    return replace(tree, folder=os.path.abspath(tree.folder), out=os.path.abspath(tree.out), listed=listed)
