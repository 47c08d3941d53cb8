"""The systems by name, and the system that a checkpoint belongs to.

`create('restormer')` builds a system with its official settings;
`load('weights.pth')` identifies the system and its size from the checkpoint alone.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import dsgformer_arch.archs  # noqa: F401  (registers the networks)
from dsgformer_arch.archs.layers.network import RGB, RestorationNetwork, meta_copy
from dsgformer_arch.archs.tlc import use_local_pooling
from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.files import sha256, write_atomically
from dsgformer_arch.utils.text import did_you_mean, one_line
from dsgformer_arch.zoo.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_into,
    mismatches,
    read_checkpoint,
)
from dsgformer_arch.zoo.systems import SYSTEMS, Reported, System, Weights

__all__ = [
    'Reported',
    'System',
    'UnknownSystemError',
    'Weights',
    'architectures',
    'convert',
    'create',
    'create_on_meta',
    'create_without_data',
    'get',
    'identify',
    'load',
    'names',
    'nearest',
    'network_class',
    'settings_of',
    'shipped',
]

TrainSize = int | Sequence[int]

WEIGHTS = Path(__file__).parents[1] / 'weights'
"""Folder of the weights in the package."""

MOST_ENTRIES = 1000
"""How many numbers a setting may have; a checkpoint with more was not made by training."""

LARGEST_SHARE = 4
"""How many times more parameters a network may have than a checkpoint that is loaded in part."""

_BY_NAME = {system.name: system for system in SYSTEMS}


class UnknownSystemError(UserError):
    """A name that no system has."""


def names() -> list[str]:
    """The names of all systems."""
    return list(_BY_NAME)


def shipped() -> list[str]:
    """The names of the systems whose weights are in the package."""
    return [name for name, system in _BY_NAME.items() if system.weights is not None]


def get(name: str) -> System:
    """The description of a system.

    Raises:
        UnknownSystemError: no system has this name; the message has the nearest ones.
    """
    try:
        return _BY_NAME[name]
    except KeyError:
        hint = did_you_mean(name, _BY_NAME) or f'; there are {", ".join(_BY_NAME)}'
        raise UnknownSystemError(f'there is no system {name!r}{hint}') from None


def architectures() -> list[str]:
    """The networks of all systems, by their names in ARCH_REGISTRY."""
    return list(dict.fromkeys(system.architecture for system in _BY_NAME.values()))


def network_class(architecture: str) -> type[RestorationNetwork]:
    """The class registered in ARCH_REGISTRY for a system's `architecture`."""
    return ARCH_REGISTRY.get(architecture)


def create(
    name: str, *, pretrained: bool = False, tlc: TrainSize | None = None, **overrides: Any
) -> RestorationNetwork:
    """Build a system, with new weights or with those in the package.

    It takes images (N, 3, H, W) of any size, see `RestorationNetwork.forward`.  Keys of the state dict,
    and number and order of the outputs, are those of the official implementation.

    Args:
        name: one of `names()`.
        pretrained: load the system's `weights`, whose SHA-256 is verified.
        tlc: size of the training crops, in pixels, for local pooling at test time; None for none.
        overrides: settings of the architecture other than the system's.

    Raises:
        UnknownSystemError: no system has this name.
        UserError: the architecture has no such setting, not this value of it, or nothing to pool locally;
            or, with `pretrained`, the package has no weights of the system, or damaged ones.
    """
    system = get(name)
    if pretrained:
        return load(_shipped(system), name, tlc=tlc, **overrides)
    return _build(system.architecture, {**system.settings, **overrides}, tlc)


def create_on_meta(name: str, **overrides: Any) -> RestorationNetwork:
    """A system whose tensors have names, shapes and types but no data, which takes no memory.

    Raises:
        UnknownSystemError: no system has this name.
        UserError: as `create`.
    """
    system = get(name)
    return _build_on_meta(system.architecture, {**system.settings, **overrides})


create_without_data = create_on_meta
"""The former name of `create_on_meta`."""


def load(
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    strict: bool = True,
    tlc: TrainSize | None = None,
    param_key: str | None = None,
    **overrides: Any,
) -> RestorationNetwork:
    """Build the system that a checkpoint belongs to, with its weights, in float32.

    The settings are those that the file states (`network` in a `.pth` file of this project's training, the
    metadata of a safetensors file); else the system's, if `name` is given; else those that follow from the
    shapes, completed by the official ones.

    Args:
        path: a `.pth`, `.pt`, `.ckpt` or `.safetensors` file as authors publish it.
        name: the expected system; by default it is identified (see `identify`).
        strict: refuse a checkpoint whose names or shapes differ; otherwise load what fits, if anything.
        tlc: as in `create`.
        param_key: as in `read_checkpoint`.
        overrides: settings that leave no trace in the weights, such as ConvIR's `dilations`.

    Raises:
        CheckpointError: no checkpoint, damaged, holds code; of no known system, or not of `name`; stated
            settings that contradict the weights; not for RGB images; or `strict` and something differs,
            with the nearest system and the first differences in the message.
        UserError: as `create`.
    """
    return network_of(read_checkpoint(path, param_key), name, strict=strict, tlc=tlc, **overrides)


