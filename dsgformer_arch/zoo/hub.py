"""Networks as folders and repositories of Hugging Face: `from_pretrained`, `save_pretrained`, `push_to_hub`.

A folder holds `config.json` (the class, the system and all settings), `model.safetensors` (the weights, and
the same description again in its metadata) and a model card, `README.md`.

The methods of `RestorationNetwork` call these functions.  They take the arguments of huggingface_hub's
`PyTorchModelHubMixin`, and the files are compatible in both directions: a class that derives from the mixin
reads a folder of ours, and its folders are read here.  The mixin itself is not a base class of the networks:
it would make huggingface_hub a requirement of every network, it loads pickles, and it does not check what a
file states.  Here weights go through `checkpoint.read_checkpoint`, and the settings are compared with them.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dsgformer_arch.archs.layers.network import RestorationNetwork
from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.files import write_atomically, write_text
from dsgformer_arch.zoo import model_card, registry
from dsgformer_arch.zoo.checkpoint import CheckpointError, read_checkpoint

CONFIG, WEIGHTS, CARD = 'config.json', 'model.safetensors', 'README.md'
"""The files of a folder or a repository."""

DESCRIPTION = ('architectures', 'system', 'dsgformer_version')
"""Keys of `config.json` that are not settings."""

LARGEST_CONFIG = 1_000_000
"""Bytes; a larger `config.json` describes no network."""

REPO_ID = re.compile(r'[\w.-]+/[\w.-]+')
"""`owner/name`."""

Network = TypeVar('Network', bound=RestorationNetwork)


def from_pretrained(
    pretrained_model_name_or_path: str | os.PathLike[str],
    kind: type[Network] | None = None,
    *,
    revision: str | None = None,
    force_download: bool = False,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    map_location: str | torch.device = 'cpu',
    strict: bool = True,
    **overrides: Any,
) -> Network:
    """Build the network in a folder or a repository of Hugging Face, with its weights.

    Only `config.json` and `model.safetensors` are read; pickles are never loaded.

    Args:
        pretrained_model_name_or_path: a folder that `save_pretrained` wrote, or `owner/name` of a repository.
        kind: the class that it has to be; `DSGformer.from_pretrained(...)` passes DSGformer.  It is needed
            where `config.json` names no class, as `PyTorchModelHubMixin` writes it.
        revision: branch, tag or commit of the repository; None for its default branch.
        force_download: download again what the cache has.
        token: access token of the hub; None for the one that `hf auth login` stored.
        cache_dir: folder of downloaded files; None for huggingface_hub's own.
        local_files_only: take downloaded files only; no request is made.
        map_location: device of the result.
        strict: refuse weights whose names or shapes differ; otherwise load what fits.
        overrides: settings that leave no trace in the weights.

    Returns:
        The network in float32 and in evaluation mode.

    Raises:
        CheckpointError: a file is missing, damaged, or no description of a network; `config.json`, the
            metadata of the weights, the weights themselves and `kind` contradict one another.
        UserError: no such folder or repository, it cannot be downloaded, or huggingface_hub is missing.
    """
    source = os.fspath(pretrained_model_name_or_path)
    if os.path.isdir(source):
        find = _in_folder(source)
    else:
        find = _in_repository(source, revision, force_download, token, cache_dir, local_files_only)
    config_path = find(CONFIG)
    architecture, settings = _read_config(config_path, kind)
    checkpoint = read_checkpoint(find(WEIGHTS))
    _check_agreement(architecture, settings, checkpoint.described(), config_path, checkpoint.path)
    checkpoint.network = {'type': architecture, **settings}
    network = registry.network_of(checkpoint, strict=strict, **overrides)
    return cast(Network, network.to(torch.device(map_location)).eval())


def save_pretrained(
    network: RestorationNetwork,
    save_directory: str | os.PathLike[str],
    *,
    repo_id: str | None = None,
    push_to_hub: bool = False,
    licence: str | None = None,
    **push_options: Any,
) -> Path:
    """Write a network as a folder that `from_pretrained` reads.

    A model card that is there already is kept, since people edit it.  Local pooling is not a setting of a
    network and is not saved.

    Args:
        network: its weights are written in their own types.
        save_directory: made where it does not exist.
        repo_id: `owner/name`, for the usage in the model card, and for `push_to_hub`.
        push_to_hub: upload the folder too.
        licence: the hub's identifier of the licence of these weights, such as `'apache-2.0'`; None for that
            of the network's official implementation.
        push_options: of `push_to_hub`.

    Returns:
        The folder.

    Raises:
        UserError: the folder cannot be written, or no network of the zoo; or as `push_to_hub`.
    """
    folder = Path(save_directory)
    architecture = _architecture(network)
    settings = json.loads(json.dumps(network.settings))
    system = registry.name_of(architecture, network.settings) or architecture
    state = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in network.state_dict().items()}
    metadata = {'format': 'pt', 'system': system, 'settings': json.dumps(settings, sort_keys=True)}
    described = {'architectures': [architecture], 'system': system, 'dsgformer_version': _version()}
    config = json.dumps({**described, **settings}, indent=2) + '\n'
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(lambda path: save_file(state, path, metadata), folder / WEIGHTS)
        write_text(config, folder / CONFIG)
        if not (folder / CARD).exists():
            about = {one.name: one for one in registry.systems_of(architecture)}.get(system)
            about = about or registry.systems_of(architecture)[0]
            count = sum(parameter.numel() for parameter in network.parameters())
            card = model_card.text(about, system, settings, count, repo_id or folder.name, licence)
            write_text(card, folder / CARD)
    except (OSError, SafetensorError) as error:
        raise UserError(f'cannot write a network to {folder}: {error}; choose another folder') from None
    if push_to_hub:
        _upload(folder, repo_id or folder.name, **push_options)
    return folder


def push_to_hub(
    network: RestorationNetwork,
    repo_id: str,
    *,
    licence: str | None = None,
    **options: Any,
) -> str:
    """Upload a network to a repository of Hugging Face, which is created where it does not exist.

    Args:
        network: any network of the zoo.
        repo_id: `owner/name`.
        licence: as in `save_pretrained`.
        options: `commit_message`; `private`, whether a new repository is private (None for the owner's
            default); `token`, as in `from_pretrained`; `branch` to commit to (None for the default one);
            `create_pr`, whether to open a pull request instead.

    Returns:
        Address of the commit.

    Raises:
        UserError: the hub refuses it or is not reached, or huggingface_hub is missing.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(network, folder, repo_id=repo_id, licence=licence)
        return _upload(Path(folder), repo_id, **options)


