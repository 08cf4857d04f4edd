"""What one use of a parameter adds to each example's gradient, in the cheapest form that answers what is asked."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from memloc_ext import ops
from memloc_ext.ops import Groups, plan_linear
from memloc_ext.ops.grad_sqnorm_groups import linear_group_grad

BUDGET = 1 << 26  # bytes of gradients that are materialised at a time, where nothing better is known
_BLOCK = 1 << 14  # terms of a sum of products in the type of the gradients


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

    def total(self, factors: Tensor | None = None) -> Tensor:
        """Return the sum over the examples, each times its factor ``[batch]``: ``[*shape]``."""
        factors = torch.ones(self.batch, dtype=self.dtype, device=self.device) if factors is None else factors
        result = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for begin, end in self._chunks():
            result += torch.tensordot(factors[begin:end].to(self.dtype), self.gradients(begin, end), 1)
        return result

    def sqnorm(self) -> Tensor:
        """Return the squared norm of each example's gradient, ``[batch]``."""
        return torch.cat([squared_norms(self._flat(begin, end)) for begin, end in self._chunks()])

    def sqnorm_and_groups(self, groups: Groups) -> tuple[Tensor, Tensor]:
        """Return `sqnorm` and the sum over the examples of each group, ``[groups.num, *shape]``."""
        sums = torch.zeros(groups.num, *self.shape, dtype=self.dtype, device=self.device)
        for begin, end in self._chunks():
            sums.index_add_(0, groups.ids[begin:end], self.gradients(begin, end))
        return self.sqnorm(), sums

    def sqnorm_and_total(self) -> tuple[Tensor, Tensor]:
        """Return `sqnorm` and `total`, in one pass where that takes less time."""
        if not self.one_pass:
            return self.sqnorm(), self.total()
        sqnorm, sums = self.sqnorm_and_groups(Groups.single(self.batch, self.device))
        return sqnorm, sums[0]

    @property
    def one_pass(self) -> bool:
        """Whether norms and sums are best found by one pass, of an operator on the CPU."""
        return False

    def dot(self, directions: Tensor) -> Tensor:
        """Return the inner products of each example's gradient with ``[n, *shape]``: ``[n, batch]``."""
        flat = _real(directions.to(self.dtype))
        return torch.cat([_products(flat, self._flat(begin, end)) for begin, end in self._chunks()], 1)

    def dot_and_groups(self, directions: Tensor, groups: Groups) -> tuple[Tensor, Tensor, Tensor]:
        """Return `dot` and `sqnorm_and_groups`."""
        return self.dot(directions), *self.sqnorm_and_groups(groups)

    def inner(self) -> Tensor:
        """Return the inner products of the gradients of all pairs of examples, ``[batch, batch]``."""
        result = torch.empty(self.batch, self.batch, dtype=self.dtype.to_real(), device=self.device)
        parts = list(self._chunks())
        for i, (begin, end) in enumerate(parts):
            rows = self._flat(begin, end)
            for first, last in parts[i:]:
                block = _products(rows, rows if first == begin else self._flat(first, last))
                result[begin:end, first:last], result[first:last, begin:end] = block, block.t()
        return result

    def projected(self, left: Tensor, right: Tensor) -> Tensor:
        """Return ``left @ G @ right.T`` of each gradient ``G`` as a matrix ``[shape[0], rest]``: ``[batch, k, k']``."""
        left, right = left.to(self.dtype), right.to(self.dtype)
        sides = (left.shape[1], right.shape[1])
        parts = (self.gradients(begin, end).reshape(end - begin, *sides) for begin, end in self._chunks())
        return torch.cat([left @ part @ right.t() for part in parts])

    def row_sqnorm(self) -> Tensor:
        """Return the squared norms of ``gradient[i]`` for each ``i``, ``[batch, shape[0]]``."""
        rows = self.shape[0] if self.shape else 1
        parts = (self._flat(begin, end).unflatten(1, (rows, -1)) for begin, end in self._chunks())
        return torch.cat([part.square().sum(2) for part in parts])

    def by_position(self) -> Contribution | None:
        """Return the same with each position of each example as an example, ``[batch * positions]``; None without."""
        return None

    def _chunks(self) -> Iterator[tuple[int, int]]:
        return chunks(self.batch, self.shape, self.dtype)

    def _flat(self, begin: int, end: int) -> Tensor:
        return _real(self.gradients(begin, end))


