"""The pipelines of `basicsr train` and `basicsr test`.

BasicSR's training pipeline counts epochs: it ends before `total_iter` where the
batch size does not divide the data set, and restarts the epoch when it resumes.
This loop counts iterations and samples.  Registries, data sets and file names
are those of BasicSR.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import logging.handlers
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from basicsr.data import build_dataloader, build_dataset
from basicsr.models import build_model
from basicsr.utils import (
    get_env_info,
    get_root_logger,
    get_time_str,
    make_exp_dirs,
    mkdir_and_rename,
)
from basicsr.utils.options import copy_opt_file, dict2str
from filelock import FileLock, Timeout

from dsgformer_arch.data.sampler import SampleStream, stop_workers, training_loader
from dsgformer_arch.models import checkpointing
from dsgformer_arch.models.board import Board, writes_board
from dsgformer_arch.models.history import History, draw_curves, lock_path
from dsgformer_arch.models.restoration_model import Interrupted, RestorationModel
from dsgformer_arch.utils.errors import UserError

INTERRUPTED = 130
"""Exit status of a run that a signal ended, after saving its state."""

SIGNALS = [getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGUSR1') if hasattr(signal, name)]

REPEATED = 3.0
"""Seconds after which a second SIGINT ends the process at once; torchrun repeats the first one sooner."""

LOCK_SECONDS = 10.0
"""How long to wait for the lock of a run; loader workers outlive a killed process by some seconds."""

Options = dict[str, Any]


# Training.


def train(opt: Options, file: str) -> int:
    """Train with the given options; from the newest checkpoint if `auto_resume` is set.

    Args:
        opt: complete options, as `cli.basicsr.complete` returns them.
        file: the option file; it is copied to the experiment's folder.

    Returns:
        0, or 130 if a signal ended the run after its state was saved.

    Raises:
        UserError: wrong options or data, a full disk, another run of this name, too many skipped steps.
    """
    with signals_that_stop(), run_lock(opt):
        try:
            status = Training(opt, file).run()
        except RuntimeError as error:
            lost = isinstance(error, torch.distributed.DistError) or 'onnection' in str(error)
            if not opt['dist'] or not lost:
                raise
            print(
                f'error: process {opt["rank"]} lost another process of this run '
                f'({str(error).splitlines()[0]}); resume with --auto_resume',
                file=sys.stderr,
                flush=True,
            )
            # A process group without one of its members cannot be destroyed cleanly.
            os._exit(1)
        finally:
            gc.collect()  # closes the LMDBs of BasicSR's data sets, which nothing else does
    if opt['dist']:
        torch.distributed.destroy_process_group()
    return status


@contextlib.contextmanager
def signals_that_stop() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGUSR1 end a run after the iteration in progress."""
    first: list[float] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if first and number == signal.SIGINT and time.monotonic() - first[0] > REPEATED:
            raise KeyboardInterrupt
        if not first:
            first.append(time.monotonic())
            RestorationModel.stop_requested = True
            os.write(2, b'stopping after this iteration; Ctrl-C again to stop at once\n')

    handlers = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        RestorationModel.stop_requested = False
        for number, handler in handlers.items():
            signal.signal(number, handler)
        logging.shutdown()


@contextlib.contextmanager
def run_lock(opt: Options) -> Iterator[None]:
    """Lock a run; a second run of the same name would write the same files."""
    if opt['rank'] != 0:
        yield
        return
    folder = opt['path']['experiments_root']
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    lock = FileLock(lock_path(folder))
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise UserError(
            f'another run called {opt["name"]} is writing {folder}; wait for it, or give this one another '
            'name with --force_yml name=…'
        ) from None
    try:
        yield
    finally:
        lock.release()


