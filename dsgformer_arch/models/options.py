"""Option files: reading, and validation before a run starts.

BasicSR ignores misspelt keys, and a missing key is a `KeyError` minutes later.  `check` reports all faults of
a file at once: keys and types (by `option_schema`), names in registries, data sets, checkpoints, and settings
that network, optimizer or scheduler refuse.
"""

from __future__ import annotations

import inspect
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import yaml
from torch import nn

from dsgformer_arch.models import board
from dsgformer_arch.models.option_schema import (
    DATASET_HOOKS,
    METRIC_GIVEN,
    Dataset,
    DistParams,
    Logger,
    Path,
    Save,
    Top,
    Train,
    Val,
    arguments_model,
    check_section,
)
from dsgformer_arch.utils import safe_yaml
from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.text import did_you_mean, shortened

Options = dict[str, Any]

MAX_FAULTS = 30
"""Faults that are listed; further ones are counted."""
MAX_MODULES = 10_000
"""Most modules of a network; ConvIR-L, the largest here, has 1,257."""
MAX_PARAMETERS = 10**10


def read(path: str) -> Options:
    """Read an option file as data.

    Raises:
        UserError: the file is missing, is not YAML of plain data (see `safe_yaml`), or holds no mapping.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f'cannot read the option file {path}: it is not an ordinary file')
        with open(path, encoding='utf-8-sig') as file:
            options = safe_yaml.load(file.read(safe_yaml.MAX_CHARACTERS + 1))
    except OSError as error:
        raise UserError(f'cannot read the option file {path}: {error.strerror}') from None
    except UnicodeDecodeError:
        raise UserError(f'{path} is not valid YAML: it is not UTF-8 text') from None
    except yaml.YAMLError as error:
        line, problem = safe_yaml.describe(error)
        where = f', line {line}' if line else ''
        raise UserError(f'{path}{where} is not valid YAML: {problem}') from None
    if not isinstance(options, dict):
        raise UserError(f'{path} holds no options: it should be a mapping such as options/train_gopro.yml')
    return options


def force(options: Options, entries: Iterable[str]) -> None:
    """Apply `--force_yml` entries such as `train:ema_decay=0.999`, in place.

    Values are YAML, as in the file: `no` is false, `~` is null, `{a: 1}` is a section.

    Raises:
        UserError: an entry is malformed, its value is not YAML, or its section does not exist.
    """
    for entry in entries:
        keys, separator, text = entry.partition('=')
        parts = [part.strip() for part in keys.split(':')]
        if not separator or not all(re.fullmatch(r'[\w.-]+', part) for part in parts):
            raise UserError(f'--force_yml {entry}: write it as section:key=value')
        section: Any = options
        for part in parts[:-1]:
            if not isinstance(section, dict) or not isinstance(section.get(part), dict):
                raise UserError(f'--force_yml {entry}: the option file has no section {part!r}')
            section = section[part]
        section[parts[-1]] = _forced_value(text, entry)


def _forced_value(text: str, entry: str) -> Any:
    try:
        line = safe_yaml.load(f'value: {text}')
    except yaml.YAMLError as error:
        raise UserError(
            f'--force_yml {entry}: the value is not YAML: {safe_yaml.describe(error)[1]}'
        ) from None
    if not isinstance(line, dict) or list(line) != ['value']:
        raise UserError(f'--force_yml {entry}: give one value')
    return line['value']


def check(options: Options, path: str, is_train: bool) -> None:
    """Check options against the schema, registries, data sets and checkpoints.

    Nothing is written or downloaded, and no image is decoded.

    Args:
        options: as returned by `read`.
        path: the file name for messages.
        is_train: whether they are options for training, which need `train` and `logger`.

    Raises:
        UserError: there are faults; the message lists them, one per line.
    """
    faults = list(dict.fromkeys(_Checker(options).run(is_train)))
    if not faults:
        return
    if len(faults) == 1:
        raise UserError(f'{path}: {faults[0]}')
    listed = '\n  '.join(faults[:MAX_FAULTS])
    more = f'\n  and {len(faults) - MAX_FAULTS} more' if len(faults) > MAX_FAULTS else ''
    raise UserError(f'{path} has {len(faults)} faults:\n  {listed}{more}')


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The optimizer of torch.optim with this name.

    Raises:
        UserError: there is none.
    """
    found = getattr(torch.optim, name, None)
    if _is_optimizer(found):
        return found  # type: ignore[return-value]
    known = [each for each in dir(torch.optim) if _is_optimizer(getattr(torch.optim, each))]
    raise UserError(
        f'torch.optim has no optimizer {name!r}{did_you_mean(name, known) or "; take AdamW, say"}'
    )


