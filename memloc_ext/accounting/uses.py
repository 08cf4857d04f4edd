"""All uses of one parameter, as one contribution to it."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from memloc_ext.accounting.contributions import (
    Contribution,
    EmbeddingContribution,
    LinearContribution,
    chunks,
    positions,
)

if TYPE_CHECKING:
    from memloc_ext.accounting.layers.derived import Derived


@dataclass(frozen=True)
class ParameterView:
    """A parameter, or a view of it: a slice, a transposed one, a part of a split one; or what stands in its place.

    Attributes:
        parameter: What is trained; of a tensor that is computed from such, its copy.
        tensor: What the function is run with.
        derived: How it is computed, or None.
    """

    parameter: nn.Parameter
    tensor: Tensor
    derived: Derived | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [self.parameter] if self.derived is None else self.derived.parameters

    @property
    def is_parameter(self) -> bool:
        """Whether it is the whole parameter, as it lies in memory."""
        t, whole = self.tensor, self.parameter
        return t is whole or (t.shape == whole.shape and t.stride() == whole.stride())

    def views_of(self, like: Tensor) -> Tensor:
        """Return the same view of each of ``[n, *shape]``, contiguous tensors of the parameter's shape."""
        if self.is_parameter:
            return like
        offset = like.storage_offset() + self.tensor.storage_offset() - self.parameter.storage_offset()
        strides = (self.parameter.numel(), *self.tensor.stride())
        return like.as_strided((len(like), *self.tensor.shape), strides, offset)


Use = tuple[ParameterView, Contribution]


def together(uses: Sequence[Use]) -> Contribution:
    """Return all uses of a parameter as one contribution.

    Linear layers that share a parameter, or a view of it, become one over the positions of all, and so do embeddings.
    """
    places: dict[object, list[Use]] = defaultdict(list)
    for view, contribution in uses:
        t = view.tensor
        places[t.shape, t.stride(), t.storage_offset(), type(contribution), contribution.dtype].append(
            (view, contribution)
        )
    parts: list[Use] = []
    for same in places.values():
        own = [contribution for _, contribution in same]
        merge = _MERGED.get(type(own[0]))
        parts += same if merge is None or len(own) == 1 else [(same[0][0], merge(own))]
    if not all(view.is_parameter for view, _ in parts):
        return Views(parts)
    if len(parts) == 1:
        return parts[0][1]
    tied = len(parts) == 2 and {type(contribution) for _, contribution in parts} == _MERGED.keys()
    return Tied(parts) if tied else Views(parts)


def by_position(uses: Sequence[Use]) -> Contribution | None:
    """Return all uses of a parameter with each position of each example as an example; None if they differ in these."""
    each = [(view, by) for view, use in uses if (by := use.by_position()) is not None]
    same = len(each) == len(uses) and len({by.batch for _, by in each}) == 1
    return together(each) if same else None


def _linear(uses: Sequence[LinearContribution]) -> LinearContribution:
    dtype = functools.reduce(torch.promote_types, (use.input.dtype for use in uses))
    x, g = (
        torch.cat([positions(getattr(use, name)).to(dtype) for use in uses], 1) for name in ("input", "grad_output")
    )
    return LinearContribution(x, g)


def _embedding(uses: Sequence[EmbeddingContribution]) -> EmbeddingContribution:
    rows = torch.cat([use.grad_output.to(use.dtype) for use in uses], 1)
    return EmbeddingContribution(torch.cat([use.indices for use in uses], 1), rows, uses[0].shape[0], -1)


_MERGED: dict[type[Contribution], Callable[..., Contribution]] = {
    LinearContribution: _linear,
    EmbeddingContribution: _embedding,
}


class Views(Contribution):
    """Uses of views of a parameter, or several of all of it.

    Args:
        parts: At least one.
    """

    def __init__(self, parts: Sequence[Use]) -> None:
        view, contribution = parts[0]
        super().__init__(contribution.batch, view.parameter.shape, view.parameter)
        self.parts = parts

    def gradients(self, begin: int, end: int) -> Tensor:
        rows = torch.zeros(end - begin, *self.shape, dtype=self.dtype, device=self.device)
        for view, contribution in self.parts:
            view.views_of(rows).add_(contribution.gradients(begin, end))
        return rows

    def total(self, factors: Tensor | None = None) -> Tensor:
        result = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for view, contribution in self.parts:
            view.views_of(result[None])[0].add_(contribution.total(factors))
        return result

    def dot(self, directions: Tensor) -> Tensor:
        given = directions.contiguous()
        return torch.stack([contribution.dot(view.views_of(given)) for view, contribution in self.parts]).sum(0)

    def sqnorm(self) -> Tensor:
        if self._overlap:
            return super().sqnorm()
        return torch.stack([contribution.sqnorm() for _, contribution in self.parts]).sum(0)

    def inner(self) -> Tensor:
        if self._overlap:
            return super().inner()
        return torch.stack([contribution.inner() for _, contribution in self.parts]).sum(0)

    @functools.cached_property
    def _overlap(self) -> bool:
        touched = torch.zeros(1, *self.shape, dtype=torch.int8)
        for view, _ in self.parts:
            view.views_of(touched).add_(1)
        return bool((touched > 1).any())


class Tied(Views):
    """A table whose rows are looked up, and that is a linear layer's weight: row ``i`` of the one meets index ``i``."""

    def __init__(self, parts: Sequence[Use]) -> None:
        super().__init__(parts)
        linear, lookup = sorted((use for _, use in parts), key=lambda use: isinstance(use, EmbeddingContribution))
        assert isinstance(linear, LinearContribution)
        assert isinstance(lookup, EmbeddingContribution)
        self._linear, self._lookup = linear, lookup

    def _meeting(self, x: Tensor, g: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
        """Return the products of all positions ``[n, *]`` of the layer with all lookups of the same ``n``."""
        index = indices[:, None, :].expand(-1, x.shape[1], -1)
        return (x.to(self.dtype) @ rows.to(self.dtype).mT) * g.gather(2, index).to(self.dtype)

    @property
    def _operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        linear, lookup = _linear([self._linear]), self._lookup
        return linear.input, linear.grad_output, lookup.indices, lookup.grad_output

    def sqnorm(self) -> Tensor:
        x, g, indices, rows = self._operands
        norms = self._linear.sqnorm() + self._lookup.sqnorm()
        for begin, end in chunks(self.batch, (indices.shape[1], x.shape[1]), self.dtype):
            part = (t[begin:end] for t in (x, g, indices, rows))
            norms[begin:end] += 2 * self._meeting(*part).sum((1, 2))
        return norms.clamp_(min=0)  # the cross term cancels, down to rounding below zero

    def inner(self) -> Tensor:
        x, g, indices, rows = self._operands
        result, everything = self._linear.inner() + self._lookup.inner(), (indices.reshape(1, -1), rows.flatten(0, 1))
        for begin, end in chunks(self.batch, (indices.numel(), x.shape[1]), self.dtype):
            cross = self._meeting(x[begin:end], g[begin:end], everything[0].expand(end - begin, -1), everything[1])
            cross = cross.sum(1).reshape(end - begin, self.batch, -1).sum(2)
            result[begin:end] += cross
            result[:, begin:end] += cross.t()
        return result
