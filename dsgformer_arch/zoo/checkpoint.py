"""Reading what authors publish and training writes, without running any of it.

A `.pth` or `.pt` file is a pickle, which may hold code; it is read with
`weights_only`, so that tensors and plain data come out and anything else is
refused.  `.safetensors` files hold nothing but tensors and strings.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dsgformer_arch.utils.errors import UserError

State = dict[str, Tensor]

WRAPPERS = ('params_ema', 'params', 'state_dict', 'model', 'model_state_dict', 'net', 'network')
"""Keys under which releases keep their state dict, in the order in which they are tried."""


class CheckpointError(UserError):
    """A file that is no checkpoint, is damaged, holds code, or belongs to another network."""


@dataclass
class Checkpoint:
    """A state dict and what the file says about it.

    Attributes:
        state: tensors by the network's own names, on the CPU.
        metadata: what a safetensors file says of itself; empty for a pickle.
        path: the file.
    """

    state: State
    metadata: dict[str, str] = field(default_factory=dict)
    path: str = ''


def read_checkpoint(path: str | os.PathLike[str], param_key: str | None = None) -> Checkpoint:
    """Read a checkpoint of any of the usual forms.

    Args:
        path: a `.pth`, `.pt`, `.ckpt` or `.safetensors` file; its first bytes decide, not its name.
        param_key: the key that wraps the state dict, such as `'params_ema'`.  By default the first of
            `WRAPPERS` that is there, or the file's own dict.

    Raises:
        CheckpointError: no file, truncated, code instead of data, no tensors, or no such `param_key`.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        raise CheckpointError(f'{path} is a folder; give the checkpoint file in it')
    if not os.path.isfile(path):
        raise CheckpointError(f'there is no checkpoint {path}')
    if _is_safetensors(path):
        return _read_safetensors(path)
    return Checkpoint(clean_names(unwrap(_read_pickle(path), path, param_key)), path=path)


def unwrap(content: Any, path: str, param_key: str | None = None) -> State:
    """The state dict within what a file holds, with only its tensors."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f'{path} holds a {type(content).__name__}, not the weights of a network')
    if param_key is not None and param_key not in content and not _tensors(content):
        found = ', '.join(sorted(map(str, content))[:8])
        raise CheckpointError(f'{path} has no entry {param_key!r}; it has {found or "none at all"}')
    for key in [param_key] if param_key is not None else WRAPPERS:
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    state = _tensors(content)
    if not state:
        raise CheckpointError(f'{path} holds no tensors; give a file with the weights of a network')
    return state


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
    want = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    have = {name: tuple(tensor.shape) for name, tensor in state.items()}
    faults: list[str] = []
    faults += [f'{name} is missing' for name in want if name not in have]
    faults += [f'{name} is not expected' for name in have if name not in want]
    faults += [
        f'{name} is {"×".join(map(str, have[name]))}, not {"×".join(map(str, shape))}'
        for name, shape in want.items()
        if name in have and have[name] != shape
    ]
    return faults[:most] + ([f'and {len(faults) - most} more'] if len(faults) > most else [])


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
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f'{path} is damaged or no safetensors file ({error})') from None
    if not state:
        raise CheckpointError(f'{path} holds no tensors; give a file with the weights of a network')
    return Checkpoint(clean_names(state), metadata, path)


def _read_pickle(path: str) -> Any:
    try:
        with _plain_numpy_allowed():
            return torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        if 'Unsupported' in str(error) or 'GLOBAL' in str(error) or 'weights_only' in str(error).lower():
            raise CheckpointError(
                f'{path} holds Python objects, not only weights, and reading it would run code; '
                'ask for a file of weights (a state dict)'
            ) from None
        raise CheckpointError(f'{path} is no checkpoint that PyTorch wrote, or it is damaged') from None
    except (RuntimeError, EOFError, ValueError, KeyError, UnicodeDecodeError, zipfile.BadZipFile):
        raise CheckpointError(f'{path} is truncated, damaged or no checkpoint; fetch it again') from None
    except OSError as error:
        raise CheckpointError(f'cannot read {path}: {error.strerror or error}') from None


@contextmanager
def _plain_numpy_allowed() -> Iterator[None]:
    # Releases keep a best PSNR or an epoch as NumPy scalars beside the weights; these are data.
    names = ['float16', 'float32', 'float64', 'int32', 'int64', 'bool']
    scalar = np.float64(0).__reduce__()[0]
    allowed: list[Any] = [np.dtype, *(type(np.dtype(name)) for name in names)]
    allowed += [(scalar, f'numpy.{core}.multiarray.scalar') for core in ('core', '_core')]
    with torch.serialization.safe_globals(allowed):
        yield


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
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    fitting = {name: t for name, t in checkpoint.state.items() if shapes.get(name) == t.shape}
    network.load_state_dict(fitting, strict=False)
    return faults
