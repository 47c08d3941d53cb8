"""Every compared system by name, and which checkpoint belongs to which.

`create('restormer')` builds a system as its authors released it, for images of any size;
`load('weights.pth')` tells from a checkpoint alone whose it is, and of what size.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from dsgformer_arch.archs.tlc import use_local_pooling
from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.files import write_atomically
from dsgformer_arch.utils.text import did_you_mean
from dsgformer_arch.zoo.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_into,
    mismatches,
    read_checkpoint,
)
from dsgformer_arch.zoo.padded import padded
from dsgformer_arch.zoo.systems import SYSTEMS, Reported, System

__all__ = [
    'Reported',
    'System',
    'UnknownSystemError',
    'convert',
    'create',
    'create_without_data',
    'get',
    'identify',
    'load',
    'names',
    'nearest',
    'network_class',
    'settings_of',
]

TrainSize = int | Sequence[int]

CHANNEL_SETTINGS = ('in_c', 'out_c', 'inp_channels', 'out_channels', 'img_channel')
"""Settings for the channels of images; checkpoints are loaded with the default, RGB."""

RGB = 3

_BY_NAME = {system.name: system for system in SYSTEMS}


class UnknownSystemError(UserError):
    """A name that no system has."""


def names() -> list[str]:
    """The names of all systems."""
    return list(_BY_NAME)


def get(name: str) -> System:
    """What is known of a system.

    Raises:
        UnknownSystemError: no system has this name; the message has the nearest ones.
    """
    try:
        return _BY_NAME[name]
    except KeyError:
        hint = did_you_mean(name, _BY_NAME) or f'; there are {", ".join(_BY_NAME)}'
        raise UnknownSystemError(f'there is no system {name!r}{hint}') from None


def network_class(architecture: str) -> Any:
    """The class registered in ARCH_REGISTRY for a system's `architecture`."""
    return ARCH_REGISTRY.get(architecture)


def create(name: str, *, tlc: TrainSize | None = None, **overrides: Any) -> nn.Module:
    """Build a system with fresh weights.

    It takes images (N, 3, H, W) of any size: it pads by reflection to what it needs and crops its
    outputs.  Keys of the state dict, and number and order of the outputs, are the release's.

    Args:
        name: one of `names()`.
        tlc: train size, in pixels, for local pooling at test time; None for none.
        overrides: settings of the architecture other than the system's.

    Raises:
        UnknownSystemError: no system has this name.
        UserError: the architecture has no such setting, not this value of it, or nothing to pool locally.
    """
    system = get(name)
    return _build(system.architecture, {**system.settings, **overrides}, tlc)


def create_without_data(name: str) -> nn.Module:
    """A system whose tensors have shapes but no data: to look at, at the cost of no memory.

    Raises:
        UnknownSystemError: no system has this name.
    """
    system = get(name)
    return _without_data(system.architecture, system.settings)


def load(
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    strict: bool = True,
    tlc: TrainSize | None = None,
    **overrides: Any,
) -> nn.Module:
    """Build the system that a checkpoint belongs to, with its weights, in float32.

    Args:
        path: a `.pth`, `.pt`, `.ckpt` or `.safetensors` file as releases publish it.
        name: the system that it has to be; by default the file tells (see `identify`).
        strict: refuse a checkpoint whose names or shapes differ; otherwise load what fits, if anything.
        tlc: as in `create`.
        overrides: settings that leave no trace in the weights, such as ConvIR's `dilations`.

    Raises:
        CheckpointError: no checkpoint, damaged, holds code; of no known system, or not of `name`; not
            for RGB images; or `strict` and something differs, with the nearest system and the first
            differences in the message.
        UserError: as `create`.
    """
    checkpoint = read_checkpoint(path)
    architecture, settings = _described(checkpoint, name)
    network = _build(architecture, {**settings, **overrides}, tlc)
    _check_channels(network, checkpoint)
    if strict or not _shapes(network.state_dict()) & _shapes(checkpoint.state):
        _check_fit(network, checkpoint, name or architecture)
    load_into(network, checkpoint, strict=strict)
    return network


