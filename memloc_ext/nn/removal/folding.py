"""Multiply weights in place of activations: how a factor on a tensor of a recorded pass goes into parameters."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from memloc_ext.nn.removal.recording import Step, Tie, Value, aten

Factors = list[tuple[Value, Tensor]]
"""Parameters and buffers, each with what it is to be multiplied by."""


class ScaleFolding:
    """Looks for the parameters, of some, that a factor can go into."""

    def __init__(self, parameters: Collection[Value]) -> None:
        self._parameters = parameters

    def fold(self, site: Value, factor: Tensor) -> Factors | None:
        """Return what a factor is folded into that a single step multiplies a value by; None if that is not possible.

        The parameters of the steps that read the product, else of those that made the value.
        """
        if len(site.uses) != 1:
            return None
        (step,) = site.uses
        (value,), (product,) = (v for v in step.inputs if v is not site), step.results
        whole = factor.double().expand(value.shape)
        found = self._into_readers(product, whole)
        return self._into_makers(value, whole) if found is None else found

    def _into_readers(self, value: Value, scale: Tensor) -> Factors | None:
        """Multiply what is read, in the steps that read it."""
        found: Factors = []
        if value.opaque or not value.uses:
            return None
        for step in value.uses:
            taken = self._into_reader(step, value, scale)
            if taken is None:
                return None
            found += taken
        return found

    def _into_reader(self, step: Step, value: Value, scale: Tensor) -> Factors | None:
        if step.inputs.count(value) > 1:
            return None
        packet = step.operator.overloadpacket
        if step.positions is not None:
            results = step.run(lambda v: scale.contiguous() if v is value else scale.new_ones(v.shape))
        elif packet is aten.mul:
            results = [scale.expand(step.results[0].shape)] if scale.dim() else [scale]
        elif len(step.inputs) == 1:
            found = _through(step, scale)
            results = None if found is None else [found]
        else:
            return self._contracted(step, value, scale)
        if results is None:
            return None
        every: Factors = []
        for result, own in zip(step.results, results, strict=False):  # the others are numbers of elements
            taken = self._into_readers(result, own)
            if taken is None:
                return None
            every += taken
        return every

    def _contracted(self, step: Step, value: Value, scale: Tensor) -> Factors | None:
        """Multiply the other factor of a product, along the dimension that it sums over."""
        for tie in step.ties:
            places = dict(tie.places)
            if tie.contracted and value in places:
                vector = _vector(scale, places.pop(value))
                ((other, dim),) = places.items()
                return None if vector is None else self._into_makers(other, _along(vector, other, dim))
        return None

    def _into_makers(self, value: Value, scale: Tensor) -> Factors | None:
        """Multiply a value that one step reads, where it is made."""
        step = value.made
        if value.opaque or len(value.uses) > 1:
            return None
        if step is None:
            return [(value, scale)] if value in self._parameters else None
        packet = step.operator.overloadpacket
        if step.positions is not None:
            return self._moved(step, scale)
        if packet in (aten.add, aten.sub):
            return self._every(step, scale)
        if packet is aten.mul:
            shaped = [(v, _shrunk(scale, v.shape)) for v in step.inputs]
            taken = (self._into_makers(v, own) for v, own in shaped if own is not None)
            return next((found for found in taken if found is not None), None)
        if len(step.inputs) == 1 and value is step.results[0] and not any(other.uses for other in step.results[1:]):
            (x,) = step.inputs
            before = _pulled(step, scale)
            return None if before is None else self._into_makers(x, before)
        return self._filters(step, value, scale)

    def _moved(self, step: Step, scale: Tensor) -> Factors | None:
        if len(step.inputs) > 1 or len(step.results) > 1 or step.positions is None:
            return None
        (x,), (positions,) = step.inputs, step.positions
        before = torch.ones(x.tensor.numel(), dtype=scale.dtype)
        before[positions.flatten()] = scale.flatten()
        same = torch.equal(before[positions], scale)  # an element may be in several places
        return self._into_makers(x, before.view(x.shape)) if same else None

    def _every(self, step: Step, scale: Tensor) -> Factors | None:
        found: Factors = []
        for value in step.inputs:
            own = _shrunk(scale, value.shape)
            taken = None if own is None else self._into_makers(value, own)
            if taken is None:
                return None
            found += taken
        return found

    def _filters(self, step: Step, value: Value, scale: Tensor) -> Factors | None:
        """Multiply the filters of a product, and its biases, along the dimension of its results."""
        for tie in step.ties:
            places = dict(tie.places)
            dim = places.pop(value, None)
            vector = None if tie.contracted or dim is None else _vector(scale, dim)
            if vector is None or len(step.inputs) < 2:
                continue
            weights = [v for v in places if v is not step.inputs[0]]
            if not weights:
                continue
            taken = [self._into_makers(v, _along(vector, v, places[v])) for v in weights]
            if all(found is not None for found in taken):
                return [factor for found in taken if found is not None for factor in found]
        return None


def _through(step: Step, scale: Tensor) -> Tensor | None:
    """Return by what an operator of one tensor multiplies its first result if the tensor is multiplied."""
    tie = _scaled_tie(step, scale)
    if tie is None:
        return None
    (x,), result = step.inputs, step.results[0]
    places = dict(tie.places)
    vector = _vector(scale, places[x])
    assert vector is not None
    after = _along(vector, result, places[result])
    return after if _multiplies(step, scale, after) else None


def _pulled(step: Step, scale: Tensor) -> Tensor | None:
    """Return what an operator's one tensor is to be multiplied by so that its result is."""
    (x,), result = step.inputs, step.results[0]
    for tie in step.ties:
        places = dict(tie.places)
        vector = _vector(scale, places[result])
        if vector is not None:
            before = _along(vector, x, places[x])
            if _multiplies(step, before, scale):
                return before
    return None


def _scaled_tie(step: Step, scale: Tensor) -> Tie | None:
    (x,) = step.inputs
    return next((tie for tie in step.ties if _vector(scale, dict(tie.places)[x]) is not None), None)


def _multiplies(step: Step, before: Tensor, after: Tensor) -> bool:
    normal = torch.randn(before.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for size in (1e-4, 1.0, 1e4):  # a clamp multiplies what is inside of its limits
        plain, scaled = (step.run(lambda _, x=x: x)[0] for x in (size * normal, size * normal * before))
        if not plain.is_floating_point():
            return False
        if not torch.allclose(plain.double() * after, scaled.double(), rtol=1e-9, atol=1e-8 * size):
            return False
    return True


def _vector(scale: Tensor, dim: int) -> Tensor | None:
    """Return what a scale is along a dimension; None if it is not the same along all others."""
    rows = scale.unsqueeze(-1).transpose(0, dim).flatten(1)
    return rows[:, 0] if rows.numel() and bool((rows == rows[:, :1]).all()) else None


def _along(vector: Tensor, value: Value, dim: int) -> Tensor:
    sized = [1] * len(value.shape)
    sized[dim] = -1
    return vector.view(sized).expand(value.shape)


def _shrunk(scale: Tensor, shape: torch.Size) -> Tensor | None:
    """Return a scale for a tensor that is broadcast; None if it differs where that is."""
    own = scale
    while own.dim() > len(shape):
        own = own[0]
    for dim, size in enumerate(shape):
        if size == 1:
            own = own.narrow(dim, 0, 1)
    return own if torch.equal(own.expand(scale.shape), scale) else None