def _upload(
    folder: Path,
    repo_id: str,
    *,
    commit_message: str = 'Upload a network with dsgformer',
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    create_pr: bool | None = None,
) -> str:
    """Upload a folder; the keywords are those of `push_to_hub`."""
    library = _huggingface_hub()
    api = library.HfApi(token=token)
    try:
        name = api.create_repo(repo_id=repo_id, private=private, exist_ok=True).repo_id
        done = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=[CONFIG, WEIGHTS, CARD],
            commit_message=commit_message,
            revision=branch,
            create_pr=create_pr,
        )
    except (OSError, ValueError, library.errors.HfHubHTTPError) as error:
        raise UserError(f'{repo_id} was not uploaded: {_reason(error)}') from None
    return str(done)


def _in_folder(folder: str) -> Callable[[str], str]:
    def find(name: str) -> str:
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            raise CheckpointError(f'{folder} has no {name}; give a folder that save_pretrained wrote')
        return path

    return find


def _in_repository(
    repo_id: str,
    revision: str | None,
    force_download: bool,
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
) -> Callable[[str], str]:
    if not REPO_ID.fullmatch(repo_id):
        raise UserError(f'there is no folder {repo_id}; give a folder, or owner/name of a repository')
    library = _huggingface_hub()

    def find(name: str) -> str:
        try:
            return str(
                library.hf_hub_download(
                    repo_id,
                    name,
                    revision=revision,
                    force_download=force_download,
                    token=token,
                    cache_dir=cache_dir,
                    local_files_only=local_files_only,
                )
            )
        except library.errors.LocalEntryNotFoundError as error:
            raise UserError(
                f'{name} of {repo_id} is not on this machine and cannot be downloaded: {_reason(error)}'
            ) from None
        except library.errors.EntryNotFoundError:
            raise CheckpointError(
                f'the repository {repo_id} has no {name}; give one that save_pretrained wrote'
            ) from None
        except (OSError, ValueError, library.errors.HfHubHTTPError) as error:
            raise UserError(f'cannot download {name} of {repo_id}: {_reason(error)}') from None

    return find


