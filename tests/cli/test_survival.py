"""Training runs that are killed, stopped by signals or lose a process end as uninterrupted ones do.

The runs are children made by forking: real processes that train, without the
seconds that importing PyTorch takes.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dsgformer_arch.cli import basicsr
from dsgformer_arch.models.restoration_model import RestorationModel
from tests.cli.test_basicsr import assert_same_end
from tests.trees import tiny_options, write_project

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason='CUDA does not survive forking')

KILLS = 10
"""For each number of workers."""


class Child:
    """`basicsr train` in a process group of its own.

    `events` is a pipe that gets `i` after each iteration and `f` before each fsync.
    """

    def __init__(self, arguments: list[str], log: Path, environment: dict[str, str] | None = None) -> None:
        self.log = log
        self.events, writing = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(writing)
            return
        status = 1
        try:
            os.setsid()
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout = os.fdopen(1, 'w')
            sys.stderr = os.fdopen(2, 'w')
            os.environ.update(environment or {})
            self.tell(writing)
            status = basicsr.main(arguments)
        except SystemExit as error:
            status = int(error.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    def tell(self, writing: int) -> None:
        step, sync = RestorationModel.optimize_parameters, os.fsync

        def optimize_parameters(model: RestorationModel, iteration: int) -> None:
            step(model, iteration)
            os.write(writing, b'i')

        def fsync(descriptor: int) -> None:
            os.write(writing, b'f')
            time.sleep(0.02)  # a checkpoint of a tiny network is written too fast to be caught
            sync(descriptor)

        RestorationModel.optimize_parameters = optimize_parameters  # type: ignore[method-assign]
        os.fsync = fsync

    def wait_for(self, event: bytes, count: int) -> bool:
        """Whether as many events of a kind came before the process ended."""
        while count:
            found = os.read(self.events, 1)
            if not found:
                return False
            count -= found == event
        return True

    def end(self) -> int:
        """The exit status; negative for a signal."""
        while os.read(self.events, 4096):
            pass
        os.close(self.events)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def project(folder: Path, iterations: int, workers: int) -> Path:
    options = tiny_options(iterations=iterations)
    options['datasets']['train']['num_worker_per_gpu'] = workers
    options['logger'] |= {'save_checkpoint_freq': 3, 'print_freq': 10}
    options['val']['val_freq'] = 6
    return write_project(folder, options)


def finish(arguments: list[str], log: Path) -> None:
    child = Child(arguments, log)
    assert child.end() == 0, log.read_text()


@pytest.mark.long
@pytest.mark.parametrize('workers', [0, 2])
def test_a_run_killed_at_random_moments(workers: int, tmp_path: Path) -> None:
    """Killed with SIGKILL, every other time while a checkpoint or a record is being written."""
    file = project(tmp_path, iterations=60, workers=workers)
    arguments = ['train', '-opt', str(file)]
    finish([*arguments, '--force_yml', 'name=whole'], tmp_path / 'whole.log')
    rng = random.Random(workers)
    kills = 0
    while kills < KILLS:
        child = Child([*arguments, '--auto_resume'], tmp_path / 'killed.log')
        kind, most = (b'f', 12) if kills % 2 else (b'i', 8)
        alive = child.wait_for(kind, rng.randint(1, most))
        time.sleep(rng.uniform(0, 0.02))
        os.kill(child.pid, signal.SIGKILL)
        status = child.end()
        assert alive, f'ended with {status} after {kills} kills: {child.log.read_text()[-2000:]}'
        kills += status == -signal.SIGKILL
    finish([*arguments, '--auto_resume'], tmp_path / 'killed.log')
    log = (tmp_path / 'killed.log').read_text()
    print(f'{kills} kills, resumed {log.count("iterations ")} times, skipped {log.count("skipping")}')
    # No word about tracebacks: the workers of a killed process may print one when they find it gone.
    assert 'skipping a checkpoint' not in log
    runs = tmp_path / 'experiments'
    assert_same_end(runs / 'whole', runs / 'tiny', 60)
    assert not list((runs / 'tiny').rglob('*.part*'))


@pytest.mark.long
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_the_group_saves_and_stops(number: signal.Signals, tmp_path: Path) -> None:
    """Loader workers get the signal too."""
    file = project(tmp_path, iterations=14, workers=2)
    arguments = ['train', '-opt', str(file)]
    finish([*arguments, '--force_yml', 'name=whole'], tmp_path / 'whole.log')
    child = Child(arguments, tmp_path / 'stopped.log')
    assert child.wait_for(b'i', 7)
    os.killpg(child.pid, number)
    os.killpg(child.pid, number)  # torchrun passes on what the group has already been sent
    assert child.end() == 130, child.log.read_text()
    text = child.log.read_text()
    assert 'Traceback' not in text
    assert 'resume with --auto_resume' in text
    run = tmp_path / 'experiments' / 'tiny'
    newest = max(int(path.stem) for path in (run / 'training_states').iterdir())
    assert newest >= 7
    finish([*arguments, '--auto_resume'], tmp_path / 'stopped.log')
    assert_same_end(tmp_path / 'experiments' / 'whole', run, 14)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return int(probe.getsockname()[1])


def two_processes(file: Path, folder: Path, *extra: str, restarts: tuple[int, int] = (0, 0)) -> list[Child]:
    """`restarts` is what torchrun says to each process."""
    port = str(free_port())
    return [
        Child(
            ['train', '-opt', str(file), '--launcher', 'pytorch', *extra],
            folder / f'rank{rank}.log',
            {
                'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': '2',
                'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port,
                'TORCHELASTIC_RESTART_COUNT': str(restarts[rank]),
            },
        )
        for rank in (0, 1)
    ]  # fmt: skip


def means(run: Path) -> dict[str, float]:
    import json

    return json.loads((run / 'metrics_sample.json').read_text())['means']


def shared(iterations: int, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    options = tiny_options(iterations=iterations)
    options['logger'] |= {'save_checkpoint_freq': 3}
    options['val']['val_freq'] = 6
    options['train']['optim_g'] = {'type': 'SGD', 'lr': 0.05, 'momentum': 0.9}
    change(options)
    return write_project(folder, options)


@pytest.mark.long
@pytest.mark.parametrize('restarts', [None, (0, 1), (1, 0)])
def test_two_processes_stop_together_and_end_like_one(
    restarts: tuple[int, int] | None, tmp_path: Path
) -> None:
    """Only one of them gets the signal; resumed, they end with the weights of one process.

    They are resumed with --auto_resume, or by torchrun on two machines, which counts the restarts of each.
    """

    def batch_of(count: int) -> Callable[[dict[str, Any]], Any]:
        return lambda options: options['datasets']['train'].update(batch_size_per_gpu=count)

    file = shared(12, tmp_path, batch_of(2))
    finish(['train', '-opt', str(file), '--force_yml', 'name=alone'], tmp_path / 'alone.log')
    file = shared(12, tmp_path, batch_of(1))
    children = two_processes(file, tmp_path)
    assert children[1].wait_for(b'i', 4)
    os.kill(children[1].pid, signal.SIGTERM)
    assert [child.end() for child in children] == [130, 130], children[0].log.read_text()
    run = tmp_path / 'experiments' / 'tiny'
    stopped = max(int(path.stem) for path in (run / 'training_states').iterdir())
    assert 4 <= stopped < 12
    if restarts is None:
        children = two_processes(file, tmp_path, '--auto_resume')
    else:
        children = two_processes(file, tmp_path, restarts=restarts)
    assert [child.end() for child in children] == [0, 0], children[0].log.read_text()
    assert [path.name for path in (tmp_path / 'experiments').iterdir() if 'archived' in path.name] == []
    alone = torch.load(tmp_path / 'experiments' / 'alone' / 'models' / 'net_g_12.pth', weights_only=True)
    together = torch.load(run / 'models' / 'net_g_12.pth', weights_only=True)
    for key in ('params', 'params_ema'):
        for name, value in alone[key].items():
            torch.testing.assert_close(together[key][name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert means(run) == pytest.approx(means(tmp_path / 'experiments' / 'alone'), abs=1e-3)


@pytest.mark.long
def test_a_process_that_dies_ends_the_others(tmp_path: Path) -> None:
    file = shared(1000, tmp_path, lambda options: None)
    children = two_processes(file, tmp_path)
    assert children[0].wait_for(b'i', 4)
    os.kill(children[1].pid, signal.SIGKILL)
    assert children[1].end() == -signal.SIGKILL
    assert children[0].end() == 1
    text = children[0].log.read_text()
    assert 'process 0 lost another process of this run' in text
    assert 'Traceback' not in text


@pytest.mark.long
@pytest.mark.parametrize('killed', [signal.SIGTERM, signal.SIGKILL])
def test_torchrun(killed: signal.Signals, tmp_path: Path) -> None:
    """SIGTERM to torchrun saves and stops; it restarts a job of which a process was killed."""
    file = shared(12, tmp_path, lambda options: options['logger'].update(print_freq=1))
    process = subprocess.Popen(
        [
            sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2',
            '--max-restarts', '2', '-m', 'dsgformer_arch.cli.basicsr', 'train', '-opt', str(file),
            '--launcher', 'pytorch',
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, encoding='utf-8',
        env=os.environ | {'OMP_NUM_THREADS': '1'},
    )  # fmt: skip
    assert process.stderr is not None
    before = ''
    for line in process.stderr:
        before += line
        if 'iter:       5' in line:
            break
    target = process.pid
    if killed == signal.SIGKILL:
        import psutil

        # The processes of the run; each has the option file in its command line.
        target = psutil.Process(process.pid).children()[-1].pid
    os.kill(target, killed)
    rest = process.stderr.read()
    status = process.wait(120)
    run = tmp_path / 'experiments' / 'tiny'
    newest = max(int(path.stem) for path in (run / 'training_states').iterdir())
    if killed == signal.SIGKILL:
        assert status == 0, before + rest
        assert newest == 12
        assert (run / 'models' / 'net_g_latest.pth').is_file()
    else:
        assert status != 0
        assert 'resume with --auto_resume' in rest, before + rest
        assert 5 <= newest < 12


@pytest.mark.long
def test_torchrun_on_two_machines(tmp_path: Path) -> None:
    """Two agents of one process each; one process is killed, both restart, and they end like one process."""
    import psutil

    file = shared(12, tmp_path, lambda options: options['datasets']['train'].update(batch_size_per_gpu=2))
    finish(['train', '-opt', str(file), '--force_yml', 'name=alone'], tmp_path / 'alone.log')
    file = shared(12, tmp_path, lambda options: options['datasets']['train'].update(batch_size_per_gpu=1))
    run, port = tmp_path / 'experiments' / 'tiny', free_port()
    # A store that outlives the processes hands out the addresses of dead ones (pytorch/pytorch#135712).
    environment = {'OMP_NUM_THREADS': '1', 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'}
    machines, logs = [], []
    for number in (0, 1):
        logs.append(tmp_path / f'machine{number}.log')
        with logs[-1].open('wb') as log:
            command = [
                sys.executable, '-m', 'torch.distributed.run', '--nnodes', '2', '--nproc-per-node', '1',
                '--node-rank', str(number), '--rdzv-id', 'tiny', '--rdzv-backend', 'c10d',
                '--rdzv-endpoint', f'127.0.0.1:{port}', '--local-addr', '127.0.0.1', '--max-restarts', '3',
                '-m', 'dsgformer_arch.cli.basicsr', 'train', '-opt', str(file), '--launcher', 'pytorch',
            ]  # fmt: skip
            machines.append(psutil.Popen(command, stdout=log, stderr=log, env=os.environ | environment))
    try:
        while not (run / 'training_states' / '3.state').exists():
            assert all(machine.poll() is None for machine in machines), logs[0].read_text()
            time.sleep(0.02)
        for child in machines[1].children():
            child.kill()
        assert [machine.wait() for machine in machines] == [0, 0], logs[0].read_text() + logs[1].read_text()
    finally:
        for machine in machines:
            if machine.is_running():
                machine.kill()
    alone = torch.load(tmp_path / 'experiments' / 'alone' / 'models' / 'net_g_12.pth', weights_only=True)
    together = torch.load(run / 'models' / 'net_g_12.pth', weights_only=True)
    for key in ('params', 'params_ema'):
        for name, value in alone[key].items():
            torch.testing.assert_close(together[key][name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert [path.name for path in run.parent.iterdir() if 'archived' in path.name] == []
