"""Turn an operator's own argument errors into Python's.

The rules are checked once, in C++, below every dispatch mode; what crosses the boundary is a RuntimeError with the
operator's message, and here it becomes the type that a Python caller expects.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def call(operator: Callable[..., Any], name: str, *arguments: object, **options: object) -> Any:
    """Run ``operator(*arguments, **options)``.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument breaks another rule of the operator.
    """
    if torch.compiler.is_compiling():
        return operator(*arguments, **options)
    try:
        return operator(*arguments, **options)
    except RuntimeError as error:
        message = str(error).partition("\n")[0]
        if message.startswith(f"{name}: "):
            wrong_type = "must have dtype" in message or "must be a tensor" in message
            raise (TypeError if wrong_type else ValueError)(message) from None
        too_large = [a for a in arguments if type(a) is int and not -(2**63) <= a < 2**63]
        if too_large:
            raise ValueError(f"{name}: an integer must fit in 64 bits, got {too_large[0]}") from None
        if "Expected a value of type" in message:
            raise TypeError(f"{name}: {message}") from None
        if isinstance(error, NotImplementedError) and message.startswith("Could not run"):  # the dispatcher's words
            kinds = {f"{a.layout} on {a.device.type}" for a in arguments if isinstance(a, torch.Tensor)}
            raise TypeError(
                f"{name}: no kernel for {' with '.join(sorted(kinds))}; tensors must be strided, and `memloc info` "
                "lists the devices that this build has kernels for"
            ) from None
        raise
