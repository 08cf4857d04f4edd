"""What every layer function has in common, and the autograd function that it runs through."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memloc_ext.accounting.contributions import Contribution
from memloc_ext.accounting.example_axis import ExampleAxis
from memloc_ext.accounting.losses import TWICE
from memloc_ext.accounting.uses import ParameterView

if TYPE_CHECKING:
    from memloc_ext.accounting.tracer import Tracer


Forward = tuple[Tensor, tuple[Tensor | None, ...]]
"""A layer's output, and what its `LayerFunction.backward` is to be given."""
Gradients = tuple[Tensor | None, ...]
"""Of the tensors that a layer is given, in their order; None for those that need none."""


@dataclass(eq=False, repr=False)
class LayerFunction:
    """How a kind of layer runs forward and backward.

    Attributes:
        tracer: That the layer is part of.
        weights: Which of the layer's tensors are parameters, in the order of its tensors; None for the others.
        axis: Of the rows of the layer's input and output.
        given: Places of the arguments that are tensors.
        output_shape: Of the output, if there is but one and the layer has run.
    """

    tracer: Tracer
    weights: Sequence[ParameterView | None]
    axis: ExampleAxis
    given: list[int] = field(default_factory=list, init=False)
    output_shape: torch.Size | None = field(default=None, init=False)

    @classmethod
    def handle(cls, tracer: Tracer, axis: ExampleAxis, tensors: Sequence[Tensor | None], *settings: Any) -> Any:
        """Run a layer of an input and parameters; NotImplemented if one of these wants a gradient and is no parameter.

        ``settings``: what a kind of layer is made with, behind ``axis``.
        """
        weights = tracer.weights(*tensors[1:])
        return NotImplemented if weights is None else cls(tracer, [None, *weights], axis, *settings)(*tensors)

    def forward(self, *tensors: Any) -> tuple[Tensor | tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """Return the output, or several, and what `backward` is to be given."""
        raise NotImplementedError

    def backward(self, saved: Any, needs: Sequence[bool], *grads: Tensor) -> Gradients:
        """Return the gradients of the tensors that need one; those of parameters by `record`."""
        raise NotImplementedError

    def record(self, index: int, contribution: Contribution) -> Tensor | None:
        """Take note of a parameter's use and return its gradient of the batch, if parameters get gradients."""
        weight, backward = self.weights[index], self.tracer.backward
        assert weight is not None
        if backward is None:  # a backward pass that is not accounted
            self.tracer.unaccounted |= self.tracer.plain_backward
            return contribution.total().to(weight.tensor.dtype)
        return backward.record(weight, contribution)

    @property
    def example_axis(self) -> ExampleAxis | None:
        """Where the examples are, if the backward pass under way needs per-example gradients here; else None."""
        backward = self.tracer.backward
        if backward is None or not backward.per_example or not any(self.weights):
            return None
        if backward.slow and all(w is None or backward.is_slow(w) for w in self.weights):
            return None
        return backward.place(self.axis)

    def examples(self, t: Tensor) -> Tensor:
        """Return activations as ``[batch, *]``, or as one example where they are not told apart."""
        axis = self.example_axis
        return t[None] if axis is None else axis.examples_first(t)

    def by_example(self, rows: Tensor) -> Tensor:
        """Add up the rows of each example: ``[batch, *]`` from a tensor whose first dimension is the axis's."""
        axis = self.example_axis
        return rows.sum(0, keepdim=True) if axis is None else axis.summed(rows)

    def __call__(self, *tensors: Any) -> Any:
        """Run the layer, with copies in the place of what is derived from parameters."""
        self.tracer.count(self.axis, *self.weights)
        copies = {i: w.tensor for i, w in enumerate(self.weights) if w is not None and w.derived is not None}
        out = self.apply(*(copies.get(i, t) for i, t in enumerate(tensors)))
        if isinstance(out, Tensor):
            self.output_shape = out.shape
            self.tracer.remember(out, self.axis)
        return out

    def apply(self, *tensors: Any) -> Any:
        """Run the layer as it is."""
        self.given = [i for i, t in enumerate(tensors) if isinstance(t, Tensor)]
        return _Layer.apply(self, *tensors)


class Product(LayerFunction):
    """A product of the input and parameters, for which autocast has a type of its own."""

    dtype: torch.dtype

    def __call__(self, input: Tensor, *parameters: Tensor | None) -> Any:
        device, self.dtype = input.device.type, input.dtype
        if torch.is_autocast_enabled(device) and input.is_floating_point() and input.dtype != torch.float64:
            self.dtype = torch.get_autocast_dtype(device)
        return super().__call__(input, *parameters)

    def cast(self, *tensors: Tensor | None) -> list[Any]:
        """Return tensors in the type that the product is computed in."""
        return [None if t is None else t.to(self.dtype) for t in tensors]


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: LayerFunction, *tensors: Any) -> Tensor | tuple[Tensor, ...]:
        ctx.layer = layer
        device = next(t.device.type for t in tensors if t is not None)
        layer.tracer.coarse |= torch.is_autocast_enabled(device)
        with exactly(device):
            out, saved = layer.forward(*tensors)
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[1:]  # checkpointing recomputes here, to be seen
        with torch._C.DisableTorchFunction(), exactly(given[0].device.type):
            with torch.no_grad():
                detached = [None if t is None else t.detach() for t in saved]
                grads = ctx.layer.backward(detached, needs, *given)
            return (None, *(_once(grads) if torch.is_grad_enabled() else grads))


def _once(grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return gradients that raise when they are differentiated: `once_differentiable` misses those by weights."""
    raises = torch._C._functions.DelayedError(TWICE.encode(), 1)  # pyright: ignore[reportAttributeAccessIssue]
    return [None if t is None else raises(t.detach().requires_grad_()) for t in grads]


def exactly(device: str) -> contextlib.AbstractContextManager[object]:
    """Have functions compute in the types they are given; entering `torch.autocast` takes long, so only if need be."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()