class Training:
    """A training run: build and check everything, create the folders, iterate."""

    def __init__(self, opt: Options, file: str) -> None:
        self.opt = opt
        self.main = opt['rank'] == 0
        self.total = int(opt['train']['total_iter'])
        buffer = logging.handlers.MemoryHandler(10000, flushLevel=logging.CRITICAL + 1)
        self.logger = get_root_logger()
        if self.main:
            self.logger.setLevel(logging.INFO)
            self.logger.addHandler(buffer)
        state = self.find_state()
        self.train_set, self.val_loaders = build_data_sets(opt)
        self.model = build_model(opt)
        if not isinstance(self.model, RestorationModel):
            raise UserError(f'model_type: {opt["model_type"]} is not trained here; use RestorationModel')
        self.start = 0
        if state is not None:
            self.model.resume_training(state)
            self.start = state['iter']
        settings = opt['datasets']['train']
        processes = 1 if opt['dist'] else max(1, opt['num_gpu'])  # DataParallel's share of a batch
        self.batch_size = settings['batch_size_per_gpu'] * processes
        self.global_batch = self.batch_size * opt['world_size']
        # States of BasicSR and of earlier versions do not hold the number of samples read.
        position = state.get('position') if state is not None else 0
        self.model.position = self.start * self.global_batch if position is None else position
        workers = settings['num_worker_per_gpu'] * processes
        if settings.get('prefetch_mode') == 'cpu':
            workers = max(1, workers)  # workers read ahead
        stream = SampleStream(
            len(self.train_set), self.batch_size, max(0, self.total - self.start), opt['manual_seed'],
            self.model.position, opt['rank'], opt['world_size'], getattr(self.train_set, 'order', None),
        )  # fmt: skip
        self.loader = training_loader(
            self.train_set, stream, workers, settings.get('corrupt_images', 'fail') == 'replace',
            bool(settings.get('pin_memory')), max(2, settings.get('num_prefetch_queue') or 0),
        )  # fmt: skip
        self.reported: set[str] = set()
        self.make_folders(state is not None, file, buffer)
        self.board = Board(opt, self.start) if self.main and writes_board(opt) else None

    def find_state(self) -> dict[str, Any] | None:
        """The state to resume from: the one that the options name, or the newest complete one."""
        opt = self.opt
        path = opt['path'].get('resume_state')
        if opt['auto_resume']:
            # Rank 0 decides, so that all processes resume from the same iteration.
            choice: list[str | None] = [None]
            if self.main:
                choice = [checkpointing.find_state(opt['path']['training_states'])]
            if opt['dist']:
                torch.distributed.broadcast_object_list(choice)
            path = choice[0] or path
        return checkpointing.resume(opt, path) if path else None

    def make_folders(self, resumed: bool, file: str, buffer: logging.handlers.MemoryHandler) -> None:
        opt, paths = self.opt, self.opt['path']
        if opt['dist']:
            torch.distributed.barrier()  # all have read what they resume from
        if self.main:
            board = os.path.join(opt['root_path'], 'tb_logger', opt['name'])
            if not resumed:
                make_exp_dirs(opt)
                if writes_board(opt):
                    mkdir_and_rename(board)
            folders = [
                paths[key] for key in ('experiments_root', 'models', 'training_states', 'visualization')
            ]
            for folder in folders:
                os.makedirs(folder, exist_ok=True)
            checkpointing.remove_leftovers(folders)
            copy_opt_file(file, paths['experiments_root'])
            log = os.path.join(paths['log'], f'train_{opt["name"]}_{get_time_str()}.log')
            handler = logging.FileHandler(log, 'a', encoding='utf-8')
            handler.setFormatter(logging.Formatter('%(asctime)s %(levelname)s: %(message)s'))
            buffer.setTarget(handler)
            buffer.close()
            self.logger.removeHandler(buffer)
            self.logger.addHandler(handler)
            self.logger.info(get_env_info())
            self.logger.info(dict2str(opt))
            self.history = History(paths['experiments_root'], self.start)
        if opt['dist']:
            torch.distributed.barrier()

    def run(self) -> int:
        """Run the remaining iterations, up to `total_iter`; returns the exit status."""
        model, logger = self.model, self.logger
        logger.info(
            f'{len(self.train_set)} training images, batches of {self.global_batch}, '
            f'iterations {self.start + 1} to {self.total}'
        )
        iteration, saved = self.start, self.start
        batches: Iterator[dict[str, Any]] = iter(())
        try:
            # The run may have been interrupted between saving its state and validating.
            if self.start and self.validation_is_due(self.start):
                self.validate(self.start)
            begun = time.monotonic()
            batches = iter(self.loader)
            for iteration in range(self.start + 1, self.total + 1):
                waiting = time.monotonic()
                batch = self.next_batch(batches)
                waited = time.monotonic() - waiting
                model.update_learning_rate(iteration, self.opt['train'].get('warmup_iter') or -1)
                model.feed_data(batch)
                model.optimize_parameters(iteration)
                model.position += self.global_batch
                if iteration % self.opt['logger']['print_freq'] == 0:
                    self.report(iteration, begun, time.monotonic() - waiting, waited)
                last = iteration == self.total
                if iteration % self.opt['logger']['save_checkpoint_freq'] == 0 or last or model.stop_agreed:
                    self.save(iteration)
                    saved = iteration
                if model.stop_agreed and not last:
                    raise Interrupted
                if self.validation_is_due(iteration):
                    self.validate(iteration)
        except Interrupted:
            if saved != iteration:
                self.save(iteration)
            if self.main:
                print(f'saved iteration {iteration}; resume with --auto_resume', file=sys.stderr, flush=True)
            return INTERRUPTED
        finally:
            stop_workers(batches)
            if self.board:
                self.board.close()
        logger.info('End of training; saving the latest network')
        model.save(-1, -1)
        return 0

    def next_batch(self, batches: Iterator[dict[str, Any]]) -> dict[str, Any]:
        batch = next(batches)
        if 'error' in batch:
            raise UserError(batch['error'])
        for fault in batch.pop('faults'):
            if fault not in self.reported:
                self.reported.add(fault)
                # Only the first process's logger prints warnings.
                log = self.logger.warning if self.main else self.logger.error
                log(f'{fault}; other images take its place')
        return batch

    def validation_is_due(self, iteration: int) -> bool:
        val = self.opt.get('val')
        return val is not None and (iteration % val['val_freq'] == 0 or iteration == self.total)

    def validate(self, iteration: int) -> None:
        self.model.improved.clear()
        for loader in self.val_loaders:
            self.model.validation(loader, iteration, self.board, self.opt['val']['save_img'])
            self.record_metrics(iteration, loader.dataset.opt['name'])
        if self.main:
            draw_curves(self.opt['path']['experiments_root'])
        best = (self.opt.get('save') or {}).get('best')
        if self.main and self.val_loaders and best:
            first = self.val_loaders[0].dataset.opt['name']
            if (first, best) in self.model.improved:
                self.model.save_networks('best')

    def record_metrics(self, iteration: int, dataset: str) -> None:
        if not self.main or not self.opt['val'].get('metrics'):
            return
        values = self.model.metric_results
        metrics = {name: finite(value) for name, value in values.items()}
        best = {
            name: record
            for name, record in self.model.best_metric_results[dataset].items()
            if math.isfinite(record['val'])
        }
        self.history.add({'iteration': iteration, 'dataset': dataset, 'metrics': metrics, 'best': best})

    def save(self, iteration: int) -> None:
        self.logger.info(f'Saving iteration {iteration}')
        self.model.save(self.model.position // len(self.train_set), iteration)
        keep = (self.opt.get('save') or {}).get('keep_last')
        if self.main and keep:
            paths = self.opt['path']
            checkpointing.prune(paths['training_states'], paths['models'], keep)

    def report(self, iteration: int, begun: float, took: float, waited: float) -> None:
        """Log the losses, the speed and the remaining time."""
        if not self.main:
            return
        rate = self.model.get_current_learning_rate()[0]
        values = self.model.get_current_log()
        each = (time.monotonic() - begun) / (iteration - self.start)
        seconds_left = each * (self.total - iteration)
        left = timedelta(seconds=round(seconds_left))
        speed = self.global_batch / max(took, 1e-9)
        losses = ', '.join(f'{name}: {value:.4e}' for name, value in values.items())
        skipped = f', {self.model.skipped} steps skipped' if self.model.skipped else ''
        self.logger.info(
            f'[{self.opt["name"]}] iter: {iteration:7,d}/{self.total:,d}, {losses}, lr: {rate:.3e}, '
            f'{speed:.1f} images/s, waited {waited * 1000:.0f} ms for data, {peak_memory():.2f} GB, '
            f'{left} left{skipped}'
        )
        entry: dict[str, Any] = {'iteration': iteration, 'total': self.total, 'lr': rate}
        entry |= {'images_per_second': speed, 'data_wait': waited, 'memory_gb': peak_memory()}
        entry['losses'] = {name: finite(value) for name, value in values.items()}
        self.history.add(entry | {'seconds_left': seconds_left, 'skipped': self.model.skipped})
        if self.board:
            shown = {f'losses/{name}': value for name, value in values.items()} | {'lr': rate}
            shown |= {'images_per_second': speed, 'data_wait': waited, 'memory_gb': peak_memory()}
            self.board.scalars(shown, iteration)


def build_data_sets(opt: Options) -> tuple[Any, list[Any]]:
    """The training set, and a loader of each validation set, in the option file's order."""
    train_set, val_loaders = None, []
    for phase, settings in opt['datasets'].items():
        dataset = build_dataset(settings)
        if phase == 'train':
            train_set = dataset
        else:
            val_loaders.append(
                build_dataloader(
                    dataset, settings, num_gpu=opt['num_gpu'], dist=opt['dist'], seed=opt['manual_seed']
                )
            )
    return train_set, val_loaders


def finite(value: float) -> float | None:
    """The value, or None for NaN and infinity, which JSON lacks."""
    return value if math.isfinite(value) else None


def peak_memory() -> float:
    """Peak memory of this process in GB (10⁹ bytes): of the GPU if there is one, else of the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# Testing.


def test(opt: Options) -> int:
    """Restore and score every test set of the options.

    Raises:
        UserError: wrong options, data or checkpoint, or a full disk.
    """
    if not opt['path'].get('pretrain_network_g'):
        raise UserError('path: pretrain_network_g is missing; name the checkpoint to test')
    logger = get_root_logger()
    if opt['rank'] == 0:
        logger.setLevel(logging.INFO)
    _, loaders = build_data_sets({**opt, 'datasets': dict(sorted(opt['datasets'].items()))})
    model = build_model(opt)
    make_exp_dirs(opt)
    if opt['rank'] == 0:
        log = os.path.join(opt['path']['log'], f'test_{opt["name"]}_{get_time_str()}.log')
        handler = logging.FileHandler(log, 'a', encoding='utf-8')
        handler.setFormatter(logging.Formatter('%(asctime)s %(levelname)s: %(message)s'))
        logger.addHandler(handler)
    logger.info(get_env_info())
    logger.info(dict2str(opt))
    for loader in loaders:
        logger.info(f'Testing {loader.dataset.opt["name"]}, {len(loader.dataset)} images')
        model.validation(loader, opt['name'], None, opt['val']['save_img'])
    return 0
