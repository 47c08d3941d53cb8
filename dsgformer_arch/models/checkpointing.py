"""Checkpoints of a training run: atomic writing, and verification before they are used.

A checkpoint is a pair of files with BasicSR's names, `models/net_g_N.pth` and
`training_states/N.state`.  The state is written last and holds the SHA-256 of
the network file, so a checkpoint is complete when its state is.  Each file is
written under a temporary name, synced and renamed.  States of BasicSR and of
earlier versions, which hold no digest, can be read too.
"""

from __future__ import annotations

import glob
import logging
import math
import os
import pickle
import zipfile
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.files import sha256, write_atomically
from dsgformer_arch.zoo.pickles import check_nesting

SCALAR_STATES = {'step', 'eta', 'mu', 'mu_product'}
"""Entries of an optimizer's state (torch.optim) that hold one number per parameter."""

FACTORED_STATES = {'row_var', 'col_var'}
"""Entries that broadcast to the parameter's shape (torch.optim.Adafactor)."""


class DamagedError(UserError):
    """A checkpoint that is incomplete, damaged, or belongs to another network."""


def write(content: Any, path: str) -> None:
    """Save with `torch.save`, atomically.

    Raises:
        UserError: the file cannot be written; a previous file is kept.
    """
    try:
        write_atomically(lambda temporary: torch.save(content, temporary), path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        reason = getattr(error, 'strerror', None) or 'the disk may be full'
        raise UserError(
            f'cannot write {path}: {reason}; free some space and start with --auto_resume'
        ) from None


def network_path(models: str, iteration: int | str) -> str:
    return os.path.join(models, f'net_g_{iteration}.pth')


def state_path(states: str, iteration: int) -> str:
    return os.path.join(states, f'{iteration}.state')


def newest_states(folder: str) -> list[str]:
    """The `<iteration>.state` files of `folder`, newest first."""
    if not os.path.isdir(folder):
        return []
    names = [name for name in os.listdir(folder) if name.endswith('.state') and name[:-6].isdigit()]
    return [os.path.join(folder, name) for name in sorted(names, key=lambda name: -int(name[:-6]))]


def check_archive(path: str) -> None:
    """Check the CRC-32 of all entries of a file of `torch.save`; `torch.load` does not.

    Raises:
        DamagedError: the file is truncated or damaged, or its content is larger than the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.save does not compress; a compressed file may be a decompression bomb.
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise DamagedError(f'{path} is compressed, as torch.save writes no file')
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError):
        raise DamagedError(f'{path} is missing, truncated or damaged') from None
    if damaged:
        raise DamagedError(f'{path} is damaged (checksum of {damaged})')


def read_state(path: str) -> dict[str, Any]:
    """Read a training state to the CPU.

    Raises:
        DamagedError: the file is missing, truncated or damaged, or holds anything but data.
    """
    check_archive(path)
    try:
        check_nesting(path)
        state = torch.load(path, map_location='cpu', weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError):
        raise DamagedError(f'{path} is damaged or no training state') from None
    numbers = ('epoch', 'iter')
    if not isinstance(state, dict) or not all(isinstance(state.get(key), int) for key in numbers):
        raise DamagedError(f'{path} is not a training state')
    for key in ('optimizers', 'schedulers'):
        if not isinstance(state.get(key), list):
            raise DamagedError(f'{path} is not a training state: it has no {key}')
    return state


def read_checkpoint(path: str) -> tuple[dict[str, Any], str]:
    """The state of a checkpoint and the path of its network file, both verified.

    Args:
        path: the state file; the network is in `models/` next to its folder.

    Raises:
        DamagedError: one of them is missing or damaged, or they were not saved together.
    """
    state = read_state(path)
    root = os.path.dirname(os.path.dirname(os.path.abspath(path)))
    network = network_path(os.path.join(root, 'models'), state['iter'])
    if not os.path.isfile(network):
        raise DamagedError(f'{network}, which belongs to {path}, is missing')
    expected = (state.get('files') or {}).get('network')
    if expected is None:  # written by BasicSR or an earlier version
        check_archive(network)
    elif sha256(network) != expected:
        raise DamagedError(f'{network} is damaged or not the network that was saved with {path}')
    return state, network


def find_state(folder: str) -> str | None:
    """The state file of the newest complete checkpoint; others are skipped with a warning."""
    for path in newest_states(folder):
        try:
            read_checkpoint(path)
        except DamagedError as error:
            logging.getLogger('basicsr').warning(f'skipping a checkpoint: {error}')
            continue
        return path
    return None


def resume(opt: dict[str, Any], path: str) -> dict[str, Any]:
    """Read the state at `path`, and set the options that load its network.

    Raises:
        DamagedError: see `read_checkpoint`.
    """
    opt['path']['resume_state'] = path
    if 'network_g' in (opt['path'].get('ignore_resume_networks') or ()):
        return read_state(path)
    state, network = read_checkpoint(path)
    opt['path'] |= {'pretrain_network_g': network, 'param_key_g': 'params', 'strict_load_g': True}
    return state


def check_optimizer_state(optimizer: Optimizer, state: Any, path: str) -> None:
    """Check the shapes of an optimizer's state against its parameters.

    PyTorch's fused optimizers do not check them: they read as many numbers as
    the parameter has.

    Raises:
        DamagedError: it does not fit.
    """
    fault = DamagedError(f'the optimizer state of {path} belongs to another network or optimizer')
    try:
        groups, entries = state['param_groups'], state['state']
        numbers = [number for group in groups for number in group['params']]
        sizes = [len(group['params']) for group in groups]
    except (TypeError, KeyError):
        raise fault from None
    parameters = [parameter for group in optimizer.param_groups for parameter in group['params']]
    if sizes != [len(group['params']) for group in optimizer.param_groups] or not set(entries) <= set(
        numbers
    ):
        raise fault
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        for key, value in group.items():
            if _is_number(value) and not _is_number(saved.get(key, value)):
                raise DamagedError(f'{fault}: {key} is {saved[key]!r}')
    for number, parameter in zip(numbers, parameters, strict=True):
        for name, value in entries.get(number, {}).items():
            if isinstance(value, Tensor) and not _fits(name, value, parameter):
                shapes = [' × '.join(map(str, shape)) or '1' for shape in (value.shape, parameter.shape)]
                raise DamagedError(
                    f'{fault}: {name} of parameter {number} is {shapes[0]}, {value.dtype}, not {shapes[1]}'
                )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _fits(name: str, value: Tensor, parameter: Tensor) -> bool:
    if value.layout is not torch.strided or not value.dtype.is_floating_point:
        return False
    if name in SCALAR_STATES and value.numel() == 1:
        pass
    elif name in FACTORED_STATES:
        if value.ndim != parameter.ndim or any(
            size not in (1, full) for size, full in zip(value.shape, parameter.shape, strict=True)
        ):
            return False
    elif value.shape != parameter.shape:
        return False
    return bool(torch.isfinite(value).all())


def match_memory_format(optimizer: Optimizer) -> None:
    """Give the tensors of the state the strides of their parameters, which fused optimizers assume.

    They differ where `channels_last` was changed before resuming.
    """
    for parameter, entries in optimizer.state.items():
        for name, value in entries.items():
            whole = isinstance(value, Tensor) and value.shape == parameter.shape
            if whole and value.stride() != parameter.stride():
                entries[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def prune(states: str, models: str, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints; of each one, the state first."""
    for path in newest_states(states)[keep:]:
        _remove(path)
        _remove(network_path(models, os.path.basename(path)[:-6]))


def remove_leftovers(folders: Iterable[str]) -> None:
    """Remove temporary files of a process that was killed while it was writing."""
    for folder in folders:
        for path in glob.glob(os.path.join(glob.escape(folder), '*.part[0-9]*')):
            _remove(path)


def _remove(path: str) -> None:
    try:
        os.remove(path)
    except FileNotFoundError:
        return
