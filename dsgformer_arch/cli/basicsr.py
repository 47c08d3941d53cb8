"""`basicsr train` and `basicsr test`: training and testing as a command.

BasicSR 1.4.2 has no command; its pipelines are scripts of a checkout and write
all results below that checkout.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
from typing import Any

from dsgformer_arch.utils.allocator import keep_freed_memory
from dsgformer_arch.utils.errors import UserError, guarded

DESCRIPTION = """\
Train or test a restoration network that an option file describes.

  basicsr train -opt options/train_gopro.yml
  basicsr test  -opt options/test_gopro.yml
  basicsr status experiments/train_gopro

Results, logs and TensorBoard events are written below one folder, the root: in
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
    commands = top.add_subparsers(dest='command', required=True, metavar='{train,test,status}')
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
            '--auto_resume', action='store_true', help='continue from the newest state of an interrupted run'
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
    status = commands.add_parser(
        'status',
        help='show the progress of a training run',
        description='Show the progress of a training run.',
    )
    status.add_argument('experiment', help="the run's folder below experiments/")
    return top


def run(arguments: argparse.Namespace) -> int:
    """Check the option file, then train or test; or show the progress of a run."""
    if arguments.command == 'status':
        from dsgformer_arch.models import history

        print(history.summary(arguments.experiment))
        return 0
    from dsgformer_arch.models import options  # importing torch takes seconds; --help need not wait for it

    file = os.path.abspath(arguments.opt)
    settings = options.read(arguments.opt)
    options.force(settings, arguments.force_yml)
    root = root_folder(file, arguments.root, settings.get('root'))
    os.chdir(root)  # relative paths in the option file start here
    is_train = arguments.command == 'train'
    options.check(settings, arguments.opt, is_train)
    from dsgformer_arch.models import pipelines

    try:
        opt = complete(settings, arguments, root)
        if is_train:
            return pipelines.train(opt, file)
        keep_freed_memory()
        return pipelines.test(opt)
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


def complete(settings: dict[str, Any], arguments: argparse.Namespace, root: str) -> dict[str, Any]:
    """Add to an option file's settings what BasicSR's builders and models expect, and seed.

    Args:
        settings: the option file's content, `--force_yml` applied, checked.
        arguments: the command line.
        root: absolute path of the folder below which everything is written.
    """
    import torch
    from basicsr.utils import set_random_seed
    from basicsr.utils.dist_util import get_dist_info, init_dist

    is_train = arguments.command == 'train'
    dist = arguments.launcher != 'none'
    if dist:
        slurm = arguments.launcher == 'slurm'
        init_dist(arguments.launcher, **((settings.get('dist_params') or {}) if slurm else {}))
    rank, world_size = get_dist_info()
    opt = settings | {'dist': dist, 'rank': rank, 'world_size': world_size, 'is_train': is_train}
    # A restart by torchrun continues where the previous processes ended.  On several machines, an agent that
    # restarts only because another one does counts no restart.
    restarted = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')) > 0
    if dist:
        everywhere = [False] * world_size
        torch.distributed.all_gather_object(everywhere, restarted)
        restarted = any(everywhere)
    opt |= {'auto_resume': arguments.auto_resume or (is_train and restarted), 'root_path': root}
    if opt.get('manual_seed') is None:
        seed = [random.randint(1, 10000)]
        if dist:
            torch.distributed.broadcast_object_list(seed)
        opt['manual_seed'] = seed[0]
    set_random_seed(opt['manual_seed'] + rank)
    if opt['num_gpu'] == 'auto':
        opt['num_gpu'] = torch.cuda.device_count()
    if arguments.debug and not opt['name'].startswith('debug'):
        opt['name'] = f'debug_{opt["name"]}'
    for phase, dataset in opt['datasets'].items():
        dataset['phase'] = phase.split('_')[0]
        if 'scale' in opt:
            dataset['scale'] = opt['scale']
        for key in ('dataroot_gt', 'dataroot_lq'):
            if dataset.get(key) is not None:
                dataset[key] = os.path.realpath(os.path.expanduser(dataset[key]))
    path = opt['path']
    for key in ('pretrain_network_g', 'resume_state'):
        if path.get(key) is not None:
            path[key] = os.path.expanduser(path[key])
    folder = os.path.join(root, 'experiments' if is_train else 'results', opt['name'])
    path['log'] = folder
    path['visualization'] = os.path.join(folder, 'visualization')
    if is_train:
        path['experiments_root'] = folder
        path['models'] = os.path.join(folder, 'models')
        path['training_states'] = os.path.join(folder, 'training_states')
        if 'debug' in opt['name']:
            opt['logger'] |= {'print_freq': 1, 'save_checkpoint_freq': 8}
            if opt.get('val'):
                opt['val']['val_freq'] = 8
    else:
        path['results_root'] = folder
    return opt


if __name__ == '__main__':
    raise SystemExit(main())