def identify(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """Tell whose weights these are.

    Args:
        state: a bare state dict.

    Returns:
        The system's name, or its architecture's if no named system has these sizes; and all settings
        that rebuild it.  What leaves no trace in the weights is as the authors have it.

    Raises:
        CheckpointError: the weights of no known system, in which case the nearest and the first differing
            keys are named; or entries that tell the settings are missing.
    """
    architecture = _recognised(state)
    settings = settings_of(architecture, state)
    return _name_of(architecture, settings) or architecture, settings


def settings_of(architecture: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """All settings that rebuild the network of `state`, the weights of an architecture; as `identify`."""
    try:
        found = network_class(architecture).settings_from_state(state)
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(
            f'these are weights of {architecture}, but {error} is missing or wrong; fetch the file again'
        ) from None
    # What leaves no trace is taken from the system of these sizes, else from the architecture's first.
    name = _name_of(architecture, found)
    like = get(name) if name else _systems(architecture)[0]
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
    source: str | os.PathLike[str], target: str | os.PathLike[str], name: str | None = None
) -> tuple[str, dict[str, Any]]:
    """Write a checkpoint as safetensors that say which system they belong to, and read them back.

    The file's metadata hold `format` (`'pt'`), `system` (a name, or an architecture) and `settings`
    (JSON).  Whatever wrapped the weights is left away; their values and types stay.

    Args:
        source: as for `load`.
        target: the file to write; it is there whole or not at all.
        name: the system that it has to be; by default the file tells.

    Returns:
        `system` and `settings`.

    Raises:
        CheckpointError: as for `load` with `strict`; or what was written did not read back the same.
        UserError: `target` cannot be written, or does not end with .safetensors.
    """
    if not os.fspath(target).endswith('.safetensors'):
        raise UserError(f'{os.fspath(target)}: call it *.safetensors, for readers go by the name')
    checkpoint = read_checkpoint(source)
    architecture, settings = _described(checkpoint, name)
    network = _without_data(architecture, settings)
    _check_channels(network, checkpoint)
    _check_fit(network, checkpoint, name or architecture)
    system = name or _name_of(architecture, settings) or architecture
    metadata = {'format': 'pt', 'system': system, 'settings': json.dumps(settings, sort_keys=True)}
    # Safetensors refuse tensors that share memory or have gaps.
    state = {key: tensor.detach().clone().contiguous() for key, tensor in checkpoint.state.items()}

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


def _build(architecture: str, settings: Mapping[str, Any], tlc: TrainSize | None) -> nn.Module:
    known = _defaults(architecture)
    for key in settings:
        if key not in known:
            raise UserError(f'{architecture} has no setting {key!r}{did_you_mean(key, known)}')
    if tlc is not None and not any(system.tlc for system in _systems(architecture)):
        pooled = ', '.join(system.name for system in SYSTEMS if system.tlc)
        raise UserError(f'{architecture} has no local pooling; leave it off, or choose one of {pooled}')
    try:
        network = padded(network_class(architecture))(**settings)
    except (TypeError, ValueError) as error:
        raise UserError(f'{architecture} cannot be built with these settings: {error}') from error
    return network if tlc is None else use_local_pooling(network, tlc)


def _defaults(architecture: str) -> dict[str, Any]:
    """The settings that an architecture takes; some classes pass what they do not know to the one above."""
    found: dict[str, Any] = {}
    for kind in network_class(architecture).__mro__:
        if '__init__' in vars(kind):
            parameters = inspect.signature(kind.__init__).parameters.values()
            named = {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}
            found = {**named, **found}
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    return {name: default for name, default in found.items() if name != 'self'}


def _systems(architecture: str) -> list[System]:
    return [system for system in SYSTEMS if system.architecture == architecture]


def _name_of(architecture: str, settings: Mapping[str, Any]) -> str | None:
    """The system with exactly these settings; those that are not given count as equal."""
    for system in _systems(architecture):
        own = {**_defaults(architecture), **system.settings}
        if all(_plain(own.get(key)) == _plain(value) for key, value in settings.items()):
            return system.name
    return None


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _described(checkpoint: Checkpoint, name: str | None) -> tuple[str, dict[str, Any]]:
    """Architecture and settings by the file's metadata, else by `name`, else by the weights."""
    told = checkpoint.metadata
    if {'system', 'settings'} <= told.keys() and name in (None, told['system']):
        return _from_metadata(checkpoint)
    if name is not None:
        system = get(name)
        return system.architecture, dict(system.settings)
    try:
        found, settings = identify(checkpoint.state)
    except CheckpointError as error:
        raise CheckpointError(f'{checkpoint.path}: {error}') from None
    return _architecture(found), _rgb(settings)


def _from_metadata(checkpoint: Checkpoint) -> tuple[str, dict[str, Any]]:
    system = checkpoint.metadata['system']
    try:
        settings = json.loads(checkpoint.metadata['settings'])
    except json.JSONDecodeError:
        settings = None
    if not isinstance(settings, dict):
        raise CheckpointError(f'{checkpoint.path}: its metadata hold settings that are no JSON object')
    try:
        return _architecture(system), _rgb(settings)
    except UnknownSystemError as error:
        raise CheckpointError(f'{checkpoint.path}: by its metadata, {error}') from None


def _architecture(found: str) -> str:
    """The architecture of a name that may be a system's or an architecture's."""
    if _systems(found):
        return found
    return get(found).architecture


def _rgb(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in CHANNEL_SETTINGS}


def _recognised(state: Mapping[str, Tensor]) -> str:
    for architecture in dict.fromkeys(system.architecture for system in SYSTEMS):
        if network_class(architecture).recognises(state):
            return architecture
    name, share = nearest(state)
    raise CheckpointError(
        f'these are the weights of no system known here; the nearest is {name} with {share:.0%} of the '
        f'entries in common: {"; ".join(mismatches(create_without_data(name), state))}'
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


def _check_fit(network: nn.Module, checkpoint: Checkpoint, wanted: str) -> None:
    faults = mismatches(network, checkpoint.state)
    if faults:
        name, share = nearest(checkpoint.state)
        raise CheckpointError(
            f'{checkpoint.path} does not fit {wanted}: {"; ".join(faults)}; the nearest system is {name} '
            f'with {share:.0%} of the entries in common'
        )


def _shapes(state: Mapping[str, Tensor]) -> frozenset[tuple[str, torch.Size]]:
    return frozenset((key, tensor.shape) for key, tensor in state.items())


@cache
def _shapes_of(name: str) -> frozenset[tuple[str, torch.Size]]:
    return _shapes(create_without_data(name).state_dict())


def _without_data(architecture: str, settings: Mapping[str, Any]) -> nn.Module:
    """The network without data: it has names and shapes, and costs neither time nor memory."""
    try:
        with torch.device('meta'):
            return _build(architecture, settings, None)
    except RuntimeError:  # IPT computes with its tensors while it is built
        return _build(architecture, settings, None).to('meta')


def _equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and torch.equal(_bytes(a[key]), _bytes(b[key])) for key in a
    )


def _bytes(tensor: Tensor) -> Tensor:
    """The tensor's memory: NaNs are equal to themselves there."""
    return tensor.contiguous().view(-1).view(torch.uint8)
