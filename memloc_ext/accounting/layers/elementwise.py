"""Parameters that meet activations element by element, repeated for every example: positions, scales, class tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from memloc_ext.accounting.backward_pass import Repeated
from memloc_ext.accounting.contributions import Contribution, EmbeddingContribution, Rows, accumulated
from memloc_ext.accounting.example_axis import ExampleAxis, Picked
from memloc_ext.accounting.layers.embedding import Embedding
from memloc_ext.accounting.layers.layer_function import Forward, Gradients, LayerFunction, Product
from memloc_ext.accounting.propagation import writes
from memloc_ext.accounting.tracer import Tracer
from memloc_ext.batches import tensors_of


@dataclass(eq=False, repr=False)
class Broadcast(LayerFunction):
    """A parameter, repeated for every example: the gradient of the repeated one is each example's own.

    Attributes:
        axis: Of the result.
        source: What is repeated.
        shape: Of the result.
    """

    source: Repeated
    shape: list[int]

    def forward(self, value: Tensor) -> Forward:
        return value.expand(self.shape), ()

    def backward(self, saved: Any, needs: Sequence[bool], grad: Tensor) -> Gradients:
        shape = self.source.value.shape
        own = [1] * (grad.dim() - len(shape)) + list(shape)
        rows = grad.movedim(self.axis.dim, 0)
        del own[self.axis.dim]
        repeated = [d + 1 for d, size in enumerate(own) if size == 1 and rows.shape[d + 1] != 1]
        rows = (rows.sum(repeated) if repeated else rows).reshape(len(rows), *shape)
        rows, indices = self.by_example(rows), self.source.indices
        if indices is None:
            return (self.record(0, Rows(rows)),)
        same = indices.expand(len(rows), *indices.shape)
        table = self.source.weight.tensor
        # its gradient is the table's, and the lookup passes that on itself
        self.record(0, EmbeddingContribution(same, rows, table.shape[0], self.source.padding_idx))
        backward = self.tracer.backward
        return (rows.sum(0) if backward is None or backward.wants(self.source.weight) else None,)


class OwnRows(LayerFunction):
    """A parameter with rows where the examples are: each example meets its own."""

    def forward(self, value: Tensor) -> Forward:
        return value.detach(), ()

    def backward(self, saved: Any, needs: Sequence[bool], grad: Tensor) -> Gradients:
        return (self.record(0, OwnRowsContribution(grad, self.example_axis or self.axis)),)


class OwnRowsContribution(Contribution):
    """A parameter of which each example has rows of its own, and no part in the others.

    Args:
        grad: Of the parameter, for all examples together.
        axis: Where the examples are in it.
    """

    def __init__(self, grad: Tensor, axis: ExampleAxis) -> None:
        super().__init__(axis.batch, grad.shape, grad)
        self.grad, self.axis = grad, axis

    def gradients(self, begin: int, end: int) -> Tensor:
        result = torch.zeros(end - begin, *self.shape, dtype=self.dtype, device=self.device)
        rows = self.axis.examples_first(self.grad)
        for place, b in zip(result, range(begin, end), strict=True):
            self.axis.examples_first(place)[b] = rows[b]
        return result

    def total(self, factors: Tensor | None = None) -> Tensor:
        return self.grad if factors is None else super().total(factors)

    def sqnorm(self) -> Tensor:
        return Rows(self.axis.examples_first(self.grad)).sqnorm()


def broadcast(tracer: Tracer, func: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Handle an elementwise function of activations and parameters."""
    if "out" in kwargs or any(isinstance(value, tuple | list) for value in args):
        return NotImplemented
    if writes(func.__name__) and isinstance(args[0], Tensor) and tracer.shared(args[0]):
        return NotImplemented  # what is repeated cannot be written to
    given = tensors_of((args, kwargs))
    rank = max(t.dim() for t in given)
    places = {_aligned(tracer, t, rank) for t in given if not tracer.shared(t)}
    if len(places) != 1 or (axis := places.pop()) is None:
        return NotImplemented

    replaced = {id(t): _repeat(tracer, t, axis, rank) for t in given if tracer.shared(t) and t.requires_grad}
    if any(value is None for value in replaced.values()):
        return NotImplemented

    def swap(value: Any) -> Any:
        return replaced.get(id(value), value)

    return func(*map(swap, args), **{name: swap(value) for name, value in kwargs.items()})


