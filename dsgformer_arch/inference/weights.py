"""Select the network of a command or a `Deblurrer`: the default, a name, or a checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from dsgformer_arch import zoo
from dsgformer_arch.utils.errors import UserError

if TYPE_CHECKING:
    from dsgformer_arch.inference import official_weights

DEFAULT_MODEL = 'dsgformer_h'
"""The system whose weights come with the package."""

TRAINED_ON = 256
"""Side in pixels of the crops that local pooling (`--tlc`) assumes a network was trained on."""


def network(
    model: str | None = None, weights: str | Path | None = None, tlc: int | None = None
) -> tuple[nn.Module, str]:
    """A network with its weights, in float32 on the CPU, and what to call it.

    Args:
        model: a name of `zoo.names()`, or official weights such as `restormer/deraining`; with `weights`,
            the system that the file must hold.
        weights: a checkpoint, from which the system is detected; by default the weights in the package,
            or those that were downloaded.
        tlc: side of the crops that the network was trained on, for local pooling; None for none.

    Raises:
        UserError: no such system, no weights for it here, or a file that is not a checkpoint.
    """
    if weights is not None:
        if not Path(weights).is_file():
            raise UserError(f'{weights}: there is no such file of weights')
        return zoo.load(weights, model, tlc=tlc), model or Path(weights).name
    name = model or DEFAULT_MODEL
    if '/' not in name:
        zoo.get(name)
        if name in zoo.shipped():
            return zoo.create(name, pretrained=True, tlc=tlc), name
    from dsgformer_arch.inference import official_weights  # imports requests, which is slow

    if '/' not in name and all(weights.system != name for weights in official_weights.TABLE):
        raise UserError(
            f'there are no weights of {name}; give a file of weights with --weights FILE '
            '(in Python: weights=FILE)'
        )
    official = official_weights.find(name)
    if not official_weights.cached(official):
        offer(official)
    return zoo.load(official_weights.get(official), tlc=tlc), official.key


def offer(official: official_weights.OfficialWeights) -> None:
    """Ask at the terminal whether missing official weights may be downloaded, and download them.

    Raises:
        UserError: there is no terminal, or the answer is no; the message names the command.
    """
    from dsgformer_arch.inference import official_weights

    if official.url and sys.stdin.isatty() and sys.stderr.isatty():
        question = (
            f'{official.key} ({official.licence}) is not here; download it from {official.page}? [y/N] '
        )
        print(question, end='', file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() in ('y', 'yes'):
            official_weights.get_with_progress(official)
            return
    how = f'run: dsgformer weights get {official.key}' if official.url else official_weights.by_hand(official)
    raise UserError(f'the weights {official.key} are not on this machine; {how}')
