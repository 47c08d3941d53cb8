"""Settings that follow from several shapes of a state dict together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from dsgformer_arch.utils.errors import UserError


def expansion_factor(widths: Sequence[int], hidden: Sequence[int]) -> float:
    """The shortest decimal number f with int(width · f) = hidden at every level.

    Raises:
        UserError: there is no such number.
    """
    low = max(h / w for w, h in zip(widths, hidden, strict=True))
    high = min((h + 1) / w for w, h in zip(widths, hidden, strict=True))
    for digits in range(17):
        factor = round((low + high) / 2, digits)
        if all(int(w * factor) == h for w, h in zip(widths, hidden, strict=True)):
            return factor
    raise UserError(f'no expansion factor makes {list(hidden)} hidden channels of {list(widths)}.')


def expansion_factor_from_state(state: Mapping[str, Tensor], levels: Sequence[str]) -> float:
    """`expansion_factor` of the feed-forward networks `{level}.0.ffn` of Restormer and FFTformer."""
    shapes = [state[f'{level}.0.ffn.project_out.weight'].shape[:2] for level in levels]
    return expansion_factor(*zip(*shapes, strict=True))
