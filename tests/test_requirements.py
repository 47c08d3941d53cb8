"""setup.py declares what the package imports, and nothing else."""

from __future__ import annotations

import ast
import re
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]

NEEDED_BY_OTHERS = {'torchvision', 'addict'}
"""Requirements of BasicSR that its own metadata lack or that need a version with this PyTorch."""


def _requirements(name: str) -> str:
    """The requirements of an argument of `setup`, as text."""
    tree = ast.parse((ROOT / 'setup.py').read_text(encoding='utf-8'))
    return next(
        ast.unparse(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == name
    )


def _names(text: str) -> set[str]:
    """Normalised names of distributions among the quoted words of a text."""
    found = re.findall(r"'([A-Za-z][\\w.-]*)", text)
    return {name.lower().replace('_', '-').removesuffix('-headless') for name in found}


def _imported() -> dict[str, Path]:
    """Third-party modules that the package imports, and a file that does."""
    found: dict[str, Path] = {}
    for path in (ROOT / 'dsgformer_arch').rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules = [node.module]
            for module in modules:
                top = module.partition('.')[0]
                if top not in sys.stdlib_module_names and top != 'dsgformer_arch':
                    found[top] = path
    return found


def _distributions() -> dict[str, set[str]]:
    return {module: _names(repr(names)) for module, names in metadata.packages_distributions().items()}


def test_every_import_is_declared() -> None:
    declared = _names(_requirements('install_requires') + (ROOT / 'setup.py').read_text(encoding='utf-8'))
    provided = _distributions()
    missing = {
        module: path.name
        for module, path in _imported().items()
        if module in provided and not provided[module] & declared
    }
    assert not missing


def test_every_requirement_is_imported() -> None:
    provided = _distributions()
    used = set().union(*(provided.get(module, set()) for module in _imported())) | NEEDED_BY_OTHERS
    assert _names(_requirements('install_requires')) <= used
