"""Settings of the blur pipeline as data: dataclasses that option files and command lines fill in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any, TypeVar, get_type_hints

import numpy as np

from dsgformer_arch.utils.errors import UserError
from dsgformer_arch.utils.text import did_you_mean

T = TypeVar('T')
Range = tuple[float, float]


def from_options(kind: type[T], options: Mapping[str, Any] | None, where: str) -> T:
    """Fill a dataclass of settings, and those within it, from a section of an option file.

    Args:
        kind: the dataclass; its `__post_init__` checks the values by raising ValueError.
        options: the section; none means the defaults.
        where: the section's place, for messages.

    Raises:
        UserError: a key is unknown or a value out of range.
    """
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise UserError(f'{where}: should be a section of keys and values, not {options!r}')
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}  # type: ignore[arg-type]
    known = list(fields)
    types = get_type_hints(kind)
    for name, field in fields.items():
        if name not in options and field.default is MISSING and field.default_factory is MISSING:
            raise UserError(f'{where}: the key {name!r} is missing')
    values: dict[str, Any] = {}
    for key, value in options.items():
        if key not in known:
            hint = did_you_mean(str(key), known) or f'; choose from {", ".join(known)}'
            raise UserError(f'{where}: unknown key {key!r}{hint}')
        nested = types[key]
        if isinstance(nested, type) and dataclasses.is_dataclass(nested):
            values[key] = from_options(nested, value, f'{where}: {key}')
        else:
            values[key] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**values)
    except (ValueError, TypeError) as error:
        raise UserError(f'{where}: {error}') from None


def check_range(name: str, value: Range, least: float = 0.0, most: float = float('inf')) -> None:
    """Raise ValueError unless `value` is (low, high) with least <= low <= high <= most."""
    numbers = isinstance(value, tuple) and len(value) == 2
    if not numbers or not all(isinstance(v, (int, float)) and np.isfinite(v) for v in value):
        raise ValueError(f'{name} is {value!r}, but should be two numbers, the lowest and the highest')
    if not least <= value[0] <= value[1] <= most:
        bound = f' and at most {most:g}' if np.isfinite(most) else ''
        raise ValueError(f'{name} is {list(value)}, but should rise and be at least {least:g}{bound}')


def check_probability(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a probability; true and false count as 1 and 0."""
    if not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f'{name} is {value!r}, but should be a probability from 0 to 1')


@dataclass(frozen=True)
class Strength:
    """The distribution of blur lengths.

    A blur's length is the extent of the path that a point of the image draws during the exposure (the
    diagonal of its bounding box), averaged over the image.

    Attributes:
        none: fraction of images without blur.
        length: range of the blur of the others, in pixels.
        power: lengths are `shortest + (longest - shortest)·u^power` with u uniform in [0, 1): 1 makes all
            lengths as frequent, 2 makes short blurs more frequent.
    """

    none: float = 0.1
    length: Range = (1.0, 24.0)
    power: float = 1.5

    def __post_init__(self) -> None:
        check_probability('none', self.none)
        check_range('length', self.length)
        if not isinstance(self.power, (int, float)) or not self.power > 0:
            raise ValueError(f'power is {self.power!r}, but should be a number above 0')

    def draw(self, rng: np.random.Generator) -> float:
        """A blur's length in pixels; 0 for none.  Takes two random numbers in every case."""
        none, position = rng.random(2)
        shortest, longest = self.length
        return 0.0 if none < self.none else float(shortest + (longest - shortest) * position**self.power)
