"""Run a model as ablations need it: in evaluation mode, as it was written, for its logits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from memloc_ext.borrowing import SharedContext, check_whole, kept_state


def logits_of(output: Any) -> Tensor:
    """Return the logits among what a model returns.

    Args:
        output: The logits; an object that has, or a mapping that holds, them by the name ``logits``; or a tuple or list
            that begins with them.

    Raises:
        ValueError: If it is none of these.
    """
    logits = output
    if isinstance(output, Mapping):
        logits = output.get("logits")
    elif not isinstance(output, Tensor):
        logits = getattr(output, "logits", output[0] if isinstance(output, tuple | list) and output else None)
    if not isinstance(logits, Tensor):
        raise ValueError(
            "the model must return logits [batch, classes]: a tensor, an object or mapping with logits, or a tuple "
            f"that begins with them, got {type(output).__name__}"
        )
    return logits


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
