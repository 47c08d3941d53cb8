"""The one place that says which network a person gets: the default, a name, or a file of weights."""

from __future__ import annotations

import inspect
from pathlib import Path

from torch import nn

from dsgformer_arch import zoo
from dsgformer_arch.utils.errors import UserError

DEFAULT_MODEL = 'dsgformer_t'
"""The system whose weights come with the package."""

TRAINED_ON = 256
"""Side in pixels of the crops that local pooling (`--tlc`) assumes a network was trained on."""


def network(
    model: str | None = None, weights: str | Path | None = None, tlc: int | None = None
) -> tuple[nn.Module, str]:
    """A network with its weights, in float32 on the CPU, and what to call it.

    Args:
        model: a name of `zoo.names()`; with `weights`, the system that the file has to be.
        weights: a checkpoint, which tells its system itself; by default the weights that come with the
            package, or that were downloaded.
        tlc: side of the crops that the network was trained on, for local pooling; None for none.

    Raises:
        UserError: no such system, no weights for it here, or a file that is no checkpoint.
    """
    if weights is not None:
        if not Path(weights).is_file():
            raise UserError(f'{weights}: there is no such file of weights')
        return zoo.load(weights, model, tlc=tlc), model or Path(weights).name
    name = model or DEFAULT_MODEL
    zoo.get(name)
    if not ships(name):
        raise UserError(
            f'there are no weights of {name} here; give a file of weights with --weights FILE '
            '(in Python: weights=FILE)'
        )
    return zoo.create(name, pretrained=True, tlc=tlc), name


def ships(name: str) -> bool:
    """Whether weights of a system come with the package."""
    if 'pretrained' not in inspect.signature(zoo.create).parameters:
        return False
    return bool(getattr(zoo.get(name), 'weights', None))
