"""Text for messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`'; did you mean X?'` for the nearest known names, or the empty string.  Case does not count."""
    lower: Mapping[str, str] = {entry.lower(): entry for entry in known}
    close = difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.6)
    close = close or sorted(entry for entry in lower if name and entry.startswith(name.lower()))[:3]
    return f'; did you mean {" or ".join(lower[entry] for entry in close)}?' if close else ''


def one_line(error: BaseException, most: int = 300) -> str:
    """The message of an exception on one line, at most `most` characters of it.

    That of the system for an `OSError` that has one; the name of the class where there is no message.
    """
    system = getattr(error, 'strerror', None)
    text = system.lower() if isinstance(system, str) else str(error)
    return ' '.join(text.split()).rstrip('.')[:most] or type(error).__name__


def shortened(text: str, most: int = 120) -> str:
    """`text`, or its beginning and an ellipsis if it is longer than `most` characters."""
    return text if len(text) <= most else f'{text[: most - 1]}…'


def printable(text: str) -> str:
    """`text` with escapes for what a terminal would obey or drop: control characters, surrogates."""
    return ''.join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