def network_of(
    checkpoint: Checkpoint,
    name: str | None = None,
    *,
    strict: bool = True,
    tlc: TrainSize | None = None,
    **overrides: Any,
) -> RestorationNetwork:
    """As `load`, for a checkpoint that has been read."""
    architecture, settings = _described(checkpoint, name)
    settings = {**settings, **overrides}
    # Nothing of the size that the file states is allocated before it is compared with what the file holds.
    _check_depth(architecture, settings, checkpoint)
    shapes = _build_on_meta(architecture, settings)
    _check_stated(shapes, checkpoint, name)
    _check_channels(shapes, checkpoint)
    if strict or not _shapes(shapes.state_dict()) & _shapes(checkpoint.state):
        _check_fit(shapes, checkpoint, name or architecture)
    elif _numbers(shapes.state_dict()) > LARGEST_SHARE * _numbers(checkpoint.state):
        raise CheckpointError(
            f'{checkpoint.path}: its settings ask for {_numbers(shapes.state_dict()):,d} parameters, but it '
            f'holds {_numbers(checkpoint.state):,d}; give a checkpoint of the whole network'
        )
    network = _build(architecture, settings, tlc)
    load_into(network, checkpoint, strict=strict)
    return network


def identify(
    source: Mapping[str, Tensor] | Checkpoint | str | os.PathLike[str],
) -> tuple[str, dict[str, Any]]:
    """Identify the system that weights belong to.

    Args:
        source: a bare state dict, what `read_checkpoint` returned, or a file.  Only the latter two can
            state settings that leave no trace in the weights.

    Returns:
        The system's name, or its architecture's if no named system has these sizes; and all settings
        that rebuild it.  Settings that neither the file nor the weights determine have the official values.

    Raises:
        CheckpointError: the weights of no known system, in which case the nearest and the first differing
            keys are named; entries that tell the settings are missing; or settings that the file states
            contradict its weights.
    """
    if isinstance(source, (str, os.PathLike)):
        source = read_checkpoint(source)
    if isinstance(source, Checkpoint) and source.described() is not None:
        architecture, settings = _described(source, None)
        _check_depth(architecture, settings, source)
        _check_fit(_build_on_meta(architecture, settings), source, architecture)
    else:
        state = source.state if isinstance(source, Checkpoint) else source
        architecture = _recognised(state)
        settings = settings_of(architecture, state)
    return name_of(architecture, settings) or architecture, settings