def _read_config(path: str, kind: type[RestorationNetwork] | None) -> tuple[str, dict[str, Any]]:
    """Architecture and settings that a `config.json` states, completed by the system's and the defaults."""
    try:
        if os.path.getsize(path) > LARGEST_CONFIG:
            raise ValueError
        with open(path, encoding='utf-8') as file:
            config = json.load(file)
    except OSError as error:
        raise CheckpointError(f'cannot read {path}: {error.strerror}') from None
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise CheckpointError(f'{path} is not a JSON object with the settings of a network')
    settings = {key: value for key, value in config.items() if key not in DESCRIPTION}
    named = _named(config, path)
    architecture = named or (kind.__name__ if kind and kind is not RestorationNetwork else '')
    if not architecture:
        raise CheckpointError(
            f'{path} names no architecture; load it with its class, such as DSGformer.from_pretrained(...)'
        )
    found = registry.network_class(architecture)
    if kind is not None and not issubclass(found, kind):
        raise CheckpointError(f'{path} is of a {architecture}, not of a {kind.__name__}')
    system = config.get('system')
    if isinstance(system, str) and system in registry.names():
        if registry.get(system).architecture != architecture:
            raise CheckpointError(f'{path}: {system} is not a {architecture}; copy the whole folder again')
        settings = {**registry.get(system).settings, **settings}
    return architecture, settings


def _named(config: Mapping[str, Any], path: str) -> str:
    """The architecture that a configuration names; empty where it names none."""
    stated = config.get('architectures')
    first = stated[0] if isinstance(stated, list) and stated else config.get('system')
    if first is None:
        return ''
    name = first if isinstance(first, str) else ''
    if name in registry.names():
        return registry.get(name).architecture
    if name not in registry.architectures():
        known = ', '.join(registry.architectures())
        raise CheckpointError(f'{path}: there is no architecture {str(first)[:80]!r}; there are {known}')
    return name


def _check_agreement(
    architecture: str,
    settings: Mapping[str, Any],
    stated: tuple[str, dict[str, Any]] | None,
    config_path: str,
    weights_path: str,
) -> None:
    """Refuse weights whose metadata describe another network than `config.json`."""
    if stated is None:
        return
    system, other_settings = stated
    named = system in registry.names()
    if (registry.get(system).architecture if named else system) != architecture:
        raise CheckpointError(f'{config_path} is of a {architecture}, but {weights_path} of a {system}')
    defaults = registry.network_class(architecture).default_settings()
    here = {**defaults, **settings}
    there = {**defaults, **(registry.get(system).settings if named else {}), **other_settings}
    for key in sorted(here.keys() | there.keys()):
        mine, other = here.get(key), there.get(key)
        if json.dumps(mine, default=str) != json.dumps(other, default=str):
            raise CheckpointError(
                f'{config_path} states that {key} is {mine}, but {weights_path} that it is {other}; '
                'take both files from the same place'
            )


def _huggingface_hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise UserError(
            "repositories of Hugging Face need the package huggingface_hub; run: pip install 'dsgformer[hub]'"
        ) from None
    return huggingface_hub


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ' '.join(lines[:2]) or type(error).__name__


def _architecture(network: RestorationNetwork) -> str:
    """The zoo's name of a network's class, or of the class that it derives from."""
    known = registry.architectures()
    for kind in type(network).__mro__:
        if kind.__name__ in known:
            return kind.__name__
    raise UserError(f'{type(network).__name__} is not a network of the zoo; choose one of {", ".join(known)}')


def _version() -> str:
    from dsgformer_arch import __version__

    return __version__


RestorationNetwork.hub = cast(Any, sys.modules[__name__])
