"""One forward pass as a list of ATen operators, each of which says how the indices of its tensors belong together.

Normalisations are recorded as the sums and products they are made of. Operators work element by element, multiply
matrices or convolve, move elements, or have one tensor and are tried on a slice of it. Of any other operator every
index is needed, so that what is not known here is right too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._decomp import decomposition_table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
Flags = list[NDArray[np.bool_]]
"""For each dimension of a tensor, a flag per index."""
Place = tuple["Value", int]
"""A tensor and one of its dimensions."""
_SPLIT = (
    aten.addmm,
    aten.baddbmm,
    aten.native_batch_norm,
    aten._native_batch_norm_legit_no_training,
    aten.cudnn_batch_norm,
    aten._batch_norm_no_update,
    aten.native_layer_norm,
    aten.native_group_norm,
    aten._prelu_kernel,
)
"""Operators that are recorded as the operators they are made of."""
_COPIES = (aten.clone, aten._unsafe_view, aten.cat)
"""Operators that only move elements, besides views."""
_NO_MOVE = (aten.as_strided, aten._reshape_alias)
"""Views of memory, not of indices."""


class Value:
    """A tensor of a recorded pass.

    Attributes:
        tensor: As it was in the pass, but for what worked in place later.
        shape: Of the tensor when the value was made.
        keep: Which indices have to stay.
        zero: Which indices are 0 for any input.
        uses: The steps that read it.
        made: The step that returned it; None for parameters, buffers and inputs.
        opaque: Whether all of its indices have to stay, and nothing is known of its elements.
    """

    def __init__(self, tensor: Tensor, made: Step | None = None) -> None:
        self.tensor, self.shape, self.made, self.opaque = tensor, tensor.shape, made, False
        self.keep: Flags = [np.zeros(size, bool) for size in tensor.shape]
        self.zero: Flags = [np.zeros(size, bool) for size in tensor.shape]
        self.uses: list[Step] = []


@dataclass(frozen=True)
class Tie:
    """Dimensions with the same indices; ``contracted``: those that a product sums over."""

    places: tuple[Place, ...]
    contracted: bool = False


@dataclass(eq=False)
class Step:
    """A call of an operator, with a `Value` in the place of each tensor."""

    operator: Any
    args: Any
    kwargs: Any
    results: list[Value] = field(default_factory=list)

    @cached_property
    def inputs(self) -> list[Value]:
        """The tensors that it reads."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Value)]

    def run(self, change: Callable[[Value], Tensor]) -> list[Tensor]:
        """Return the tensors that the operator makes of others."""
        args, kwargs = tree_map(lambda v: change(v) if isinstance(v, Value) else v, (self.args, self.kwargs))
        return [t for t in tree_leaves(self.operator(*args, **kwargs)) if isinstance(t, Tensor)]

    @cached_property
    def positions(self) -> list[Tensor] | None:
        """For each result, the number of the element of the inputs at each place, if elements are only moved."""
        packet, returns = self.operator.overloadpacket, self.operator._schema.returns
        view = bool(returns) and returns[0].alias_info is not None and not self.operator._schema.is_mutable
        kinds = {value.tensor.dtype for value in (*self.inputs, *self.results)}
        if not self.inputs or packet in _NO_MOVE or not (view or packet in _COPIES) or len(kinds) > 1:
            return None
        numbers, first = dict[Value, Tensor](), 0
        for value in self.inputs:
            size = value.tensor.numel()
            numbers[value] = torch.arange(first, first + size).view(value.shape)
            first += size
        found = self.run(numbers.__getitem__)
        if any(moved.dtype != torch.int64 for moved in found):
            return None
        read = torch.zeros(first, dtype=torch.bool)
        for moved in found:
            read[moved.flatten()] = True
        return found if bool(read.all()) else None  # a part that is not read may be read by another number

    @cached_property
    def ties(self) -> list[Tie]:
        """How the indices of its tensors belong together, if elements are not only moved."""
        packet = self.operator.overloadpacket
        if self.pointwise:
            return list(self._pointwise())
        if packet in (aten.mm, aten.bmm):
            (left, right), (result,) = self.inputs, self.results
            batch = [Tie(((left, 0), (right, 0), (result, 0)))] if packet is aten.bmm else []
            n = len(batch)
            rows, columns = Tie(((left, n), (result, n))), Tie(((right, n + 1), (result, n + 1)))
            return [*batch, rows, columns, Tie(((left, n + 1), (right, n)), contracted=True)]
        if packet is aten.convolution:
            return self._convolution()
        return self._tried() if len(self.inputs) == 1 else []

    @property
    def pointwise(self) -> bool:
        """Whether it is one element by element."""
        return torch.Tag.pointwise in self.operator.tags and len(self.results) == 1

    def _pointwise(self) -> Iterator[Tie]:
        (result,) = self.results
        for dim in range(-len(result.shape), 0):
            same = [v for v in self.inputs if len(v.shape) >= -dim and v.shape[dim] == result.shape[dim]]
            yield Tie(tuple((v, len(v.shape) + dim) for v in (*same, result)))

    def _convolution(self) -> list[Tie]:
        x, weight, bias, *_, transposed, _, groups = self.args
        (result,) = self.results
        biases = [(bias, 0)] if bias is not None else []
        examples = Tie(((x, 0), (result, 0)))
        if groups == 1:
            into, out = (0, 1) if transposed else (1, 0)
            outputs = Tie(((weight, out), (result, 1), *biases))
            return [examples, outputs, Tie(((x, 1), (weight, into)), contracted=True)]
        if groups == x.shape[1] == result.shape[1]:  # a filter for each channel
            return [examples, Tie(((x, 1), (weight, 0), (result, 1), *biases))]
        return [examples]

    def _tried(self) -> list[Tie]:
        """Return the dimensions of which a slice of the input gives the same slice of the results."""
        (x,) = self.inputs
        if not x.tensor.is_floating_point():
            return []
        sample = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        ties, whole = [], self._attempted(sample)
        for dim, size in enumerate(x.shape):
            part = torch.arange(0, size, 2)
            found = self._attempted(sample.index_select(dim, part)) if size > 1 else None
            if whole is None or found is None or len(found) != len(whole):  # a smaller tensor has fewer parts
                continue
            places = [(x, dim)]
            for value, before, after in zip(self.results, whole, found, strict=True):
                same = (d for d, n in enumerate(before.shape) if n == size and _same(before, after, d, part))
                place = next(same, None)
                if place is not None:
                    places.append((value, place))
            if len(places) == 1 + len(self.results):
                ties.append(Tie(tuple(places)))
        return ties

    def _attempted(self, sample: Tensor) -> list[Tensor] | None:
        try:
            return self.run(lambda _: sample.clone())  # it may work in place
        except (RuntimeError, IndexError, TypeError, ValueError):  # it wants another shape or dtype
            return None