def cat(tracer: Tracer, func: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Handle ``cat`` and ``stack`` of activations and repeated parameters, as class tokens are."""
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    if not args or kwargs.keys() - {"dim"} or not isinstance(dim, int):
        return NotImplemented
    given = list(args[0])
    rank, along = given[0].dim(), func.__name__ != "stack"
    places = {tracer.axis(t) for t in given if not tracer.shared(t)}
    if len(places) != 1 or (axis := places.pop()) is None or (along and axis.dim == dim % rank):
        return NotImplemented
    for i, t in enumerate(given):
        if tracer.shared(t) and t.requires_grad:
            given[i] = _repeat(tracer, t, axis, rank)
            if given[i] is None:
                return NotImplemented
    return func(given, dim)


def setitem(tracer: Tracer, func: Any, /, target: Tensor, index: Any, value: Tensor) -> Any:
    """Handle ``activations[...] = parameter``."""
    if tracer.shared(target) or not tracer.shared(value):
        return NotImplemented
    with tracer:
        part = target[index]
    axis = tracer.axis(part)
    if axis is None or value.dim() > part.dim():
        return NotImplemented
    each = _repeat(tracer, value, axis, part.dim())
    return NotImplemented if each is None else func(target, index, each)


def repeat(tracer: Tracer, func: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Handle ``parameter.repeat(batch, 1, ...)`` and its like: remember of what it is a copy."""
    if not args:
        return NotImplemented
    parameter, result = args[0], func(*args, **kwargs)
    own = [1] * (result.dim() - parameter.dim()) + list(parameter.shape)
    plain = len(own) == result.dim() and all(a in (1, b) for a, b in zip(own, result.shape, strict=True))
    weight = tracer.weight(parameter) if plain else None
    if weight is not None and result.requires_grad:
        tracer.remember(result, Repeated(weight, weight.tensor))
    return result


def spread(tracer: Tracer, t: Tensor, axis: ExampleAxis) -> Tensor | None:
    """Return a tensor of this axis, so that what each example adds to its gradient is known; else None."""
    if not t.requires_grad:
        return t
    if tracer.shared(t):
        return _repeat(tracer, t, axis, t.dim())
    return t if tracer.axis(t) == axis else None


def _aligned(tracer: Tracer, t: Tensor, rank: int) -> ExampleAxis | None:
    axis = tracer.axis(t)
    return None if axis is None else replace(axis, dim=axis.dim + rank - t.dim())


def _repeat(tracer: Tracer, t: Tensor, axis: ExampleAxis, rank: int) -> Tensor | None:
    """Return what every example meets of a tensor, repeated for each; None if it is nothing that can be accounted."""
    source = tracer.source(t)
    own = [1] * (rank - t.dim()) + list(t.shape)
    place = axis.dim - (rank - t.dim())  # of the examples, in t
    if own[axis.dim] not in (1, axis.size):
        return None
    if source is None:
        value = t
        if place >= 0 and own[axis.dim] == axis.size > 1 and t.stride(place) == 0:
            with tracer:
                value = t.narrow(place, 0, 1)  # of an expanded one
        weight = tracer.weight(value)
        if weight is None:
            return None
        source = Repeated(weight, value)
    if place >= 0 and axis.size > 1 and source.value.dim() == t.dim() and source.value.shape[place] == axis.size:
        if isinstance(axis, Picked):
            return None
        inside, indices = replace(axis, dim=place), source.indices
        if indices is None:
            return OwnRows(tracer, [source.weight], inside)(source.value)
        if place == t.dim() - 1:
            return None
        return Embedding(tracer, [None, source.weight], inside, source.padding_idx)(indices, source.weight.tensor)
    own[axis.dim] = axis.size
    return Broadcast(tracer, [source.weight], axis, source, own)(source.value)


class PReLU(Product):
    """``x`` where it is positive, else ``weight * x``; one weight, or one for each channel, which is dimension 1."""

    def forward(self, input: Tensor, weight: Tensor) -> Forward:
        x, w = self.cast(input, weight)
        return torch.prelu(x, w), (x, w)

    def backward(self, saved: Any, needs: Sequence[bool], grad: Tensor) -> Gradients:
        x, weight = saved
        slope = weight.reshape([-1 if d == 1 else 1 for d in range(x.dim())]) if len(weight) > 1 else weight
        rows = (grad * x.clamp(max=0)).movedim(self.axis.dim, 0)
        if len(weight) > 1:
            rows = rows.movedim(1 if self.axis.dim == 0 else 2, 1)
        rows = rows.reshape(len(rows), len(weight), rows[0].numel() // len(weight))
        rows = rows.sum(2, dtype=accumulated(rows.dtype))
        grad_weight = self.record(1, Rows(self.by_example(rows))) if needs[1] else None
        return torch.where(x > 0, grad, grad * slope) if needs[0] else None, grad_weight


def prelu(tracer: Tracer, func: Any, /, input: Tensor, weight: Tensor) -> Any:
    """Handle `torch.nn.functional.prelu`."""
    axis = tracer.axis(input)
    axis = axis and axis.prefer_dim(0, input)
    if axis is None or not input.numel() or weight.dim() != 1 or (len(weight) > 1 and axis.dim == 1):
        return NotImplemented
    return PReLU.handle(tracer, axis, (input, weight))
