"""Functions of PyTorch whose parts are to be seen, while PyTorch would have them handled as a whole."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any


def in_parts(function: Any) -> Callable[..., Any]:
    """Return the same Python function, without its question whether it is handled as a whole."""
    names = {name: lambda *_: False for name in function.__code__.co_names if name.startswith("has_torch_function")}
    scope = {**vars(sys.modules[function.__module__]), **names}
    copy = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
