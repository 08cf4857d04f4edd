"""Run a model as ablations need it: in evaluation mode, as it was written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from memloc_ext.borrowing import SharedContext, check_whole, kept_state


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode and leave modes, buffers and the generators as they were.

    Raises:
        ValueError: If this process has only a part of it.
    """
    check_whole(model)
    with kept_state(model):
        model.eval()
        yield


@contextlib.contextmanager
def _as_written() -> Iterator[None]:
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


without_fast_path = SharedContext(_as_written)
"""Have transformer layers run as they are written, not as one operator, until no thread is inside any more."""
