"""Which example each row of a dimension belongs to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class ExampleAxis:
    """Place of the examples: index ``(i * batch + b) * after + j`` of dimension ``dim`` belongs to example ``b``.

    Attributes:
        dim: From 0.
        before: Number of ``i``.
        batch: Number of examples.
        after: Number of ``j``.
    """

    dim: int
    before: int
    batch: int
    after: int

    @property
    def size(self) -> int:
        """Of the dimension."""
        return self.before * self.batch * self.after

    @property
    def rows_first(self) -> bool:
        """Whether the tensor is ``[batch * after, *]``, so that an example's part is a slice of it."""
        return self.dim == 0 and self.before == 1

    def merged(self, batch: int) -> ExampleAxis:
        """Return the axis for fewer examples, each of which takes the place of several."""
        return replace(self, batch=batch, after=self.after * (self.batch // batch))

    def prefer_dim(self, dim: int, t: Tensor) -> ExampleAxis:
        """Return an axis in this dimension if there is but one example, to which everything belongs; else this one."""
        return ExampleAxis(dim, 1, 1, t.shape[dim]) if self.batch == 1 else self

    def examples_first(self, t: Tensor) -> Tensor:
        """Return activations of this axis as ``[batch, *]``."""
        if self.before == self.after == 1:
            return t.movedim(self.dim, 0) if self.dim else t
        return t.unflatten(self.dim, (self.before, self.batch, self.after)).movedim(self.dim + 1, 0)

    def owner(self, index: Tensor) -> Tensor:
        """Return the examples that indices of the dimension belong to."""
        return index // self.after % self.batch

    def summed(self, rows: Tensor) -> Tensor:
        """Return the sum of the rows of each example, ``[batch, *]`` of ``[size, *]``."""
        if self.before == self.after == 1:
            return rows
        return rows.unflatten(0, (self.before, self.batch, self.after)).sum((0, 2))

    def alone(self, t: Tensor) -> Tensor:
        """Return activations as ``[batch, *]``, each example's with the dimensions that it has alone."""
        return self.examples_first(t).reshape(
            self.batch, *t.shape[: self.dim], self.before * self.after, *t.shape[self.dim + 1 :]
        )


class Owners:
    """The example that each row belongs to, ``[rows]``, int64; equal if all are."""

    def __init__(self, ids: Tensor, batch: int) -> None:
        self.ids, self.batch = ids, batch

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Owners) and torch.equal(self.ids, other.ids)

    def __hash__(self) -> int:
        return hash(len(self.ids))

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """The rows of each example, ``[batch, most]``, and which of these places are not filled."""
        counts = self.ids.bincount(minlength=self.batch)
        column = torch.arange(int(counts.max()), device=self.ids.device)
        empty = column >= counts[:, None]
        first = counts.cumsum(0) - counts
        order = self.ids.argsort(stable=True)
        return order[(first[:, None] + column).masked_fill(empty, 0)], empty


@dataclass(frozen=True)
class Picked(ExampleAxis):
    """Rows in any order and number: index ``r`` of dimension ``dim`` belongs to example ``owners.ids[r]``."""

    owners: Owners

    @property
    def size(self) -> int:
        """Of the dimension."""
        return len(self.owners.ids)

    @property
    def rows_first(self) -> bool:
        return False

    def merged(self, batch: int) -> ExampleAxis:
        return replace(self, batch=batch, owners=Owners(self.owners.ids // (self.batch // batch), batch))

    def owner(self, index: Tensor) -> Tensor:
        return self.owners.ids[index]

    def examples_first(self, t: Tensor) -> Tensor:
        """Return activations as ``[batch, *]``, with zeros behind those of examples that have fewer: a copy."""
        rows, empty = self.owners.places
        found = t.movedim(self.dim, 0)[rows]
        return found.masked_fill(empty.reshape(*empty.shape, *[1] * (t.dim() - 1)), 0).movedim(1, self.dim + 1)

    def summed(self, rows: Tensor) -> Tensor:
        return rows.new_zeros(self.batch, *rows.shape[1:]).index_add_(0, self.owners.ids, rows)


def picked(axis: ExampleAxis, numbers: Tensor) -> ExampleAxis | None:
    """Return the axis of rows that were picked by their numbers; None if there are several in a row."""
    if not numbers.numel() or not numbers.dim():
        return None
    rows = numbers.reshape(len(numbers), -1)
    if not bool((rows == rows[:, :1]).all()):
        return None
    ids, batch = axis.owner(rows[:, 0]), axis.batch
    if len(ids) % batch == 0 and torch.equal(
        ids, torch.arange(batch, device=ids.device).repeat_interleave(len(ids) // batch)
    ):
        return ExampleAxis(0, 1, batch, len(ids) // batch)
    return Picked(0, 1, batch, 1, Owners(ids, batch))
