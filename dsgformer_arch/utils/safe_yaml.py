"""YAML read as plain data, within limits of size, depth and expansion.

PyYAML's safe loader runs no code, but a few lines can still make it recurse without end (deep nesting,
an alias of its own parent), fill the memory (aliases of aliases, each named ten times) or raise errors
that are no `YAMLError` (`!!int x`).  `load` reads YAML 1.1 as PyYAML does, with three differences:
numbers such as `1e-3`, which YAML 1.1 takes for text, are numbers; dates stay text; a key that occurs
twice in a section is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, ClassVar

import yaml

from dsgformer_arch.utils.text import printable

MAX_CHARACTERS = 64 * 1024
"""Ten times the longest option file; PyYAML reads this much in about a second."""
MAX_DEPTH = 24
"""Sections within sections."""
MAX_VALUES = 5_000
"""Values after every alias has been replaced by its anchor's value."""

ALLOWED_TAGS = {f'tag:yaml.org,2002:{kind}' for kind in ('null', 'bool', 'int', 'float', 'str', 'seq', 'map')}
MERGE_TAG = 'tag:yaml.org,2002:merge'
FLOAT = re.compile(r'[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)[eE][-+]?[0-9]+')
"""Numbers with an exponent, as YAML 1.2 and most users write them."""


def load(text: str) -> Any:
    """Read one YAML document.

    Args:
        text: the document.

    Returns:
        None, bool, int, float, str, or lists and dicts of them; keys are str.  No two parts share an
        object, so that a change of one never shows in another.

    Raises:
        yaml.YAMLError: it is not YAML, holds other things than plain data, or exceeds a limit.  `describe`
            turns the error into a message.
    """
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f'it has more than {MAX_CHARACTERS} characters')
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, [MAX_VALUES], ())
        return _separate(loader.construct_document(node))
    finally:
        loader.dispose()


def describe(error: yaml.YAMLError) -> tuple[int | None, str]:
    """The line of an error that `load` raised, counted from 1, if it has one, and what is wrong."""
    mark = getattr(error, 'problem_mark', None)
    line = None if mark is None else mark.line + 1
    if isinstance(error, yaml.reader.ReaderError):
        return None, f'character {error.position} is none that YAML allows'
    return line, printable(str(getattr(error, 'problem', None) or error))


class _Loader(yaml.SafeLoader):
    """The safe loader, for plain data only."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _error(self.peek_event(), f'more than {MAX_DEPTH} levels of nesting')
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag == MERGE_TAG:
                continue
            if key.tag != 'tag:yaml.org,2002:str':
                kind = key.tag.split(':')[-1]
                shown = repr(key.value[:40]) if isinstance(key, yaml.ScalarNode) else 'it'
                raise _error(key, f'a key should be text, but {shown} is a {kind}; put it in quotes')
            if key.value in seen:
                raise _error(key, f'the key {key.value!r} occurs twice in one section')
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: Any) -> Any:
        try:
            value = self.numbers[node.tag](self, node)
        except (ValueError, OverflowError, IndexError, KeyError):
            raise _error(node, f'{node.value[:40]!r} is not a valid {node.tag.split(":")[-1]}') from None
        if isinstance(value, float) and not math.isfinite(value):
            raise _error(node, f'{node.value[:40]!r} is not a finite number')
        return value

    numbers: ClassVar[dict[str, Callable[[Any, Any], Any]]] = {
        'tag:yaml.org,2002:bool': yaml.SafeLoader.construct_yaml_bool,
        'tag:yaml.org,2002:int': yaml.SafeLoader.construct_yaml_int,
        'tag:yaml.org,2002:float': yaml.SafeLoader.construct_yaml_float,
    }


for _tag in _Loader.numbers:
    _Loader.add_constructor(_tag, _Loader.construct_number)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((':timestamp', ':value'))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    'tag:yaml.org,2002:float', re.compile(f'^{FLOAT.pattern}$'), list('-+.0123456789')
)


def _error(node: Any, problem: str) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _check(node: Any, left: list[int], above: tuple[int, ...]) -> None:
    """Check a document with its aliases expanded: refuse too many values and anything but plain data."""
    left[0] -= 1
    if left[0] < 0:
        raise _error(node, f'more than {MAX_VALUES} values, counting those of aliases')
    if id(node) in above:
        raise _error(node, 'an alias refers to a value that contains it')
    if len(above) >= MAX_DEPTH:
        raise _error(node, f'more than {MAX_DEPTH} levels of nesting')
    if node.tag not in ALLOWED_TAGS:
        raise _error(node, f'the tag {node.tag.replace("tag:yaml.org,2002:", "!!")[:80]} is not allowed here')
    if isinstance(node, yaml.ScalarNode):
        if node.tag.endswith((':seq', ':map')):
            raise _error(node, f'{node.value[:40]!r} is not a valid {node.tag.split(":")[-1]}')
        if not node.value.isprintable() and re.search('[\ud800-\udfff\0]', node.value):
            raise _error(node, 'a text has a character that no file name or message can hold')
        return
    wanted = 'map' if isinstance(node, yaml.MappingNode) else 'seq'
    if not node.tag.endswith(f':{wanted}'):
        raise _error(
            node, f'a {"section" if wanted == "map" else "list"} cannot have the tag of another kind'
        )
    inside = (*above, id(node))
    for child in node.value:
        if wanted == 'seq':
            _check(child, left, inside)
            continue
        key, value = child
        if key.tag != MERGE_TAG:
            _check(key, left, inside)
        _check(value, left, inside)


def _separate(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _separate(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_separate(entry) for entry in value]
    return value
