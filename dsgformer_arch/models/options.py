"""Option files: read without running code, and checked before anything starts.

A misspelt key in a YAML file is silently ignored by BasicSR, and a missing one
is a `KeyError` after minutes of set-up.  `check` finds both first, and says
which file, which key, and what was probably meant.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterable
from typing import Any

import yaml

from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.text import did_you_mean

Options = dict[str, Any]

TOP_LEVEL = {
    'name', 'model_type', 'scale', 'num_gpu', 'manual_seed', 'datasets', 'network_g', 'path', 'train', 'val',
    'logger', 'dist_params', 'find_unused_parameters', 'root', 'save',
}  # fmt: skip
PATH = {
    'pretrain_network_g', 'param_key_g', 'strict_load_g', 'resume_state', 'ignore_resume_networks',
}  # fmt: skip
TRAIN = {
    'total_iter', 'warmup_iter', 'ema_decay', 'optim_g', 'scheduler', 'grad_clip', 'amp', 'channels_last',
    'compile', 'progressive', 'accumulate', 'max_skipped_steps',
}  # fmt: skip
SAVE = {'keep_last', 'best'}
VAL = {'val_freq', 'save_img', 'suffix', 'pbar', 'metrics', 'tile', 'tile_overlap', 'amp'}
LOGGER = {'print_freq', 'save_checkpoint_freq', 'use_tb_logger', 'wandb'}
DATASET = {
    'name', 'type', 'dataroot_gt', 'dataroot_lq', 'io_backend', 'meta_info_file', 'filename_tmpl', 'gt_size',
    'use_hflip', 'use_rot', 'mean', 'std', 'color', 'batch_size_per_gpu', 'num_worker_per_gpu',
    'dataset_enlarge_ratio', 'prefetch_mode', 'num_prefetch_queue', 'pin_memory', 'persistent_workers',
    'corrupt_images',
}  # fmt: skip


def read(path: str) -> Options:
    """Read an option file as data.

    Raises:
        UserError: the file is missing, is no YAML, asks for Python objects, or holds no mapping.
    """
    try:
        with open(path, encoding='utf-8') as file:
            options = yaml.safe_load(file)
    except OSError as error:
        raise UserError(f'cannot read the option file {path}: {error.strerror}') from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, 'problem_mark', None)
        line = f', line {where.line + 1}' if where else ''
        problem = getattr(error, 'problem', None) or 'it is no text'
        raise UserError(f'{path}{line} is no valid YAML: {problem}') from None
    if not isinstance(options, dict):
        raise UserError(f'{path} holds no options: it should be a mapping such as options/train_gopro.yml')
    return options


def force(options: Options, entries: Iterable[str]) -> None:
    """Apply `--force_yml` entries such as `train:ema_decay=0.999`, in place.

    Raises:
        UserError: an entry has another form, or names a section that is not there.
    """
    for entry in entries:
        keys, separator, value = entry.partition('=')
        parts = [part.strip() for part in keys.split(':')]
        if not separator or not all(re.fullmatch(r'\w+', part) for part in parts):
            raise UserError(f'--force_yml {entry}: write it as section:key=value')
        section: Any = options
        for part in parts[:-1]:
            if not isinstance(section, dict) or not isinstance(section.get(part), dict):
                raise UserError(f'--force_yml {entry}: the option file has no section {part!r}')
            section = section[part]
        section[parts[-1]] = yaml.safe_load(value)


def check(options: Options, path: str, is_train: bool) -> None:
    """Check an option file against what it names: registries, folders, files, image sizes.

    Args:
        options: what `read` returned.
        path: the file's name, for the messages.
        is_train: whether it is to be trained with (`train` and `logger` are needed then).

    Raises:
        UserError: at the first fault, in one sentence.
    """
    _Checker(options, path).run(is_train)


class _Checker:
    """Walks through an option file in the order in which BasicSR uses it."""

    def __init__(self, options: Options, path: str) -> None:
        self.options = options
        self.path = path

    def fault(self, message: str) -> UserError:
        return UserError(f'{self.path}: {message}')

    def run(self, is_train: bool) -> None:
        # Registers the networks, models, losses, metrics and data sets that the file may name.
        from basicsr.utils.registry import ARCH_REGISTRY, MODEL_REGISTRY

        needed = ['name', 'model_type', 'num_gpu', 'datasets', 'network_g', 'path']
        self.keys('', self.options, needed + (['train', 'logger'] if is_train else ['val']), TOP_LEVEL)
        name = self.options['name']
        if not isinstance(name, str) or not re.fullmatch(r'[\w.+-]+', name) or name.startswith('.'):
            raise self.fault(f'name: {name!r} cannot name a folder; use letters, digits, "_", "-" and "."')
        self.registered('model_type', self.options['model_type'], MODEL_REGISTRY)
        self.number('num_gpu', self.options['num_gpu'], also=('auto',))
        network = self.section('network_g', self.options['network_g'])
        self.built_from('network_g', network, ARCH_REGISTRY)
        self.check_path()
        for phase, dataset in self.section('datasets', self.options['datasets']).items():
            self.check_dataset(
                f'datasets: {phase}', phase, self.section(f'datasets: {phase}', dataset), is_train
            )
        if is_train:
            if not any(phase == 'train' for phase in self.options['datasets']):
                raise self.fault('datasets: there is no section train')
            self.check_train()
            logger = self.section('logger', self.options['logger'])
            self.keys('logger', logger, ['print_freq', 'save_checkpoint_freq', 'use_tb_logger'], LOGGER)
            self.check_save()
        self.check_val(is_train)

    def check_save(self) -> None:
        save = self.section('save', self.options.get('save') or {})
        self.keys('save', save, [], SAVE)
        if save.get('keep_last') is not None:
            self.number('save: keep_last', save['keep_last'], least=1)
        metrics = (self.options.get('val') or {}).get('metrics') or {}
        if save.get('best') is not None and save['best'] not in metrics:
            raise self.fault(f'save: best is {save["best"]!r}, but val: metrics has {", ".join(metrics)}')

    def check_path(self) -> None:
        path = self.section('path', self.options['path'])
        self.keys('path', path, [], PATH)
        for key in ('pretrain_network_g', 'resume_state'):
            if path.get(key) and not os.path.isfile(os.path.expanduser(path[key])):
                raise self.fault(f'path: {key}: there is no file {path[key]}')

    def check_dataset(self, where: str, phase: str, dataset: Options, is_train: bool) -> None:
        from basicsr.utils.registry import DATASET_REGISTRY

        phase = phase.split('_')[0]
        if phase not in ('train', 'val', 'test') or (phase == 'test') == is_train:
            allowed = 'train, val, val_1, val_2 …' if is_train else 'test, test_1, test_2 …'
            raise self.fault(f'{where}: data sets are called {allowed} here')
        needed = ['name', 'type']
        if phase == 'train':
            needed += ['gt_size', 'use_hflip', 'use_rot', 'batch_size_per_gpu', 'num_worker_per_gpu']
        kind = dataset.get('type')
        if kind is not None:
            self.registered(f'{where}: type', kind, DATASET_REGISTRY)
        data_set = DATASET_REGISTRY.get(kind) if kind else None
        # Data sets that read other things than pairs say what they need, and check it.
        needed += getattr(data_set, 'required', ('io_backend', 'dataroot_gt', 'dataroot_lq'))
        known = DATASET | set(getattr(data_set, 'options', ()))
        self.keys(where, dataset, needed, known)
        for key in ('gt_size', 'batch_size_per_gpu', 'dataset_enlarge_ratio'):
            if key in dataset and phase == 'train':
                self.number(f'{where}: {key}', dataset[key], least=1)
        check = getattr(data_set, 'check_options', None)
        if check is not None:
            check(dataset, f'{self.path}: {where}')
            return
        corrupt = dataset.get('corrupt_images', 'fail')
        if corrupt not in ('fail', 'replace'):
            raise self.fault(f'{where}: corrupt_images is {corrupt!r}; choose fail or replace')
        backend = self.section(f'{where}: io_backend', dataset['io_backend']).get('type')
        if backend not in ('lmdb', 'disk'):
            raise self.fault(f'{where}: io_backend: type is {backend!r}; choose lmdb or disk')
        sizes = {
            key: self.check_root(f'{where}: {key}', dataset[key], backend)
            for key in ('dataroot_gt', 'dataroot_lq')
        }
        if backend == 'lmdb':
            self.check_pairs(where, phase, dataset, sizes['dataroot_gt'], sizes['dataroot_lq'])

    def check_root(self, where: str, root: Any, backend: str) -> dict[str, tuple[int, int]]:
        """The sizes of an LMDB's images by key; nothing for a folder."""
        if not isinstance(root, str):
            raise self.fault(f'{where}: give the path of {"an LMDB" if backend == "lmdb" else "a folder"}')
        folder = os.path.expanduser(root)
        if not os.path.isdir(folder):
            raise self.fault(f'{where}: there is no {root}; datasets/README.md says how to make it')
        if backend == 'disk':
            if not any(os.scandir(folder)):
                raise self.fault(f'{where}: the folder {root} is empty')
            return {}
        if not root.endswith('.lmdb'):
            raise self.fault(
                f'{where}: {root} does not end with .lmdb; with folders, set io_backend: type to disk'
            )
        return self.read_meta(where, root, folder)

    def read_meta(self, where: str, root: str, folder: str) -> dict[str, tuple[int, int]]:
        try:
            with open(os.path.join(folder, 'meta_info.txt'), encoding='utf-8') as file:
                lines = file.read().splitlines()
            if not os.path.getsize(os.path.join(folder, 'data.mdb')):
                lines = []
        except OSError:
            raise self.fault(
                f'{where}: {root} is no finished LMDB; make it again with tools/create_lmdb.py'
            ) from None
        sizes = {}
        for line in lines:
            found = re.fullmatch(r'(.+)\.\w+ \((\d+),(\d+),\d+\) \d+', line)
            if not found:
                raise self.fault(f'{where}: {root}/meta_info.txt has the unreadable line {line!r}')
            sizes[found[1]] = (int(found[2]), int(found[3]))
        if not sizes:
            raise self.fault(f'{where}: the LMDB {root} is empty; make it again with tools/create_lmdb.py')
        return sizes

    def check_pairs(
        self,
        where: str,
        phase: str,
        dataset: Options,
        gt: dict[str, tuple[int, int]],
        lq: dict[str, tuple[int, int]],
    ) -> None:
        if set(gt) != set(lq):
            key = min(set(gt) ^ set(lq))
            raise self.fault(f'{where}: the image {key} is in only one of dataroot_gt and dataroot_lq')
        if phase == 'train':
            key, size = min(gt.items(), key=lambda item: min(item[1]))
            if min(size) < dataset['gt_size']:
                raise self.fault(
                    f'{where}: gt_size is {dataset["gt_size"]}, but the image {key} is only '
                    f'{size[1]}×{size[0]}; lower gt_size or leave that image out'
                )

    def check_train(self) -> None:
        from basicsr.utils.registry import LOSS_REGISTRY

        train = self.section('train', self.options['train'])
        losses = [key for key in train if key.endswith('_opt')]
        self.keys('train', train, ['total_iter', 'optim_g', 'scheduler'], TRAIN | set(losses))
        self.number('train: total_iter', train['total_iter'], least=1)
        if not losses:
            raise self.fault('train: there is no loss; add pixel_opt with type: L1Loss, say')
        for key in losses:
            self.built_from(f'train: {key}', self.section(f'train: {key}', train[key]), LOSS_REGISTRY)
        for key in ('optim_g', 'scheduler'):
            if 'type' not in self.section(f'train: {key}', train[key]):
                raise self.fault(f'train: {key}: type is missing')
        for key in ('accumulate', 'max_skipped_steps'):
            if train.get(key) is not None:
                self.number(f'train: {key}', train[key], least=1)
        if train.get('amp') not in (None, False, 'bf16', 'fp16'):
            raise self.fault(f'train: amp is {train["amp"]!r}; choose bf16, fp16 or false')

    def check_val(self, is_train: bool) -> None:
        from basicsr.utils.registry import METRIC_REGISTRY

        if self.options.get('val') is None:
            return
        val = self.section('val', self.options['val'])
        self.keys('val', val, ['save_img'] + (['val_freq'] if is_train else []), VAL)
        for name, metric in self.section('val: metrics', val.get('metrics') or {}).items():
            metric = self.section(f'val: metrics: {name}', metric)
            given = {'img', 'img2', 'better'}
            self.built_from(f'val: metrics: {name}', metric, METRIC_REGISTRY, given)

    # What the checks above are made of.

    def section(self, where: str, value: Any) -> Options:
        if not isinstance(value, dict):
            raise self.fault(f'{where} should be a section of its own, not {value!r}')
        return value

    def keys(self, where: str, section: Options, needed: Iterable[str], known: Iterable[str]) -> None:
        prefix = f'{where}: ' if where else ''
        known = set(known) | set(needed)
        for key in section:
            if key not in known:
                raise self.fault(f'{prefix}unknown key {key!r}{did_you_mean(str(key), known)}')
        for key in needed:
            if key not in section:
                raise self.fault(f'{prefix}the key {key!r} is missing')

    def number(self, where: str, value: Any, least: int = 0, also: tuple[str, ...] = ()) -> None:
        if value in also:
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < least:
            raise self.fault(f'{where} is {value!r}, but should be a number of at least {least}')

    def registered(self, where: str, name: Any, registry: Any) -> None:
        if name not in registry:
            raise self.fault(f'{where}: {name!r} is not registered{did_you_mean(str(name), registry.keys())}')

    def built_from(self, where: str, section: Options, registry: Any, given: Iterable[str] = ()) -> None:
        """Check a section whose `type` is registered and whose other keys are its arguments."""
        if 'type' not in section:
            raise self.fault(f'{where}: the key "type" is missing')
        self.registered(f'{where}: type', section['type'], registry)
        parameters = inspect.signature(registry.get(section['type'])).parameters
        named = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        accepted = set(named) | {'type'} | set(given)
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            # BasicSR's metrics swallow any key: only what looks like a slip is refused.
            accepted |= {key for key in section if not did_you_mean(str(key), accepted)}
        required = [n for n, p in named.items() if p.default is p.empty and n not in given]
        self.keys(where, section, required, accepted)
