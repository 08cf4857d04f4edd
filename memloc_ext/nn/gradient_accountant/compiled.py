"""Run what `torch.compile` compiled as it was written: compiled code calls no PyTorch function that could be seen."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from memloc_ext.nn.shared_context import SharedContext


@contextmanager
def _force_eager() -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        except RuntimeError as error:
            raise RuntimeError("GradientAccountant: open it outside of what torch.compile compiles") from error
        yield


_eager = SharedContext(_force_eager)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Have compiled functions run uncompiled, in every thread, until no thread is inside any more.

    Raises:
        RuntimeError: If called from a compiled function.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes seconds
        yield
        return
    with _eager():
        yield