class Rows(Contribution):
    """Gradients that are small enough to be there, as those of a bias or of a normalisation are.

    Args:
        gradients: ``[batch, *shape]``.
        positions: What they are the sums over, ``[batch, *, *shape]``, if examples have positions.
    """

    def __init__(self, gradients: Tensor, positions: Tensor | None = None) -> None:
        super().__init__(len(gradients), gradients.shape[1:], gradients)
        self.rows, self._positions, self._sqnorm = gradients, positions, None

    @classmethod
    def of_positions(cls, gradients: Tensor) -> Rows:
        """Return the sums over the positions of ``[batch, *, features]``, which are kept."""
        dims = tuple(range(1, gradients.dim() - 1))
        return cls(gradients.sum(dims) if dims else gradients, gradients)

    def gradients(self, begin: int, end: int) -> Tensor:
        return self.rows[begin:end].to(self.dtype)

    def total(self, factors: Tensor | None = None) -> Tensor:
        return self.rows.sum(0) if factors is None else super().total(factors)

    def by_position(self) -> Contribution | None:
        return None if self._positions is None else Rows(self._positions.reshape(-1, *self.shape))

    def sqnorm(self) -> Tensor:
        if self._sqnorm is None:
            self._sqnorm = squared_norms(self.rows.reshape(self.batch, math.prod(self.shape)))
        return self._sqnorm

    def sqnorm_and_groups(self, groups: Groups) -> tuple[Tensor, Tensor]:
        if groups.num > 16:  # many small groups
            return super().sqnorm_and_groups(groups)
        if groups.num == 1:
            return self.sqnorm(), self.rows.sum(0, keepdim=True, dtype=self.dtype)
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
        x, g = (positions(t[begin:end]).to(self.dtype) for t in (self.input, self.grad_output))
        return g.transpose(1, 2) @ x

    def total(self, factors: Tensor | None = None) -> Tensor:
        x, g = self.input, self.grad_output
        if factors is not None:
            x, g = x.to(self.dtype), scaled(g.to(self.dtype), factors)
        return g.flatten(0, -2).t() @ x.flatten(0, -2)

    def sqnorm(self) -> Tensor:
        if self._bias is not None:
            return squared_norms(self.input) * self._bias.sqnorm()
        return ops.linear_grad_sqnorm(self.input, self.grad_output)

    @property
    def one_pass(self) -> bool:
        x, g = self.input, self.grad_output
        if not x.is_cpu or self._bias is not None or not x.numel():
            return False
        return plan_linear(math.prod(x.shape[1:-1]), x.shape[-1], g.shape[-1]).fused

    def sqnorm_and_groups(self, groups: Groups) -> tuple[Tensor, Tensor]:
        if self._bias is not None:
            return self.sqnorm(), linear_group_grad(self.input, self.grad_output, groups)
        return ops.linear_grad_sqnorm_groups(self.input, self.grad_output, groups)

    def dot(self, directions: Tensor) -> Tensor:
        x, g = self.input.to(self.dtype), self.grad_output.to(self.dtype)
        return torch.stack([(x @ v.t() * g).flatten(1).sum(1) for v in directions.to(self.dtype)])

    def dot_and_groups(self, directions: Tensor, groups: Groups) -> tuple[Tensor, Tensor, Tensor]:
        if self._bias is not None:
            return super().dot_and_groups(directions, groups)
        return ops.linear_grad_dot(self.input, self.grad_output, directions, groups)

    def inner(self) -> Tensor:
        return ops.linear_grad_inner(self.input, self.grad_output)

    def projected(self, left: Tensor, right: Tensor) -> Tensor:
        x, g = positions(self.input).to(self.dtype) @ right.t(), positions(self.grad_output).to(self.dtype) @ left.t()
        return g.mT @ x

    def by_position(self) -> Contribution:
        x, g = (t.reshape(-1, 1, t.shape[-1]) for t in (self.input, self.grad_output))
        return LinearContribution(x, g)


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
        part = self._like(self.indices[begin:end], self.grad_output[begin:end])
        first = torch.arange(end - begin, device=self.device)[:, None] * self.shape[0]
        return part._sums(part.indices + first, (end - begin) * self.shape[0]).reshape(-1, *self.shape)

    def total(self, factors: Tensor | None = None) -> Tensor:
        if factors is not None:
            return self._like(self.indices, scaled(self.grad_output.to(self.dtype), factors)).total()
        return self._sums(self.indices, self.shape[0])

    def sqnorm(self) -> Tensor:
        present, squares = self._row_squares()
        owner = present.div(max(1, self.shape[0]), rounding_mode="floor")
        return squares.new_zeros(self.batch).index_add_(0, owner, squares)

    def row_sqnorm(self) -> Tensor:
        present, squares = self._row_squares()
        return squares.new_zeros(self.batch * self.shape[0]).index_add_(0, present, squares).reshape(self.batch, -1)

    def _row_squares(self) -> tuple[Tensor, Tensor]:
        """Return rows that examples use, ``example * num + index``, and the squared norms of their gradients.

        As many as there are positions, whatever the indices are; of those that an example does not fill, the squares
        are 0.
        """
        indices, order = self.indices.sort(dim=1, stable=True)
        new = torch.zeros_like(indices)
        new[:, 1:] = indices[:, 1:] != indices[:, :-1]
        example = torch.arange(self.batch, device=self.device)[:, None]
        places = new.cumsum(1) + example * indices.shape[1]
        keys = torch.empty_like(places).scatter_(1, order, places)
        present = (example * self.shape[0]).expand_as(places).flatten()
        present = present.scatter(0, places.flatten(), (indices + example * self.shape[0]).flatten())
        return present, self._sums(keys, places.numel()).square().sum(1)

    def dot(self, directions: Tensor) -> Tensor:
        g = self.grad_output.to(self.dtype)
        return torch.stack([(v[self.indices] * g).flatten(1).sum(1) for v in directions.to(self.dtype)])

    def inner(self) -> Tensor:
        present, keys = torch.unique(self.indices, return_inverse=True)  # rows that no example uses add nothing
        return Contribution.inner(EmbeddingContribution(keys, self.grad_output, len(present), -1))

    def projected(self, left: Tensor, right: Tensor) -> Tensor:
        rows = left.to(self.dtype).t()[self.indices]
        return rows.mT @ (self.grad_output.to(self.dtype) @ right.t())

    def by_position(self) -> Contribution:
        return self._like(self.indices.reshape(-1, 1), self.grad_output.reshape(-1, 1, self.shape[1]))

    def _like(self, indices: Tensor, grad_output: Tensor) -> EmbeddingContribution:
        return EmbeddingContribution(indices, grad_output, self.shape[0], -1)

    def sqnorm_and_groups(self, groups: Groups) -> tuple[Tensor, Tensor]:
        sums = self._sums(self.indices + groups.ids[:, None] * self.shape[0], groups.num * self.shape[0])
        return self.sqnorm(), sums.reshape(groups.num, *self.shape)


