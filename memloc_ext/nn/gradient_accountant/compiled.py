"""Run what `torch.compile` compiled as it was written: compiled code calls no PyTorch function that could be seen."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_lock = threading.Lock()
_open = 0
_stance = ExitStack()


@contextmanager
def uncompiled() -> Iterator[None]:
    """Have compiled functions run uncompiled, in every thread, until no thread is inside any more.

    Raises:
        RuntimeError: If called from a compiled function.
    """
    global _open
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes seconds
        yield
        return
    with _lock:
        if _open == 0:
            try:
                _stance.enter_context(torch.compiler.set_stance("force_eager"))
            except RuntimeError as error:
                raise RuntimeError("GradientAccountant: open it outside of what torch.compile compiles") from error
        _open += 1
    try:
        yield
    finally:
        with _lock:
            _open -= 1
            if _open == 0:
                _stance.close()
