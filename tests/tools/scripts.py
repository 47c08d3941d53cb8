"""The scripts of `tools/`, imported from their files and run as commands."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from dsgformer_arch.utils.errors import guarded

TOOLS = Path(__file__).resolve().parents[2] / 'tools'


def load(name: str) -> ModuleType:
    """The script `tools/<name>.py` as a module."""
    spec = importlib.util.spec_from_file_location(name, TOOLS / f'{name}.py')
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, *arguments: object) -> int:
    """The status that the command exits with."""
    module = load(name)
    try:
        return guarded(lambda: module.main([str(argument) for argument in arguments]))
    except SystemExit as stop:
        return int(stop.code or 0)