def squared_norms(rows: Tensor) -> Tensor:
    """Return the squared norm of each row of a matrix, ``[rows]``."""
    if rows.is_complex():
        rows = _real(rows)
    if rows.numel() < 1 << 15 and rows.dtype in (torch.float32, torch.float64):  # the operator's call costs more
        return rows.square().sum(1)
    return ops.linear_grad_sqnorm(rows, rows.new_ones(len(rows), 1))


def squared_norm(t: Tensor) -> Tensor:
    """Return the squared norm of all elements, 0-d."""
    if t.numel() < 1 << 12 and t.dtype in (torch.float32, torch.float64):
        flat = t.reshape(-1)
        return flat.dot(flat)
    return squared_norms(t.reshape(1, -1))[0]


def chunks(batch: int, shape: Sequence[int], dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """Yield ranges of examples whose tensors of ``shape`` fit into so many bytes, at least one example each."""
    step = max(1, BUDGET // max(1, math.prod(shape) * dtype.itemsize))
    for begin in range(0, max(1, batch), step):
        yield begin, min(batch, begin + step)


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """Return the type that sums of ``dtype`` are formed in."""
    return dtype if dtype in (torch.float64, torch.complex64, torch.complex128) else torch.float32


def scaled(t: Tensor, factors: Tensor) -> Tensor:
    """Return ``[batch, *]`` with each example's part times its factor ``[batch]``."""
    return t * factors.to(t.dtype).reshape(-1, *[1] * (t.dim() - 1))


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b.T``; blocks of its sums, too short to lose digits, are added up in float64."""
    if a.shape[1] <= _BLOCK:
        return a @ b.t()
    parts = zip(a.split(_BLOCK, 1), b.split(_BLOCK, 1), strict=True)
    result = a.new_zeros(len(a), len(b), dtype=torch.float64)
    for first, second in parts:
        result += first @ second.t()
    return result.to(a.dtype)


def _real(rows: Tensor) -> Tensor:
    """Return ``[n, *]`` as a matrix of real numbers."""
    flat = rows.reshape(len(rows), math.prod(rows.shape[1:]))
    return torch.view_as_real(flat).flatten(1) if flat.is_complex() else flat


def positions(t: Tensor) -> Tensor:
    """Return ``[batch, *, features]`` as ``[batch, positions, features]``."""
    return t.reshape(len(t), math.prod(t.shape[1:-1]), t.shape[-1])
