"""Safe reading of checkpoints, published ones and those of training: no code in them is run.

A `.pth` or `.pt` file is a pickle, which may hold code.  It is read with `weights_only`: tensors and plain
data are loaded, anything else is refused.  `.safetensors` files hold tensors and strings only.

Checks before a tensor is used:

- the CRC-32 of every record of a `.pth` file, which `torch.load` does not compare;
- that no record is larger than the file: PyTorch never compresses, so a small file that unpacks to
  gigabytes is malicious;
- that no tuple in a pickle refers to itself so often that hashing it takes hours (`pickles`);
- that tensors are dense, real, of floating-point numbers (or integers, for counters) and finite.

The safetensors format has no checksum.  Its header is checked against the size of the file, but a flipped
bit in the weights is found only if the result is not finite; compare a SHA-256 to find others.
"""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.text import one_line, printable
from dsgformer_arch.zoo.pickles import check_nesting, numbers_allowed

State = dict[str, Tensor]

WRAPPERS = ('params_ema', 'params', 'state_dict', 'model', 'model_state_dict', 'net', 'network')
"""Keys under which published files keep their state dict, in the order in which they are tried."""

NETWORK = 'network'
"""Key under which training writes the settings of its network: `{'type': class name, **settings}`."""

ALIASES = 8
"""How many times larger than the file the tensors may be together: several names may share a tensor."""


class CheckpointError(UserError):
    """A file that is not a checkpoint, is damaged, holds code, or belongs to another network."""


@dataclass
class Checkpoint:
    """A state dict and the metadata of its file.

    Attributes:
        state: tensors by the network's own names, on the CPU.
        metadata: the metadata of a safetensors file; empty for a pickle.
        path: the file.
        network: what a pickle says of its network, `{'type': class name, **settings}`; None if nothing.
    """

    state: State
    metadata: dict[str, str] = field(default_factory=dict)
    path: str = ''
    network: Mapping[str, Any] | None = None

    def described(self) -> tuple[str, dict[str, Any]] | None:
        """The system or class that the file names, and its settings; None if the file says nothing.

        Raises:
            CheckpointError: the file's settings cannot be read.
        """
        if self.network is not None:
            settings = {str(key): value for key, value in self.network.items() if key != 'type'}
            return str(self.network['type']), settings
        if not {'system', 'settings'} <= self.metadata.keys():
            return None
        try:
            stated = json.loads(self.metadata['settings'])
        except (ValueError, RecursionError):
            stated = None
        if not isinstance(stated, dict):
            raise CheckpointError(f'{self.path}: its metadata hold settings that are no JSON object')
        return self.metadata['system'], stated


