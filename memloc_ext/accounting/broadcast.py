"""Parameters that meet activations element by element, repeated for every example: positions, scales, class tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from memloc_ext.accounting.embedding import Embedding
from memloc_ext.accounting.layer import Rule
from memloc_ext.accounting.layout import Layout
from memloc_ext.accounting.owners import Picked
from memloc_ext.accounting.run import Repeated
from memloc_ext.accounting.session import Session, tensors
from memloc_ext.accounting.uses import EmbeddingUse, Rows, Use, accumulated


class Broadcast(Rule):
    """A parameter, repeated for every example: the gradient of the repeated one is each example's own.

    Args:
        session: See `Rule`.
        source: What is repeated.
        layout: Of the result.
        shape: Of the result.
    """

    def __init__(self, session: Session, source: Repeated, layout: Layout, shape: Sequence[int]) -> None:
        super().__init__(session, [source.weight], layout)
        self.source, self.shape, self.own = source, list(shape), source.value.shape

    def forward(self, value: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """See `Rule`."""
        return value.expand(self.shape), ()

    def backward(self, saved: Any, needs: Sequence[bool], grad: Tensor) -> tuple[Tensor | None, ...]:
        """See `Rule`."""
        own = [1] * (grad.dim() - len(self.own)) + list(self.own)
        rows = grad.movedim(self.layout.dim, 0)
        del own[self.layout.dim]
        repeated = [d + 1 for d, size in enumerate(own) if size == 1 and rows.shape[d + 1] != 1]
        rows = (rows.sum(repeated) if repeated else rows).reshape(len(rows), *self.own)
        rows, indices = self.by_example(rows), self.source.indices
        if indices is None:
            return (self.record(0, Rows(rows)),)
        same = indices.expand(len(rows), *indices.shape)
        table = self.source.weight.tensor
        # its gradient is the table's, and the lookup passes that on itself
        self.record(0, EmbeddingUse(same, rows, table.shape[0], self.source.padding_idx))
        run = self.session.run
        return (rows.sum(0) if run is None or run.wants(self.source.weight) else None,)


class OwnRows(Rule):
    """A parameter with rows where the examples are: each example meets its own."""

    def forward(self, value: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """See `Rule`."""
        return value.detach(), ()

    def backward(self, saved: Any, needs: Sequence[bool], grad: Tensor) -> tuple[Tensor | None, ...]:
        """See `Rule`."""
        run = self.telling
        return (self.record(0, OwnRowsUse(grad, self.layout if run is None else run.place(self.layout))),)


class OwnRowsUse(Use):
    """A parameter of which each example has rows of its own, and no part in the others.

    Args:
        grad: Of the parameter, for all examples together.
        layout: Where the examples are in it.
    """

    def __init__(self, grad: Tensor, layout: Layout) -> None:
        self.grad, self.layout = grad, layout
        self.batch, self.shape, self.dtype, self.device = layout.batch, grad.shape, accumulated(grad.dtype), grad.device

    def gradients(self, begin: int, end: int) -> Tensor:
        """See `Use`."""
        result = torch.zeros(end - begin, *self.shape, dtype=self.dtype, device=self.device)
        rows = self.layout.first(self.grad)
        for place, b in zip(result, range(begin, end), strict=True):
            self.layout.first(place)[b] = rows[b]
        return result

    def total(self) -> Tensor:
        """See `Use`."""
        return self.grad

    def sqnorm(self) -> Tensor:
        """See `Use`."""
        return Rows(self.layout.first(self.grad)).sqnorm()


def broadcast(session: Session, func: Any, args: Any, kwargs: Any) -> Any:
    """Handle an elementwise function of activations and parameters."""
    if "out" in kwargs or any(isinstance(value, tuple | list) for value in args):
        return NotImplemented
    if func.__name__.endswith("_") and isinstance(args[0], Tensor) and session.shared(args[0]):
        written = not func.__name__.endswith("__") or func.__name__.startswith("__i")
        if written:  # what is repeated cannot be written to
            return NotImplemented
    given = tensors((args, kwargs))
    rank = max(t.dim() for t in given)
    places = {_aligned(session, t, rank) for t in given if not session.shared(t)}
    if len(places) != 1 or (layout := places.pop()) is None:
        return NotImplemented

    replaced = {id(t): _repeat(session, t, layout, rank) for t in given if session.shared(t) and t.requires_grad}
    if any(value is None for value in replaced.values()):
        return NotImplemented

    def swap(value: Any) -> Any:
        return replaced.get(id(value), value)

    return func(*map(swap, args), **{name: swap(value) for name, value in kwargs.items()})


def cat(session: Session, func: Any, args: Any, kwargs: Any) -> Any:
    """Handle ``cat`` and ``stack`` of activations and repeated parameters, as class tokens are."""
    given, dim = list(args[0]), kwargs.get("dim", args[1] if len(args) > 1 else 0)
    if kwargs.keys() - {"dim"} or not isinstance(dim, int):
        return NotImplemented
    rank, along = given[0].dim(), func.__name__ != "stack"
    places = {session.layout(t) for t in given if not session.shared(t)}
    if len(places) != 1 or (layout := places.pop()) is None or (along and layout.dim == dim % rank):
        return NotImplemented
    for i, t in enumerate(given):
        if session.shared(t) and t.requires_grad:
            given[i] = _repeat(session, t, layout, rank)
            if given[i] is None:
                return NotImplemented
    return func(given, dim)


def setitem(session: Session, func: Any, args: Any, kwargs: Any) -> Any:
    """Handle ``activations[...] = parameter``."""
    target, index, value = args
    if session.shared(target) or not session.shared(value):
        return NotImplemented
    with session:
        part = target[index]
    layout = session.layout(part)
    if layout is None or value.dim() > part.dim():
        return NotImplemented
    each = _repeat(session, value, layout, part.dim())
    return NotImplemented if each is None else func(target, index, each)


def repeat(session: Session, func: Any, args: Any, kwargs: Any) -> Any:
    """Handle ``parameter.repeat(batch, 1, ...)`` and its like: remember of what it is a copy."""
    parameter, result = args[0], func(*args, **kwargs)
    own = [1] * (result.dim() - parameter.dim()) + list(parameter.shape)
    whole = len(own) == result.dim() and all(a in (1, b) for a, b in zip(own, result.shape, strict=True))
    weight = session.weight(parameter) if whole else None
    if weight is not None and result.requires_grad:
        session.remember(result, Repeated(weight, weight.tensor))
    return result


def spread(session: Session, t: Tensor, layout: Layout) -> Tensor | None:
    """Return a tensor of this layout, so that what each example adds to its gradient is known; else None."""
    if not t.requires_grad:
        return t
    if session.shared(t):
        return _repeat(session, t, layout, t.dim())
    return t if session.layout(t) == layout else None


def _aligned(session: Session, t: Tensor, rank: int) -> Layout | None:
    layout = session.layout(t)
    return None if layout is None else replace(layout, dim=layout.dim + rank - t.dim())


def _repeat(session: Session, t: Tensor, layout: Layout, rank: int) -> Tensor | None:
    """Return what every example meets of a tensor, repeated for each; None if it is nothing that can be accounted."""
    source = session.source(t)
    own = [1] * (rank - t.dim()) + list(t.shape)
    place = layout.dim - (rank - t.dim())  # of the examples, in t
    if own[layout.dim] not in (1, layout.size):
        return None
    if source is None:
        value = t
        if place >= 0 and own[layout.dim] == layout.size > 1 and t.stride(place) == 0:
            with session:
                value = t.narrow(place, 0, 1)  # of an expanded one
        weight = session.weight(value)
        if weight is None:
            return None
        source = Repeated(weight, value)
    if place >= 0 and layout.size > 1 and source.value.dim() == t.dim() and source.value.shape[place] == layout.size:
        if isinstance(layout, Picked):
            return None
        inside, indices = replace(layout, dim=place), source.indices
        if indices is None:
            return OwnRows(session, [source.weight], inside)(source.value)
        if place == t.dim() - 1:
            return None
        return Embedding(session, source.weight, inside, source.padding_idx)(indices, source.weight.tensor)
    own[layout.dim] = layout.size
    return Broadcast(session, source, layout, own)(source.value)