class Recorder(TorchDispatchMode):
    """Records the operators that run inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self._values: dict[int, Value] = {}
        self._stored: dict[int, list[Value]] = {}

    def value(self, tensor: Tensor) -> Value:
        """Return what stands for a tensor."""
        if id(tensor) not in self._values:
            self._add(Value(tensor))
        return self._values[id(tensor)]

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and record it."""
        kwargs = kwargs or {}
        with self:
            if operator.overloadpacket in _SPLIT and operator in decomposition_table:
                return decomposition_table[operator](*args, **kwargs)
            parts = operator.decompose(*args, **kwargs)  # of an operator that is composed of others
        if parts is not NotImplemented:
            return parts
        read = tree_map(lambda t: self.value(t) if isinstance(t, Tensor) else t, (args, kwargs))
        step = Step(operator, *read)
        result = operator(*args, **kwargs)
        for value in step.inputs:
            value.uses.append(step)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                old, new = self._values.get(id(tensor)), Value(tensor, step)
                if old is not None:  # changed in place
                    others = [v for v in self._stored[_storage(tensor)] if v.tensor is not tensor]
                    for value in (*others, *([old, new] if others else [])):
                        value.opaque = True
                self._add(new)
                step.results.append(new)
        self.steps.append(step)
        return result

    def close(self, own: Sequence[Value], outputs: Sequence[Tensor]) -> None:
        """End the recording: what the pass returned has to stay as it is, and what it read besides the model's own."""
        alive = {self.value(tensor) for tensor in outputs}
        for value in alive:
            value.opaque = True
        for step in reversed(self.steps):
            if alive.isdisjoint(step.results):
                for value in step.inputs:
                    value.uses.remove(step)
            else:
                alive.update(step.inputs)
        self.steps = [step for step in self.steps if not alive.isdisjoint(step.results)]
        for value in {value for step in self.steps for value in step.inputs if value.made is None}.difference(own):
            value.opaque = True

    def _add(self, value: Value) -> None:
        self._values[id(value.tensor)] = value
        self._stored.setdefault(_storage(value.tensor), []).append(value)


def _same(before: Tensor, after: Tensor, dim: int, part: Tensor) -> bool:
    expected = before.index_select(dim, part)
    return expected.shape == after.shape and torch.allclose(expected.double(), after.double(), equal_nan=True)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
