"""The weights that the package brings, and the check that they are what was published."""

from __future__ import annotations

import hashlib
from pathlib import Path

from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.zoo.checkpoint import Checkpoint, CheckpointError, read_checkpoint
from dsgformer_arch.zoo.systems import SYSTEMS, System

FOLDER = Path(__file__).resolve().parents[1] / 'weights'
"""Where the files are: `weights/README.md` is their model card."""


def shipped() -> list[str]:
    """The names of the systems whose weights are in the package."""
    return [system.name for system in SYSTEMS if system.weights]


def read_shipped(system: System) -> Checkpoint:
    """Read a system's weights, after comparing the file's SHA-256 with the table's.

    Raises:
        UserError: the package has no weights for this system.
        CheckpointError: the file is missing or is not the one that was published.
    """
    if not system.weights:
        raise UserError(
            f'the package has no weights for {system.name}, only for {", ".join(shipped())}; '
            'load a checkpoint file instead'
        )
    path = FOLDER / system.weights
    if not path.is_file():
        raise CheckpointError(f'{path} is missing; install the package again')
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != system.sha256:
        raise CheckpointError(
            f'{path} is not the published file: its SHA-256 is {digest}; install the package again'
        )
    return read_checkpoint(path)
