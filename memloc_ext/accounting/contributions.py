"""What one use of a parameter adds to each example's gradient, in the cheapest form that gives norms and sums."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from memloc_ext import ops
from memloc_ext.ops import Groups
from memloc_ext.ops.grad_sqnorm_groups import linear_group_grad

BUDGET = 1 << 26  # bytes of gradients that are materialised at a time, where nothing better is known


class Contribution:
    """One use of a parameter, or of a view of it, by a batch.

    Gradients are added up in ``dtype``, which is float64 for float64, else float32, on ``device``.

    Args:
        batch: Number of examples.
        shape: Of the parameter or view.
        like: A tensor of the dtype and on the device of the gradients.
    """

    def __init__(self, batch: int, shape: torch.Size, like: Tensor) -> None:
        self.batch, self.shape = batch, shape
        self.dtype, self.device = accumulated(like.dtype), like.device

    def gradients(self, begin: int, end: int) -> Tensor:
        """Return the gradients of examples ``begin`` to ``end``, ``[end - begin, *shape]``."""
        raise NotImplementedError

    def total(self) -> Tensor:
        """Return the sum over the examples, ``[*shape]``."""
        raise NotImplementedError

    def sqnorm(self) -> Tensor:
        """Return the squared norm of each example's gradient, ``[batch]``."""
        return materialised_sqnorm([self])

    def sqnorm_and_groups(self, groups: Groups) -> tuple[Tensor, Tensor]:
        """Return `sqnorm` and the sum over the examples of each group, ``[groups.num, *shape]``."""
        sums = torch.zeros(groups.num, *self.shape, dtype=self.dtype, device=self.device)
        for begin, end in chunks(self.batch, self.shape, self.dtype):
            sums.index_add_(0, groups.ids[begin:end], self.gradients(begin, end))
        return self.sqnorm(), sums


class Rows(Contribution):
    """Gradients that are small enough to be there, as those of a bias or of a normalisation are.

    Args:
        gradients: ``[batch, *shape]``.
    """

    def __init__(self, gradients: Tensor) -> None:
        super().__init__(len(gradients), gradients.shape[1:], gradients)
        self.rows, self._sqnorm = gradients, None

    def gradients(self, begin: int, end: int) -> Tensor:
        return self.rows[begin:end].to(self.dtype)

    def total(self) -> Tensor:
        return self.rows.sum(0)

    def sqnorm(self) -> Tensor:
        if self._sqnorm is None:
            self._sqnorm = row_sqnorms(self.rows.reshape(self.batch, math.prod(self.shape)))
        return self._sqnorm

    def sqnorm_and_groups(self, groups: Groups) -> tuple[Tensor, Tensor]:
        if groups.num > 16:  # many small groups
            return super().sqnorm_and_groups(groups)
        return self.sqnorm(), torch.stack([rows.sum(0, dtype=self.dtype) for (rows,) in groups.split(self.rows)])


class LinearContribution(Contribution):
    """A linear layer's weight ``[out, in]``.

    Args:
        input: ``[batch, *, in]``.
        grad_output: ``[batch, *, out]``, of the same dtype.
        bias: Its use of the same layer, which knows the norms of ``grad_output`` if there are no positions.
    """

    def __init__(self, input: Tensor, grad_output: Tensor, bias: Rows | None = None) -> None:
        super().__init__(len(input), torch.Size((grad_output.shape[-1], input.shape[-1])), input)
        self.input, self.grad_output = input, grad_output
        self._bias = bias if input.dim() == 2 else None

    def gradients(self, begin: int, end: int) -> Tensor:
        x, g = (_positions(t[begin:end]).to(self.dtype) for t in (self.input, self.grad_output))
        return g.transpose(1, 2) @ x

    def total(self) -> Tensor:
        return self.grad_output.flatten(0, -2).t() @ self.input.flatten(0, -2)

    def sqnorm(self) -> Tensor:
        if self._bias is not None:
            return row_sqnorms(self.input) * self._bias.sqnorm()
        return ops.linear_grad_sqnorm(self.input, self.grad_output)

    def sqnorm_and_groups(self, groups: Groups) -> tuple[Tensor, Tensor]:
        if self._bias is not None:
            return self.sqnorm(), linear_group_grad(self.input, self.grad_output, groups)
        return ops.linear_grad_sqnorm_groups(self.input, self.grad_output, groups)


