"""Change a few weights of a model, for as long as a ``with`` lasts or in a copy for good."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class WeightChange:
    """What is added to some neighbouring weights.

    Attributes:
        parameter: Name in the model.
        first: Index of the first of them in the flattened parameter.
        values: Added to it and those that follow, one each.
    """

    parameter: str
    first: int
    values: Tensor


class AppliedChanges:
    """Weights that are changed by a ``with``, and put back at its end, bit for bit.

    Args:
        model: To change; not before the ``with`` or the `AppliedChanges.copy`.
        changes: To make, in this order.

    Raises:
        ValueError: If the model has no such parameter, or it has too few weights.
    """

    def __init__(self, model: nn.Module, changes: Sequence[WeightChange]) -> None:
        self.model, self.changes = model, list(changes)
        parameters = dict(model.named_parameters())
        for change in self.changes:
            size = parameters[change.parameter].numel() if change.parameter in parameters else 0
            if change.first < 0 or change.first + len(change.values) > size:
                raise ValueError(
                    f"changes must be of the model's weights, got {len(change.values)} from {change.first} on in "
                    f"{change.parameter} with {size}"
                )
        self._old: list[tuple[Tensor, tuple[Tensor, ...], Tensor]] = []

    def __enter__(self) -> nn.Module:
        """Change the weights and return the model."""
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for change in self.changes:
                weight = parameters[change.parameter]
                flat = torch.arange(change.first, change.first + len(change.values), device=weight.device)
                index = torch.unravel_index(flat, weight.shape)
                old = weight[index]
                self._old.append((weight, index, old))
                weight.index_put_(index, old + change.values.to(weight))
        return self.model

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Put the old weights back."""
        with torch.no_grad():
            while self._old:
                weight, index, old = self._old.pop()
                weight.index_put_(index, old)

    def copy(self) -> nn.Module:
        """Return a copy of the model with the weights changed for good."""
        return AppliedChanges(copy.deepcopy(self.model), self.changes).__enter__()