def read_checkpoint(path: str | os.PathLike[str], param_key: str | None = None) -> Checkpoint:
    """Read a checkpoint of any of the usual forms.

    Args:
        path: a `.pth`, `.pt`, `.ckpt` or `.safetensors` file; its first bytes decide, not its name.
        param_key: the key that wraps the state dict, such as `'params_ema'`.  By default the first of
            `WRAPPERS` that is there, or the file's own dict.  A safetensors file, which holds one set of
            weights, has no such keys: there it is not looked up.

    Raises:
        CheckpointError: no file, truncated, damaged, code instead of data, tensors that are no weights, or
            no such `param_key`.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        raise CheckpointError(f'{path} is a folder; give the checkpoint file in it')
    if not os.path.isfile(path):
        raise CheckpointError(f'there is no checkpoint {path}')
    if _is_safetensors(path):
        checkpoint = _read_safetensors(path)
    else:
        content = _read_pickle(path)
        state = clean_names(unwrap(content, path, param_key))
        checkpoint = Checkpoint(state, path=path, network=_network_of(content))
    _check_tensors(checkpoint.state, path)
    return checkpoint


def unwrap(content: Any, path: str, param_key: str | None = None) -> State:
    """The state dict within what a file holds, with only its tensors.

    Raises:
        CheckpointError: there is none, or none under `param_key`.
    """
    if not isinstance(content, Mapping):
        raise CheckpointError(f'{path} holds a {type(content).__name__}, not the weights of a network')
    if param_key is not None:
        if not isinstance(content.get(param_key), Mapping):
            found = [str(key) for key, value in content.items() if isinstance(value, Mapping)]
            there = (
                f'it has {", ".join(sorted(found)[:8])}' if found else 'it is a state dict without such keys'
            )
            raise CheckpointError(f'{path} has no entry {param_key!r}; {there}')
        content = content[param_key]
    else:
        wrapped = (content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping))
        content = next((value for value in wrapped if _tensors(value)), content)
    state = _tensors(content)
    if not state:
        raise CheckpointError(f'{path} holds no tensors; give a file with the weights of a network')
    return state


def _network_of(content: Mapping[Any, Any]) -> Mapping[str, Any] | None:
    found = content.get(NETWORK)
    return found if isinstance(found, Mapping) and isinstance(found.get('type'), str) else None


def clean_names(state: Mapping[str, Tensor]) -> State:
    """Names without the `module.` of DataParallel and the `_orig_mod.` of torch.compile."""
    cleaned = {}
    for name, tensor in state.items():
        while name.startswith(('module.', '_orig_mod.')):
            name = name.split('.', 1)[1]
        cleaned[name] = tensor
    return cleaned


def mismatches(network: nn.Module, state: Mapping[str, Tensor], most: int = 3) -> list[str]:
    """The first `most` ways in which `state` does not fit `network`, as phrases; empty if it fits."""
    want, have = network.state_dict(), state
    faults: list[str] = []
    faults += [f'{name} is missing' for name in want if name not in have]
    faults += [f'{name} is not expected' for name in have if name not in want]
    both = [(name, want[name], have[name]) for name in want if name in have]
    faults += [f'{name} is {_size(b)}, not {_size(a)}' for name, a, b in both if a.shape != b.shape]
    faults += [
        f'{name} is of type {_type(b)}, not {_type(a)}'
        for name, a, b in both
        if a.shape == b.shape and a.is_floating_point() != b.is_floating_point()
    ]
    return faults[:most] + ([f'and {len(faults) - most} more'] if len(faults) > most else [])


def _size(tensor: Tensor) -> str:
    return '×'.join(map(str, tensor.shape)) or 'a single number'


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix('torch.')


def _is_safetensors(path: str) -> bool:
    with open(path, 'rb') as file:
        head = file.read(9)
    return path.endswith('.safetensors') or (
        len(head) == 9 and head[8:] == b'{' and not head.startswith(b'PK')
    )


def _read_safetensors(path: str) -> Checkpoint:
    try:
        with safe_open(path, framework='pt') as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except OSError as error:
        raise CheckpointError(f'cannot read {path}: {error.strerror or error}') from None
    except (SafetensorError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f'{path} is damaged or no safetensors file ({one_line(error)})') from None
    if not state:
        raise CheckpointError(f'{path} holds no tensors; give a file with the weights of a network')
    return Checkpoint(clean_names(state), metadata, path)


def _read_pickle(path: str) -> Any:
    try:
        with open(path, 'rb') as file:
            archive = file.read(4) == b'PK\x03\x04'
        if archive:
            _check_archive(path)
        check_nesting(path)
        with numbers_allowed():
            return torch.load(path, map_location='cpu', weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        if 'Unsupported' in str(error) or 'GLOBAL' in str(error) or 'weights_only' in str(error).lower():
            raise CheckpointError(
                f'{path} holds Python objects, not only weights, and reading it would run code; '
                'ask for a file of weights (a state dict)'
            ) from None
        raise CheckpointError(f'{path} is not a checkpoint that PyTorch wrote, or it is damaged') from None
    except OSError as error:
        raise CheckpointError(f'cannot read {path}: {error.strerror or error}') from None
    except Exception:  # whatever the readers of zip and pickle raise for arbitrary bytes
        raise CheckpointError(f'{path} is truncated, damaged or no checkpoint; download it again') from None


def _check_archive(path: str) -> None:
    """Compare the checksums and sizes in a zip archive with what it holds."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if any(record.filename.endswith('/constants.pkl') for record in records):
            raise CheckpointError(
                f'{path} is a TorchScript program; ask for a file of weights (a state dict)'
            )
        size = os.path.getsize(path)
        if any(record.compress_type != zipfile.ZIP_STORED for record in records) or size < sum(
            record.file_size for record in records
        ):
            raise CheckpointError(
                f'{path} is a compressed archive, which PyTorch never writes; unpack it and save the weights '
                'with torch.save'
            )
        damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f'{path} is damaged: the CRC-32 of {damaged} differs; download it again')


def _check_tensors(state: Mapping[str, Tensor], path: str) -> None:
    """Refuse tensors that no network has as weights, or that are larger than the file."""
    total = 0
    for key, tensor in state.items():
        kind, name = _unusual(tensor), printable(key)
        if kind:
            raise CheckpointError(f'{path}: {name} is {kind}; give dense weights of floating-point numbers')
        total += tensor.numel() * tensor.element_size()
        backed = tensor.untyped_storage().nbytes()
        if tensor.numel() * tensor.element_size() > backed or total > ALIASES * os.path.getsize(path):
            raise CheckpointError(f'{path}: {name} is larger than what the file holds; download it again')
    for key, tensor in state.items():
        if not _finite(tensor):
            raise CheckpointError(
                f'{path}: {printable(key)} holds infinite values or NaN, for training diverged; '
                'take an earlier file'
            )


def _unusual(tensor: Tensor) -> str:
    """What a tensor is that no weights are, such as `'a sparse tensor'`; empty otherwise."""
    if tensor.is_nested or tensor.layout is not torch.strided:
        return 'a sparse tensor'
    if tensor.is_quantized:
        return 'a quantised tensor'
    if tensor.device.type != 'cpu':
        return f'a tensor without data on the device {tensor.device}'
    if tensor.is_complex():
        return 'a complex tensor'
    return ''


def _finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    values = tensor.detach()
    return bool((values if values.element_size() > 1 else values.float()).isfinite().all())


def _tensors(content: Mapping[Any, Any]) -> State:
    return {
        name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)
    }


def load_into(network: nn.Module, checkpoint: Checkpoint, strict: bool = True) -> Iterable[str]:
    """Load a checkpoint's weights into a network.

    Args:
        network: of the same names and shapes, where `strict`.
        checkpoint: what `read_checkpoint` returned.
        strict: refuse a checkpoint whose names or shapes differ; otherwise load what fits.

    Returns:
        What did not fit, as phrases; empty where everything did.

    Raises:
        CheckpointError: `strict`, and something differs.
    """
    faults = mismatches(network, checkpoint.state)
    if faults and strict:
        kind = type(network).__name__
        raise CheckpointError(f'{checkpoint.path} does not fit {kind}: {"; ".join(faults)}')
    own = network.state_dict()
    fitting = {
        name: tensor
        for name, tensor in checkpoint.state.items()
        if name in own
        and own[name].shape == tensor.shape
        and own[name].is_floating_point() == tensor.is_floating_point()
    }
    network.load_state_dict(fitting, strict=False)
    return faults