def settings_of(architecture: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """All settings that rebuild the network of `state`, the weights of an architecture; as `identify`."""
    for key in state:
        if any(int(index) > len(state) for index in re.findall(r'\d+', key[:MOST_ENTRIES])):
            raise CheckpointError(
                f'these are {len(state)} weights, but one is named {key[:80]!r}; download again'
            )
    try:
        found = network_class(architecture).settings_from_state(state)
    except (LookupError, ArithmeticError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f'these are weights of {architecture}, but {error} is missing or wrong; download the file again'
        ) from None
    # Other settings are taken from the system of these sizes, else from the architecture's first one.
    name = name_of(architecture, found)
    like = get(name) if name else systems_of(architecture)[0]
    return {**like.settings, **found}


def nearest(state: Mapping[str, Tensor]) -> tuple[str, float]:
    """The system whose state dict is most like `state`, a bare one.

    Returns:
        Its name, and the entries of the same name and shape that both have over those that either has.
    """
    have = _shapes(state)
    shares = {name: len(have & _shapes_of(name)) / len(have | _shapes_of(name)) for name in _BY_NAME}
    best = max(shares, key=lambda name: shares[name])
    return best, shares[best]


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    name: str | None = None,
    dtype: torch.dtype | None = None,
    param_key: str | None = None,
) -> tuple[str, dict[str, Any]]:
    """Write a checkpoint as safetensors with the name and the settings of its system, and read it back.

    The file's metadata hold `format` (`'pt'`), `system` (a name, or an architecture) and `settings`
    (JSON).  Keys around the state dict are dropped; values of the weights stay, and their types unless
    `dtype` says otherwise.

    Args:
        source: as for `load`.
        target: the file; it is written atomically.
        name: the expected system; by default it is identified.
        dtype: the type of all floating-point tensors, such as `torch.float16`; None keeps each one's own.
        param_key: as in `read_checkpoint`.

    Returns:
        `system` and `settings`.

    Raises:
        CheckpointError: as for `load` with `strict`; or what was written did not read back the same.
        UserError: `target` cannot be written, or does not end with .safetensors.
    """
    if not os.fspath(target).endswith('.safetensors'):
        raise UserError(f'{os.fspath(target)}: choose a name that ends with .safetensors')
    checkpoint = read_checkpoint(source, param_key)
    architecture, settings = _described(checkpoint, name)
    _check_depth(architecture, settings, checkpoint)
    network = _build_on_meta(architecture, settings)
    _check_stated(network, checkpoint, name)
    _check_channels(network, checkpoint)
    _check_fit(network, checkpoint, name or architecture)
    system = name or name_of(architecture, settings) or architecture
    metadata = {'format': 'pt', 'system': system, 'settings': json.dumps(settings, sort_keys=True)}
    # Safetensors refuse tensors that share memory or have gaps.
    state = {
        key: _cast(tensor.detach(), dtype).clone().contiguous() for key, tensor in checkpoint.state.items()
    }

    def write(temporary: str) -> None:
        save_file(state, temporary, metadata)
        written = read_checkpoint(temporary)
        if written.metadata != metadata or not _equal(written.state, state):
            raise CheckpointError(f'{os.fspath(target)} did not read back as it was written; check the disk')

    try:
        write_atomically(write, target)
    except (OSError, SafetensorError) as error:
        raise UserError(f'cannot write {os.fspath(target)}: {error}') from None
    return system, settings


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def _build(architecture: str, settings: Mapping[str, Any], tlc: TrainSize | None) -> RestorationNetwork:
    kind = network_class(architecture)
    known = kind.default_settings()
    for key in settings:
        if key not in known:
            raise UserError(f'{architecture} has no setting {key!r}{did_you_mean(key, known)}')
    if tlc is not None and not any(system.tlc for system in systems_of(architecture)):
        pooled = ', '.join(system.name for system in _BY_NAME.values() if system.tlc)
        raise UserError(f'{architecture} has no local pooling; leave it off, or choose one of {pooled}')
    try:
        network = kind(**settings)
    except (TypeError, ValueError, LookupError, ArithmeticError, AssertionError, RuntimeError) as error:
        raise UserError(f'{architecture} cannot be built with these settings: {one_line(error)}') from error
    if tlc is not None:
        use_local_pooling(network, tlc)
    return network


def _build_on_meta(architecture: str, settings: Mapping[str, Any]) -> RestorationNetwork:
    """The network on the meta device, which takes neither time nor memory."""
    try:
        with torch.device('meta'):
            return _build(architecture, settings, None)
    except UserError as error:
        if not isinstance(error.__cause__, RuntimeError):
            raise
    # IPT computes with tensors of the CPU while it is built.
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Accessing the data pointer')
        network = _build(architecture, settings, None)
    return meta_copy(network)


def _shipped(system: System) -> Path:
    """The file of a system's weights in the package.

    Raises:
        UserError: the package has none.
        CheckpointError: they are not those that were published.
    """
    if system.weights is None:
        have = ', '.join(other.name for other in _BY_NAME.values() if other.weights) or 'no system'
        raise UserError(
            f'the package has no weights of {system.name}, but of {have}; train it, or load a file'
        )
    path = WEIGHTS / system.weights.file
    try:
        found = sha256(path)
    except OSError as error:
        raise UserError(f'cannot read {path}: {error.strerror}; install the package again') from None
    if found != system.weights.sha256:
        raise CheckpointError(
            f'{path} has the SHA-256 {found}, not {system.weights.sha256}; install the package again'
        )
    return path


def systems_of(architecture: str) -> list[System]:
    """The systems of an architecture, in the order of the table."""
    return [system for system in _BY_NAME.values() if system.architecture == architecture]


def name_of(architecture: str, settings: Mapping[str, Any]) -> str | None:
    """The system with exactly these settings; those that are not given count as equal."""
    defaults = network_class(architecture).default_settings()
    for system in systems_of(architecture):
        own = {**defaults, **system.settings}
        if all(_plain(own.get(key)) == _plain(value) for key, value in settings.items()):
            return system.name
    return None


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _described(checkpoint: Checkpoint, name: str | None) -> tuple[str, dict[str, Any]]:
    """Architecture and settings as the file states them, else by `name`, else by the weights."""
    stated = checkpoint.described()
    if stated is not None:
        return _stated(checkpoint, *stated, name)
    if name is not None:
        system = get(name)
        return system.architecture, dict(system.settings)
    try:
        found, settings = identify(checkpoint.state)
    except UserError as error:
        raise CheckpointError(f'{checkpoint.path}: {error}') from None
    architecture = architecture_of(found)
    return architecture, _rgb(architecture, settings)


