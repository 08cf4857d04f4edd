"""Borrow a model: change its training flags and have them put back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def kept_training_flags(model: nn.Module) -> Iterator[None]:
    """Give every module of ``model`` its ``training`` flag back after the ``with``, also on an error."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
