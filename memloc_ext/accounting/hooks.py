"""Hooks of the user, which are for the gradient of the batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor


@contextmanager
def without_hooks(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Have no hooks of these tensors called with gradients that are not the batch's."""
    hooks = [(t._backward_hooks, dict(t._backward_hooks)) for t in tensors if t._backward_hooks]
    for own, _ in hooks:
        own.clear()
    try:
        yield
    finally:
        for own, kept in hooks:
            own.update(kept)