class EmbeddingContribution(Contribution):
    """Rows of a table ``[num, dim]``; a linear layer of one-hot inputs.

    Args:
        indices: ``[batch, *]``, int64.
        grad_output: ``[batch, *, dim]``.
        num: Rows of the table.
        padding_idx: A row that gets no gradient, or a negative number.
    """

    def __init__(self, indices: Tensor, grad_output: Tensor, num: int, padding_idx: int) -> None:
        super().__init__(len(indices), torch.Size((num, grad_output.shape[-1])), grad_output)
        self.indices = indices.flatten(1).long() if indices.dim() > 1 else indices.long()[:, None]
        self.grad_output = grad_output.reshape(*self.indices.shape, grad_output.shape[-1])
        if padding_idx >= 0:
            self.grad_output = self.grad_output * (self.indices != padding_idx)[..., None]

    def _sums(self, keys: Tensor, num: int) -> Tensor:
        rows = self.grad_output.flatten(0, 1).to(self.dtype)
        return rows.new_zeros(num, self.shape[1]).index_add_(0, keys.flatten(), rows)

    def gradients(self, begin: int, end: int) -> Tensor:
        part = EmbeddingContribution(self.indices[begin:end], self.grad_output[begin:end], self.shape[0], -1)
        first = torch.arange(end - begin, device=self.device)[:, None] * self.shape[0]
        return part._sums(part.indices + first, (end - begin) * self.shape[0]).reshape(-1, *self.shape)

    def total(self) -> Tensor:
        return self._sums(self.indices, self.shape[0])

    def sqnorm(self) -> Tensor:
        """Return the squared norms: the gradients of equal indices of an example are added up, and only those rows."""
        first = torch.arange(self.batch, device=self.device)[:, None] * self.shape[0]
        present, keys = torch.unique(self.indices + first, return_inverse=True)
        squares = self._sums(keys, len(present)).square().sum(1)
        return squares.new_zeros(self.batch).index_add_(
            0, present.div(max(1, self.shape[0]), rounding_mode="floor"), squares
        )

    def sqnorm_and_groups(self, groups: Groups) -> tuple[Tensor, Tensor]:
        sums = self._sums(self.indices + groups.ids[:, None] * self.shape[0], groups.num * self.shape[0])
        return self.sqnorm(), sums.reshape(groups.num, *self.shape)


def combined_sqnorm(contributions: Sequence[Contribution]) -> Tensor:
    """Return the squared norm of each example's gradient of one parameter that was used several times, ``[batch]``.

    Cross terms are included: the uses of a linear layer are concatenated over their positions, and so are those of an
    embedding; between a linear layer and an embedding of the same table, row ``i`` of the one meets index ``i`` of the
    other. Anything else is materialised, a few examples at a time.
    """
    if len(contributions) == 1:
        return contributions[0].sqnorm()
    linear = [c for c in contributions if isinstance(c, LinearContribution)]
    lookups = [c for c in contributions if isinstance(c, EmbeddingContribution)]
    if len(linear) + len(lookups) < len(contributions) or len({c.dtype for c in contributions}) > 1:
        return materialised_sqnorm(contributions)
    norms = contributions[0].sqnorm().new_zeros(contributions[0].batch)
    x = g = None
    if linear:
        dtype = functools.reduce(torch.promote_types, (c.input.dtype for c in linear))
        x, g = (
            torch.cat([_positions(getattr(c, name)).to(dtype) for c in linear], 1) for name in ("input", "grad_output")
        )
        norms += ops.linear_grad_sqnorm(x, g)
    if lookups:
        rows = torch.cat([c.grad_output.to(c.dtype) for c in lookups], 1)
        indices = torch.cat([c.indices for c in lookups], 1)
        norms += EmbeddingContribution(indices, rows, lookups[0].shape[0], -1).sqnorm()
        if x is not None and g is not None:
            for begin, end in chunks(len(x), (indices.shape[1], x.shape[1]), rows.dtype):
                meeting = rows[begin:end] @ x[begin:end].to(rows.dtype).transpose(1, 2)  # [n, tokens, positions]
                index = indices[begin:end, None, :].expand(-1, x.shape[1], -1)
                weights = g[begin:end].gather(2, index).transpose(1, 2).to(rows.dtype)
                norms[begin:end] += 2 * (meeting * weights).sum((1, 2)).to(norms.dtype)
    return norms.clamp_(min=0)  # the cross term cancels, down to rounding below zero


def materialised_sqnorm(contributions: Sequence[Contribution]) -> Tensor:
    """Return the squared norms of the sums of the uses' gradients, ``[batch]``, a few examples at a time."""
    first = contributions[0]
    norms = torch.zeros(first.batch, dtype=first.dtype.to_real(), device=first.device)
    for begin, end in chunks(first.batch, first.shape, first.dtype):
        norms[begin:end] = Rows(sum_of_gradients(contributions, begin, end)).sqnorm()
    return norms


def sum_of_gradients(contributions: Sequence[Contribution], begin: int, end: int) -> Tensor:
    """Return the gradients of examples ``begin`` to ``end`` of one parameter, ``[end - begin, *shape]``."""
    gradient = contributions[0].gradients(begin, end)
    for contribution in contributions[1:]:
        gradient = gradient + contribution.gradients(begin, end)
    return gradient


def row_sqnorms(rows: Tensor) -> Tensor:
    """Return the squared norm of each row of a matrix."""
    if rows.is_complex():
        return rows.abs().square().sum(1)
    if rows.numel() < 1 << 15 and rows.dtype in (torch.float32, torch.float64):  # the operator's call costs more
        return rows.square().sum(1)
    return ops.linear_grad_sqnorm(rows, rows.new_ones(len(rows), 1))


def chunks(batch: int, shape: Sequence[int], dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """Yield ranges of examples whose tensors of ``shape`` fit into so many bytes, at least one example each."""
    step = max(1, BUDGET // max(1, math.prod(shape) * dtype.itemsize))
    for begin in range(0, batch, step):
        yield begin, min(batch, begin + step)


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """Return the type that sums of ``dtype`` are formed in."""
    return dtype if dtype in (torch.float64, torch.complex64, torch.complex128) else torch.float32


def _positions(t: Tensor) -> Tensor:
    return t.reshape(len(t), math.prod(t.shape[1:-1]), t.shape[-1])