def _is_optimizer(value: object) -> bool:
    return (
        isinstance(value, type)
        and issubclass(value, torch.optim.Optimizer)
        and value is not torch.optim.Optimizer
    )


def scheduler_class(name: str) -> Any:
    """The learning-rate schedule with this name, of this package, BasicSR or torch.

    Raises:
        UserError: there is none.
    """
    from basicsr.models import lr_scheduler as basicsr_schedulers

    from dsgformer_arch.models import lr_scheduler

    modules = (lr_scheduler, basicsr_schedulers, torch.optim.lr_scheduler)
    # BasicSR's own class under torch's name; it also restarts.
    name = 'MultiStepRestartLR' if name == 'MultiStepLR' else name
    kinds = {
        each: kind for module in modules[::-1] for each, kind in vars(module).items() if _is_schedule(kind)
    }
    if name in kinds:
        return kinds[name]
    hint = did_you_mean(name, kinds) or '; take WarmupCosineLR, say'
    raise UserError(f'there is no scheduler {name!r}{hint}')


def _is_schedule(value: object) -> bool:
    base = torch.optim.lr_scheduler.LRScheduler
    return isinstance(value, type) and issubclass(value, base) and value is not base


class _Checker:
    """Checks an option file and collects its faults."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.faults: list[str] = []
        self.sound = False

    def run(self, is_train: bool) -> list[str]:
        # Registers the networks, models, losses, metrics and data sets that the file may name.
        from basicsr.utils.registry import ARCH_REGISTRY, MODEL_REGISTRY

        needed = ['train', 'logger'] if is_train else ['val']
        self.sound = self.section('', self.options, Top, needed)
        if 'model_type' in self.options:
            self.registered('model_type', self.options['model_type'], MODEL_REGISTRY)
        sound = 'network_g' in self.options and self.built_from(
            'network_g', self.options['network_g'], ARCH_REGISTRY
        )
        network = self.network() if sound else None
        self.check_path(network, is_train)
        datasets = self.options.get('datasets')
        if isinstance(datasets, dict):
            for phase, dataset in datasets.items():
                self.check_dataset(phase, dataset, is_train)
            wanted = 'train' if is_train else 'test'
            if not any(phase.split('_')[0] == wanted for phase in datasets):
                self.faults.append(f'datasets: there is no section {wanted}')
        if is_train and 'train' in self.options:
            self.check_train()
        if is_train and 'logger' in self.options and self.section('logger', self.options['logger'], Logger):
            self.faults += board.faults(self.options['logger'])
        if self.options.get('dist_params') is not None:
            self.section('dist_params', self.options['dist_params'], DistParams)
        self.check_val(is_train)
        self.check_save()
        return self.faults

    # Networks and checkpoints.

    def network(self) -> nn.Module | None:
        """Build the network on the meta device to check its settings; None where that is not possible."""
        from basicsr.archs import build_network

        settings = self.options['network_g']
        try:
            with _bounded_building(), torch.device('meta'), _quiet():
                return build_network(settings)
        except NotImplementedError:
            return None  # IPT reads values of its tensors in its constructor
        except Exception as error:  # a network may raise anything for invalid settings
            if isinstance(error, RuntimeError) and 'meta' in str(error):
                return None
            kind = settings['type']
            reason = _first_line(error).removeprefix(f'{kind}: ')
            self.faults.append(f'network_g: {kind} refuses its settings: {reason}')
        return None

    def check_path(self, network: nn.Module | None, is_train: bool) -> None:
        path = self.options.get('path')
        if path is None or not self.section('path', path, Path):
            return
        missing = [
            key
            for key in ('pretrain_network_g', 'resume_state')
            if path.get(key) and not os.path.isfile(os.path.expanduser(path[key]))
        ]
        self.faults += [f'path: {key}: there is no file {shortened(path[key])}' for key in missing]
        if not is_train and not path.get('pretrain_network_g'):
            self.faults.append('path: pretrain_network_g: name the checkpoint that is to be tested')
        if path.get('pretrain_network_g') and 'pretrain_network_g' not in missing and network is not None:
            self.check_checkpoint(path, network)

    def check_checkpoint(self, path: Mapping[str, Any], network: nn.Module) -> None:
        from dsgformer_arch.zoo.checkpoint import mismatches, read_checkpoint

        file = os.path.expanduser(path['pretrain_network_g'])
        try:
            checkpoint = read_checkpoint(file, path.get('param_key_g'))
        except UserError as error:
            self.faults.append(f'path: pretrain_network_g: {error}')
            return
        different = mismatches(network, checkpoint.state) if path.get('strict_load_g', True) else []
        if different:
            kind = self.options['network_g']['type']
            self.faults.append(
                f'path: pretrain_network_g: {file} does not fit {kind} with these settings: '
                + '; '.join(different)
            )

    # Data.

    def check_dataset(self, phase: str, dataset: Any, is_train: bool) -> None:
        from basicsr.utils.registry import DATASET_REGISTRY

        where = f'datasets: {phase}'
        phase = phase.split('_')[0]
        if phase not in ('train', 'val', 'test') or (phase == 'test') == is_train:
            allowed = 'train, val, val_1, val_2 …' if is_train else 'test, test_1, test_2 …'
            self.faults.append(f'{where}: data sets are called {allowed} here')
            return
        kind = dataset.get('type') if isinstance(dataset, dict) else None
        known = not isinstance(kind, str) or self.registered(f'{where}: type', kind, DATASET_REGISTRY)
        data_set = DATASET_REGISTRY.get(kind) if known and isinstance(kind, str) else None
        needed = list(getattr(data_set, 'required', DATASET_HOOKS['required']))
        if phase == 'train':
            needed += ['gt_size', 'use_hflip', 'use_rot', 'batch_size_per_gpu', 'num_worker_per_gpu']
        if not self.section(where, dataset, Dataset, needed, getattr(data_set, 'options', ())) or not known:
            return
        if dataset.get('persistent_workers') and not dataset.get('num_worker_per_gpu', 1):
            self.faults.append(f'{where}: persistent_workers needs num_worker_per_gpu of at least 1')
        if dataset.get('prefetch_mode') == 'cuda' and not dataset.get('pin_memory'):
            self.faults.append(f'{where}: prefetch_mode cuda needs pin_memory: true')
        if data_set is not None and hasattr(data_set, 'check_options'):
            # Data sets with other sources than pairs have a check of their own.
            self.collect(partial(data_set.check_options, dataset, where))
            return
        if all(dataset.get(key) is not None for key in DATASET_HOOKS['required']):
            self.check_images(where, phase, dataset)

    def check_images(self, where: str, phase: str, dataset: Options) -> None:
        from dsgformer_arch.data.meta_info import Entry

        sides: dict[str, dict[str, Entry]] = {}
        for key in ('dataroot_gt', 'dataroot_lq'):
            found = self.collect(
                partial(_images_of, dataset[key], dataset['io_backend']['type']), f'{where}: {key}: '
            )
            if found is not None:
                sides[key] = found
        if len(sides) < 2:
            return
        if dataset['io_backend']['type'] == 'lmdb':
            self.check_pairs(where, phase, dataset, sides['dataroot_gt'], sides['dataroot_lq'])
        else:
            self.check_files(where, dataset, set(sides['dataroot_gt']), set(sides['dataroot_lq']))

    def check_files(self, where: str, dataset: Options, gt: set[str], lq: set[str]) -> None:
        """Check that every sharp image of a folder, or of its list, has a blurred one."""
        listing = dataset.get('meta_info_file')
        if listing:
            try:
                with open(listing, encoding='utf-8') as file:
                    listed = {line.split(' ')[0].strip() for line in file}
            except (OSError, UnicodeDecodeError) as error:
                reason = getattr(error, 'strerror', None) or 'it is not text'
                self.faults.append(f'{where}: meta_info_file: cannot read {listing}: {reason}')
                return
            missing = sorted(listed - gt)
            if missing:
                self.faults.append(f'{where}: meta_info_file names {missing[0]!r}, which dataroot_gt lacks')
            gt &= listed
        elif len(gt) != len(lq):
            self.faults.append(f'{where}: dataroot_gt has {len(gt)} files, but dataroot_lq {len(lq)}')
        template = dataset.get('filename_tmpl', '{}')
        for name in sorted(gt):
            stem, suffix = os.path.splitext(name)
            if template.format(stem) + suffix not in lq:
                self.faults.append(f'{where}: the image {name} of dataroot_gt has no partner in dataroot_lq')
                return

    def check_pairs(
        self, where: str, phase: str, dataset: Options, gt: dict[str, Any], lq: dict[str, Any]
    ) -> None:
        if gt.keys() != lq.keys():
            key = min(gt.keys() ^ lq.keys())
            self.faults.append(f'{where}: the image {key} is in only one of dataroot_gt and dataroot_lq')
            return
        scale = self.options.get('scale', 1) if self.sound else 1
        for key, sharp in gt.items():
            blurred = lq[key]
            if sharp.size != (blurred.height * scale, blurred.width * scale):
                self.faults.append(
                    f'{where}: the image {key} is {blurred.width}×{blurred.height} in dataroot_lq and '
                    f'{sharp.width}×{sharp.height} in dataroot_gt; pair images of one size'
                )
                return
        if phase == 'train' and not dataset.get('pad_to_gt_size'):
            smallest = min(gt.values(), key=lambda entry: min(entry.size))
            if min(smallest.size) < dataset['gt_size']:
                self.faults.append(
                    f'{where}: gt_size is {dataset["gt_size"]}, but the image {smallest.key} is only '
                    f'{smallest.width}×{smallest.height}; lower gt_size or leave that image out'
                )

    # Training and validation.

    def check_train(self) -> None:
        from basicsr.utils.registry import LOSS_REGISTRY

        train = self.options['train']
        losses = [key for key in train if key.endswith('_opt')] if isinstance(train, dict) else []
        if not self.section('train', train, Train, also=losses):
            if not isinstance(train, dict):
                return
        elif not losses:
            self.faults.append('train: there is no loss; add pixel_opt with type: L1Loss, say')
        for key in losses:
            self.check_loss(f'train: {key}', train[key], LOSS_REGISTRY)
        self.check_optimizer(train)
        self.check_progressive(train)

    def check_loss(self, where: str, loss: Any, registry: Any) -> None:
        self.built_from(where, loss, registry)
        # A loss of losses: `MultiScaleLoss` applies `base` to each scale.
        if isinstance(loss, dict) and isinstance(loss.get('base'), dict):
            self.check_loss(f'{where}: base', loss['base'], registry)

    def check_optimizer(self, train: Options) -> None:
        """Build optimizer and scheduler for a parameter with one element."""
        self.build('train: optim_g', train.get('optim_g'), optimizer_class, [nn.Parameter(torch.zeros(1))])
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-4)
        self.build('train: scheduler', train.get('scheduler'), scheduler_class, optimizer)

    def build(self, where: str, section: Any, find: Callable[[str], Any], target: Any) -> None:
        """Build the class of a section with `target` as its first argument."""
        if not isinstance(section, dict) or not isinstance(section.get('type'), str):
            return
        kind = self.collect(lambda: find(section['type']), f'{where}: type: ')
        given = () if kind is None else tuple(inspect.signature(kind).parameters)[:1]
        if kind is None or not self.section(where, section, arguments_model(kind, given)):
            return
        try:
            kind(target, **{name: value for name, value in section.items() if name != 'type'})
        except Exception as error:  # a class may raise anything for invalid settings
            self.faults.append(f'{where}: {section["type"]} refuses its settings: {_first_line(error)}')

    def check_progressive(self, train: Options) -> None:
        stages = train.get('progressive')
        names = ('iters', 'batch_sizes', 'gt_sizes')
        if not isinstance(stages, dict) or not all(isinstance(stages.get(name), list) for name in names):
            return
        if len({len(stages[name]) for name in names}) > 1:
            lengths = ', '.join(f'{name} {len(stages[name])}' for name in names)
            self.faults.append(
                f'train: progressive: each list needs one entry for each stage, but they have {lengths}'
            )
        datasets = self.options.get('datasets')
        dataset = datasets.get('train') if isinstance(datasets, dict) else None
        for name, key in (('batch_sizes', 'batch_size_per_gpu'), ('gt_sizes', 'gt_size')):
            whole = dataset.get(key) if isinstance(dataset, dict) else None
            sizes = [size for size in stages[name] if isinstance(size, int)]
            if isinstance(whole, int) and sizes and max(sizes) > whole:
                self.faults.append(
                    f'train: progressive: {name} goes up to {max(sizes)}, '
                    f'but datasets: train: {key} is {whole}'
                )

    def check_val(self, is_train: bool) -> None:
        from basicsr.utils.registry import METRIC_REGISTRY

        val = self.options.get('val')
        if val is None:
            return
        sound = self.section('val', val, Val, ['val_freq'] if is_train else [])
        if sound and val.get('tile') is not None and val.get('tile_overlap', 32) >= val['tile']:
            overlap = val.get('tile_overlap', 32)
            self.faults.append(f'val: tile_overlap is {overlap}, but should be less than tile, {val["tile"]}')
        metrics = val.get('metrics') if isinstance(val, dict) else None
        for name, metric in (metrics if isinstance(metrics, dict) else {}).items():
            self.built_from(f'val: metrics: {name}', metric, METRIC_REGISTRY, METRIC_GIVEN)

    def check_save(self) -> None:
        save, val = self.options.get('save'), self.options.get('val')
        if save is None or not self.section('save', save, Save) or save.get('best') is None:
            return
        metrics = (val.get('metrics') or {}) if isinstance(val, dict) else {}
        if save['best'] not in metrics:
            hint = did_you_mean(save['best'], metrics)
            self.faults.append(f'save: best is {save["best"]!r}, which val: metrics does not have{hint}')

    # Helpers.

    def collect(self, step: Callable[[], Any], prefix: str = '') -> Any:
        """Call `step` and return its result; a `UserError` becomes a fault, and the result None."""
        try:
            return step()
        except UserError as error:
            self.faults.append(f'{prefix}{error}')
            return None

    def section(
        self, where: str, section: Any, model: Any, required: Iterable[str] = (), also: Iterable[str] = ()
    ) -> bool:
        """Check a section against its model; returns whether it is valid."""
        found = check_section(where, section, model, required, tuple(also))
        self.faults += found
        return not found

    def registered(self, where: str, name: Any, registry: Any) -> bool:
        if isinstance(name, str) and name not in registry:
            hint = did_you_mean(name, registry.keys())
            self.faults.append(f'{where}: {name[:60]!r} is not registered{hint}')
            return False
        return isinstance(name, str)

    def built_from(self, where: str, section: Any, registry: Any, given: tuple[str, ...] = ()) -> bool:
        """Check a section whose `type` is registered and whose other keys are its arguments."""
        if not isinstance(section, dict):
            self.faults += [] if where == 'network_g' else check_section(where, section, Dataset)
            return False
        if not isinstance(section.get('type'), str):
            problem = f'is {section["type"]!r}, but should be text' if 'type' in section else 'is missing'
            self.faults.append(f'{where}: type {problem}')
            return False
        if not self.registered(f'{where}: type', section['type'], registry):
            return False
        model = arguments_model(registry.get(section['type']), given)
        return self.section(where, section, model, also=given)


def _images_of(root: str, backend: str) -> dict[str, Any]:
    """The images of an LMDB by key; the files of a folder by name.

    Raises:
        UserError: the place is missing, empty, unfinished or damaged.
    """
    from dsgformer_arch.data import lmdb_files, meta_info

    folder = os.path.expanduser(root)
    if not os.path.isdir(folder):
        raise UserError(f'there is no {shortened(root)}; datasets/README.md says how to make it')
    if backend == 'disk':
        names = [entry.name for entry in os.scandir(folder) if entry.is_file() and entry.name[0] != '.']
        if not names:
            raise UserError(f'the folder {root} holds no image')
        return dict.fromkeys(names)
    if not root.endswith('.lmdb'):
        raise UserError(f'{root} does not end with .lmdb; with folders, set io_backend: type to disk')
    if not os.path.isfile(os.path.join(folder, meta_info.NAME)):
        raise UserError(f'{root} is not a finished LMDB; make it again with tools/create_lmdb.py')
    lmdb_files.check_lmdb(folder)
    images = meta_info.read(folder)
    if not images:
        raise UserError(f'the LMDB {root} is empty; make it again with tools/create_lmdb.py')
    return images


@contextmanager
def _bounded_building() -> Iterator[None]:
    """Refuse a network of absurd size during its construction, before it exhausts time or memory."""
    from torch.nn.modules import module as torch_module

    counts = {'modules': 0, 'parameters': 0}

    def count_module(*_: Any) -> None:
        counts['modules'] += 1
        if counts['modules'] > MAX_MODULES:
            raise UserError(f'these settings make a network of more than {MAX_MODULES:,} modules')

    def count_parameter(_: Any, __: str, parameter: Any) -> None:
        counts['parameters'] += 0 if parameter is None else parameter.numel()
        if counts['parameters'] > MAX_PARAMETERS:
            raise UserError(f'these settings make a network of more than {MAX_PARAMETERS:,} parameters')

    hooks = [
        torch_module.register_module_module_registration_hook(count_module),
        torch_module.register_module_parameter_registration_hook(count_parameter),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the log line of BasicSR for each network, and warnings."""
    import logging

    logger = logging.getLogger('basicsr')
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
