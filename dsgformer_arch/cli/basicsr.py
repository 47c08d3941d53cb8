"""`basicsr train` and `basicsr test`: BasicSR's pipelines as a command.

BasicSR 1.4.2 has no command of its own; its pipelines are scripts of a
checkout, and take the place of that checkout for the root of all results.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import signal
import sys
import traceback
from types import FrameType
from typing import Any

from dsgformer_arch.utils.allocator import keep_freed_memory
from dsgformer_arch.utils.errors import UserError, guarded

DESCRIPTION = """\
Train or test a restoration network that an option file describes.

  basicsr train -opt options/train_gopro.yml
  basicsr test  -opt options/test_gopro.yml

Results, logs and TensorBoard events land below one folder, the root: in
experiments/, results/ and tb_logger/.  It is --root, else the option file's
key `root`, else the folder that holds the option file's folder options/, else
the option file's own folder.  Relative paths in an option file start there
too, from whatever folder the command is run.
"""


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    return guarded(lambda: run(parser().parse_args(arguments)))


def parser() -> argparse.ArgumentParser:
    """The command line, BasicSR's own options included."""
    top = argparse.ArgumentParser(
        prog='basicsr', description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest='command', required=True, metavar='{train,test}')
    for name, summary in (
        ('train', 'train a network, and validate it while training'),
        ('test', 'restore a data set with a trained network and measure the result'),
    ):
        command = commands.add_parser(name, help=summary, description=f'{summary[0].upper()}{summary[1:]}.')
        command.add_argument('-opt', required=True, metavar='FILE', help='option file (YAML)')
        command.add_argument('--root', metavar='DIR', help='folder of experiments/, results/ and tb_logger/')
        command.add_argument(
            '--launcher',
            choices=['none', 'pytorch', 'slurm'],
            default='none',
            help='how processes were started; pytorch under torchrun (default: %(default)s)',
        )
        command.add_argument(
            '--auto_resume', action='store_true', help='go on from the newest state of an interrupted run'
        )
        command.add_argument(
            '--debug', action='store_true', help='print each iteration, validate and save every 8th'
        )
        command.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
        command.add_argument(
            '--force_yml',
            nargs='+',
            metavar='KEY=VALUE',
            default=[],
            help='change options of the file, such as train:total_iter=1000',
        )
    return top


def run(arguments: argparse.Namespace) -> int:
    """Check the option file, then hand over to BasicSR's pipeline."""
    from dsgformer_arch.models import options  # importing torch takes seconds; --help need not wait for it

    file = os.path.abspath(arguments.opt)
    settings = options.read(arguments.opt)
    options.force(settings, arguments.force_yml)
    root = root_folder(file, arguments.root, settings.get('root'))
    os.chdir(root)  # relative paths in the option file start here
    is_train = arguments.command == 'train'
    options.check(settings, arguments.opt, is_train)
    sys.argv = [sys.argv[0], '-opt', file, '--launcher', arguments.launcher]
    sys.argv += ['--auto_resume'] * arguments.auto_resume + ['--debug'] * arguments.debug
    if arguments.force_yml:
        sys.argv += ['--force_yml', *arguments.force_yml]
    try:
        return train(root) if is_train else test(root)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            where = f' {error.filename}' if error.filename else ''
            raise UserError(f'cannot write{where} below {root}: {error.strerror}') from None
        raise


def root_folder(file: str, argument: str | None, key: str | None = None) -> str:
    """The folder below which everything is written; see `DESCRIPTION`.

    Args:
        file: absolute path of the option file.
        argument: what `--root` says; relative to the working directory.
        key: the option file's `root`; relative to the file.

    Raises:
        UserError: the folder does not exist.
    """
    folder = os.path.dirname(file)
    if argument or key:
        start = os.getcwd() if argument else folder
        root = os.path.normpath(os.path.join(start, os.path.expanduser(str(argument or key))))
        if not os.path.isdir(root):
            raise UserError(
                f'the root folder {root} does not exist; make it, or name another one with --root'
            )
        return root
    return os.path.dirname(folder) if os.path.basename(folder) == 'options' else folder


def train(root: str) -> int:
    """Train; on SIGINT or SIGTERM the state is saved after the iteration in progress."""
    import basicsr.train

    from dsgformer_arch.models.restoration_model import Interrupted, RestorationModel

    def stop(number: int, frame: FrameType | None) -> None:
        if RestorationModel.stop_requested:
            raise KeyboardInterrupt
        RestorationModel.stop_requested = True
        print('stopping after this iteration; once more to stop at once', file=sys.stderr, flush=True)

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        basicsr.train.train_pipeline(root)
    except Interrupted as error:
        loop = loop_variables(error, basicsr.train.train_pipeline)
        loop['model'].save(loop['epoch'], loop['current_iter'])
        print(
            f'saved iteration {loop["current_iter"]}; go on with --auto_resume', file=sys.stderr, flush=True
        )
        return 130
    finally:
        RestorationModel.stop_requested = False
        for number, handler in handlers.items():
            signal.signal(number, handler)
        logging.shutdown()
    return 0


def loop_variables(error: BaseException, function: Any) -> dict[str, Any]:
    """The local variables of `function`, which `error` passed through.

    BasicSR's loop keeps the epoch in a variable of its own and nowhere else.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code is function.__code__:
            return frame.f_locals
    raise RuntimeError(f'{function.__name__} is not among the callers')


def test(root: str) -> int:
    """Restore and measure every test set of the option file."""
    import basicsr.test

    keep_freed_memory()
    basicsr.test.test_pipeline(root)
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