def _stated(
    checkpoint: Checkpoint, found: str, settings: dict[str, Any], name: str | None
) -> tuple[str, dict[str, Any]]:
    """The settings that a file states, checked against the expected system.

    Args:
        checkpoint: the file.
        found: a system or an architecture.
        settings: what differs from that system's settings, or from the architecture's defaults.
        name: the expected system, if any.
    """
    try:
        architecture = architecture_of(found)
    except UnknownSystemError as error:
        raise CheckpointError(f'{checkpoint.path}: by its metadata, {error}') from None
    if found in _BY_NAME:
        settings = {**get(found).settings, **settings}
    if name is not None and get(name).architecture != architecture:
        raise CheckpointError(f'{checkpoint.path} does not fit {name}: it states that it is a {found}')
    return architecture, _rgb(architecture, settings)


def _check_stated(network: RestorationNetwork, checkpoint: Checkpoint, name: str | None) -> None:
    """Refuse a file that states other settings than those of the expected system."""
    stated = checkpoint.described()
    if stated is None or name in (None, stated[0]):
        return
    system = get(str(name))
    wanted = create_on_meta(system.name).settings
    for key in system.settings:
        if key in wanted and _plain(network.settings[key]) != _plain(wanted[key]):
            raise CheckpointError(
                f'{checkpoint.path} does not fit {name}: it states that {key} is {network.settings[key]}, '
                f'not {wanted[key]}'
            )


def architecture_of(found: str) -> str:
    """The architecture of a name that may be a system's or an architecture's.

    Raises:
        UnknownSystemError: it is neither.
    """
    if systems_of(found):
        return found
    return get(found).architecture


def _rgb(architecture: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    channels = network_class(architecture).channel_settings
    return {key: value for key, value in settings.items() if key not in channels}


def _recognised(state: Mapping[str, Tensor]) -> str:
    for architecture in architectures():
        if network_class(architecture).recognises(state):
            return architecture
    name, share = nearest(state)
    raise CheckpointError(
        f'these are the weights of no system known here; the nearest is {name} with {share:.0%} of the '
        f'entries in common: {"; ".join(mismatches(create_on_meta(name), state))}'
    )


def _check_channels(network: nn.Module, checkpoint: Checkpoint) -> None:
    """Refuse the weights of a network for images that are not RGB."""
    for key, tensor in network.state_dict().items():
        want, have = tensor.shape, checkpoint.state.get(key, tensor).shape
        if want == have or len(want) != 4 or len(have) != 4:
            continue
        for side, verb in ((1, 'takes'), (0, 'returns')):
            if want[side] == RGB and (*want[:side], *want[side + 1 :]) == (*have[:side], *have[side + 1 :]):
                raise CheckpointError(
                    f'{checkpoint.path}: its network {verb} images of {have[side]} channels ({key}), '
                    f'not the {RGB} of RGB; give weights for RGB images'
                )


def _check_depth(architecture: str, settings: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Refuse settings that would build more blocks than the file has weights."""
    for key, value in settings.items():
        entries = value if isinstance(value, (list, tuple)) else [value]
        blocks = sum(entry for entry in entries if isinstance(entry, int))
        deep = key in network_class(architecture).depth_settings and blocks > len(checkpoint.state)
        if deep or len(entries) > MOST_ENTRIES:
            raise CheckpointError(
                f'{checkpoint.path}: its settings ask for {max(blocks, len(entries))} blocks ({key}), but it '
                f'holds {len(checkpoint.state)} weights; download it again'
            )


def _check_fit(network: nn.Module, checkpoint: Checkpoint, wanted: str) -> None:
    faults = mismatches(network, checkpoint.state)
    if faults and checkpoint.described() is not None and wanted not in _BY_NAME:
        raise CheckpointError(
            f'{checkpoint.path}: the settings that it states contradict its weights: {"; ".join(faults)}'
        )
    if faults:
        name, share = nearest(checkpoint.state)
        raise CheckpointError(
            f'{checkpoint.path} does not fit {wanted}: {"; ".join(faults)}; the nearest system is {name} '
            f'with {share:.0%} of the entries in common'
        )


def _numbers(state: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in state.values())


def _shapes(state: Mapping[str, Tensor]) -> frozenset[tuple[str, torch.Size]]:
    return frozenset((key, tensor.shape) for key, tensor in state.items())


@cache
def _shapes_of(name: str) -> frozenset[tuple[str, torch.Size]]:
    return _shapes(create_on_meta(name).state_dict())


def _equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and torch.equal(_bytes(a[key]), _bytes(b[key])) for key in a
    )


def _bytes(tensor: Tensor) -> Tensor:
    """The tensor's memory: NaNs are equal to themselves there."""
    return tensor.contiguous().view(-1).view(torch.uint8)
