"""Remembers what is known of tensors for as long as they live."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

UNKNOWN = object()
"""Of a tensor that nothing is remembered of."""


class TensorMemory:
    """What is known of tensors, by identity; plain dictionaries compare tensors, and those of PyTorch are slow."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Tensor], Any]] = {}

    def get(self, t: Tensor) -> Any:
        """Return what is known of a tensor, or `UNKNOWN`."""
        entry = self._entries.get(id(t))
        return UNKNOWN if entry is None or entry[0]() is not t else entry[1]

    def put(self, t: Tensor, value: Any) -> None:
        """Remember something of a tensor."""
        key, entries = id(t), self._entries

        def forget(gone: weakref.ref[Tensor]) -> None:
            entry = entries.get(key)
            if entry is not None and entry[0] is gone:
                del entries[key]

        entries[key] = (weakref.ref(t, forget), value)
