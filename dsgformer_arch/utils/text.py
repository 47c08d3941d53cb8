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


def shortened(text: str, most: int = 120) -> str:
    """`text`, or its beginning and an ellipsis if it is longer than `most` characters."""
    return text if len(text) <= most else f'{text[: most - 1]}…'
