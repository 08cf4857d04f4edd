"""Units that a search looks at, and the best of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HUGE = 1e30  # in the place of infinite scores, above those of units that must not be chosen


@dataclass(frozen=True)
class Candidates:
    """Some units of each example.

    Attributes:
        units: ``[examples, count]``, int64, numbered through all sites.
        scores: First-order change of the example's loss less that of the population's, likewise.
        effects: First-order change of the population's loss, likewise.
        changes: What is added to the weights of each, ``[examples, count, weights]``, with zeros behind those of units
            that have fewer; None where no weights change.
    """

    units: Tensor
    scores: Tensor
    effects: Tensor
    changes: Tensor | None = None

    @staticmethod
    def cat(parts: Sequence[Candidates], dim: int = 0) -> Candidates:
        """Join the candidates of different examples, or along dimension 1 different candidates of the same."""
        changes = [part.changes for part in parts if part.changes is not None]
        return Candidates(
            torch.cat([part.units for part in parts], dim),
            torch.cat([part.scores for part in parts], dim),
            torch.cat([part.effects for part in parts], dim),
            torch.cat(changes, dim) if changes else None,
        )

    def pick(self, columns: Tensor) -> Candidates:
        """Return those of some columns, ``[examples, *]``."""
        changes = self.changes
        if changes is not None:
            changes = changes.gather(1, columns[:, :, None].expand(-1, -1, changes.shape[2]))
        units, scores, effects = (t.gather(1, columns) for t in (self.units, self.scores, self.effects))
        return Candidates(units, scores, effects, changes)

    def repeated(self, example: int, times: int) -> Candidates:
        """Return those of one example, for so many examples."""
        units, scores, effects = (t[example].expand(times, -1) for t in (self.units, self.scores, self.effects))
        changes = None if self.changes is None else self.changes[example].expand(times, -1, -1)
        return Candidates(units, scores, effects, changes)

    def best(self, count: int) -> Candidates:
        """Return those with the largest scores, in falling order."""
        return self.pick(self.scores.topk(count, 1).indices)


def finite(scores: Tensor) -> Tensor:
    """Return scores of which none is infinite; those that are not a number are the smallest."""
    return scores.nan_to_num(nan=-HUGE, posinf=HUGE, neginf=-HUGE)
