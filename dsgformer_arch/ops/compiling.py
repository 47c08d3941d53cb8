"""What the operators say to `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar('Function', bound=Callable[..., Any])


def constant_when_compiled(function: Function) -> Function:
    """`torch.compiler.assume_constant_result`, without the import of the compiler.

    That import takes as long as `import torch`; a process that only restores images compiles nothing.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
