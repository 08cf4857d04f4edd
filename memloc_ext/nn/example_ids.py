"""Tell the modules of a model which examples are in the batch, without a change to any forward."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from memloc_ext.ops.example_tied_dropout import check_example_ids


class _Current(threading.local):  # not a ContextVar: torch.compile cannot read one
    def __init__(self) -> None:
        self.ids: Tensor | None = None


_current = _Current()


@contextlib.contextmanager
def example_ids(ids: Tensor) -> Iterator[None]:
    """Name the examples of every forward pass inside the ``with``.

    Each thread sees its own. Activation checkpointing runs forwards again during backward, on CUDA in a thread of
    autograd's own: give checkpointed modules their ids as an argument.

    Args:
        ids: Dataset index of each row, ``[batch]``, or of each token, ``[batch, tokens]``; int64, at least 0. Checked
            here once, so that no module has to wait for the device; best on the model's device, moved there if not.

    Raises:
        TypeError: If ``ids`` is not an int64 tensor.
        ValueError: If an id is negative or ``ids`` has no or more than two dimensions.
    """
    if not isinstance(ids, Tensor):
        raise TypeError(f"example_ids: ids must be a tensor, got {type(ids).__name__}")
    if ids.dtype != torch.int64:
        raise TypeError(f"example_ids: ids must have dtype int64, got {ids.dtype}")
    if ids.dim() not in (1, 2):
        raise ValueError(f"example_ids: ids must have shape [batch] or [batch, tokens], got {list(ids.shape)}")
    check_example_ids(ids)
    with checked_example_ids(ids):
        yield


@contextlib.contextmanager
def checked_example_ids(ids: Tensor) -> Iterator[None]:
    """Do what `example_ids` does, without a look at the values of the ids."""
    outer = _current.ids
    _current.ids = ids
    try:
        yield
    finally:
        _current.ids = outer


def current_example_ids() -> Tensor | None:
    """Return the ids of the innermost `example_ids` that is open here, or None."""
    return _current.ids
