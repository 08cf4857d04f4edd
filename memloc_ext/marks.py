"""What is known of examples by their numbers: which are memorized, and their labels before any noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

Marks: TypeAlias = Any
"""Some examples: bool ``[N]`` by number, or the numbers themselves; a tensor, an array or a list."""
Lookup: TypeAlias = Callable[[Tensor], Tensor]
"""Numbers of examples, ``[B]`` int64, to a value for each, ``[B, *]``, on the same device."""


def marked(function: str, memorized: Marks | None, data: Any) -> Lookup | None:
    """Return what tells which examples are memorized, as bool.

    Args:
        function: Named in errors.
        memorized: Which; None for what the data set itself says.
        data: See `memloc_ext.examples`.

    Returns:
        None if ``memorized`` is None and the data set does not say.

    Raises:
        ValueError: If ``memorized`` is neither a mask ``[N]`` nor distinct numbers.
    """
    if memorized is None:
        return _own("memorized", data)
    values = memorized if isinstance(memorized, Tensor) else torch.as_tensor(_array(memorized))
    if values.dtype == torch.bool and values.dim() == 1:
        return ByNumber(f"{function}: memorized", values)
    numbers = values.long() if values.numel() == 0 else values
    if numbers.dim() != 1 or numbers.is_floating_point() or numbers.dtype == torch.bool or (numbers < 0).any():
        rule = "a mask, bool [N] by number, or the numbers of examples, at least 0"
        raise ValueError(f"{function}: memorized must be {rule}, got {values.dtype} {list(values.shape)}")
    if len(numbers.unique()) < len(numbers):
        rule = "integers in memorized are the numbers of examples and must differ"
        raise ValueError(f"{function}: {rule}, got one twice; write a mask as bool")
    return lambda ids: torch.isin(ids, numbers.to(ids.device))


def truth(function: str, labels: Any | None, data: Any) -> Lookup | None:
    """Return what gives examples' labels before any noise, ``[N, *]`` by number, or as the data set itself says."""
    if labels is None:
        return _own("true_labels", data)
    return ByNumber(f"{function}: true_labels", torch.as_tensor(_array(labels)))


class ByNumber:
    """Values of examples, ``[N, *]``, by number, or by row beside the number of each row, ``[N]``."""

    def __init__(self, name: str, values: Tensor, numbers: Tensor | None = None) -> None:
        self._name, self._values, self._order = name, values, None
        if numbers is not None:
            self._order = numbers.argsort()
            self._numbers = numbers[self._order]

    def __call__(self, ids: Tensor) -> Tensor:
        """Return the values of some examples, on the device of ``ids``; ValueError if there is none for one."""
        at = ids.to(self._values.device)
        if self._order is None:
            unknown, rows = at[(at < 0) | (at >= len(self._values))], at
        else:
            places = torch.searchsorted(self._numbers, at).clamp_(max=len(self._numbers) - 1)
            # not looked for on a GPU, which would be waited for
            unknown = at[self._numbers[places] != at] if at.device.type == "cpu" else at[:0]
            rows = self._order[places]
        if len(unknown):
            raise ValueError(f"{self._name} must have a value for each example, got none for number {int(unknown[0])}")
        return self._values[rows].to(ids.device)


def _own(name: str, data: Any) -> ByNumber | None:
    """Return an attribute of a data set."""
    data = data.dataset if isinstance(data, DataLoader) else data
    values = getattr(data, name, None)
    numbers = None if isinstance(data, Subset) else getattr(data, "indices", None)  # those of a Subset are rows
    if values is None:
        return None
    return ByNumber(name, torch.as_tensor(values), None if numbers is None else torch.as_tensor(numbers))


def _array(values: Any) -> Any:
    return values if hasattr(values, "dtype") else list(values)
