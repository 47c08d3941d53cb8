"""The package's imports: no cycle, and none from a lower layer to a higher one.

Imports within functions count; those for type checking alone do not.
"""

from __future__ import annotations

import ast
import graphlib
from functools import lru_cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / 'dsgformer_arch'

LAYERS = (
    'utils',
    'losses',
    'metrics',
    'ops',
    'archs',
    'restore',
    'cuda_graphs',
    'zoo',
    'data',
    'compat',
    'models',
    'export',
    'inference',
    'serving',
    'benchmark',
    'cli',
)
"""From the lowest: each imports only itself and those before it."""


@lru_cache(maxsize=1)
def _imports() -> dict[str, set[str]]:
    """The modules of the package that each of them imports, by their dotted names."""
    modules = {_name(path): path for path in PACKAGE.rglob('*.py')}
    return {name: _imported(path, set(modules)) - {name} for name, path in modules.items()}


def _name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def _imported(path: Path, modules: set[str]) -> set[str]:
    found: set[str] = set()
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding='utf-8'))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) in ('TYPE_CHECKING', 'typing.TYPE_CHECKING'):
            todo += node.orelse
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path} has a relative import, which this test does not follow'
            assert node.module
            found |= {f'{node.module}.{alias.name}' for alias in node.names} & modules
            # `from package import name` runs the package, which matters unless the name is a module of it.
            if any(f'{node.module}.{alias.name}' not in modules for alias in node.names):
                found |= {node.module} & modules
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & modules
        else:
            todo += ast.iter_child_nodes(node)
    return found


def test_the_imports_are_found() -> None:
    """This test reads them from the source; a parser that found nothing would let everything pass."""
    imports = _imports()
    assert 'dsgformer_arch.utils.errors' in imports['dsgformer_arch.models.options']
    assert 'dsgformer_arch.data.png_crop' in set().union(*imports.values())


def test_there_is_no_cycle() -> None:
    # The package's own __init__ names what it registers as strings; its parts ask it for `register`.
    graph = {name: found - {'dsgformer_arch'} for name, found in _imports().items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(' imports '.join(reversed(error.args[1])))


def test_every_import_points_downwards() -> None:
    def layer(module: str) -> str:
        return module.split('.')[1]

    imports = _imports()
    unknown = {layer(name) for name in imports if '.' in name} - set(LAYERS)
    assert not unknown, f'{unknown} have no place in LAYERS'
    wrong = [
        f'{name} imports {other}'
        for name, found in imports.items()
        for other in found
        if '.' in name and '.' in other and LAYERS.index(layer(other)) > LAYERS.index(layer(name))
    ]
    assert not wrong, wrong


def test_the_package_itself_imports_none_of_its_parts() -> None:
    """It names them when they are first used, so that `dsgformer --help` takes no seconds."""
    assert not _imports()['dsgformer_arch']
