"""Linear layers, and matrix products with a parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memloc_ext.accounting.backward_pass import ParameterView
from memloc_ext.accounting.contributions import LinearContribution, Rows
from memloc_ext.accounting.example_axis import ExampleAxis
from memloc_ext.accounting.layers.contraction import product
from memloc_ext.accounting.layers.layer_function import LayerFunction, autocast_dtype
from memloc_ext.accounting.tracer import Tracer


class Linear(LayerFunction):
    """``input @ weight.T + bias``.

    Args:
        weights: Of input, weight and bias.
        dtype: That the product is computed in.
        transposed: The weight is ``[in, out]``.
    """

    def __init__(
        self,
        tracer: Tracer,
        weights: Sequence[ParameterView | None],
        axis: ExampleAxis,
        dtype: torch.dtype,
        transposed: bool = False,
    ) -> None:
        super().__init__(tracer, weights, axis)
        self.dtype, self.transposed = dtype, transposed

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        x, w = input.to(self.dtype), weight.to(self.dtype)
        b = None if bias is None else bias.to(self.dtype)
        out = _product(x, w if self.transposed else w.t(), b)
        return out, (x if self.weights[1] else None, w if input.requires_grad else None)

    def backward(self, saved: Any, needs: Sequence[bool], grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w = saved
        grad_input = grad_weight = grad_bias = None
        if needs[0]:
            grad_input = grad @ (w.t() if self.transposed else w)
        g, bias = self.examples(grad), None
        if needs[2]:
            bias = Rows(g.sum(tuple(range(1, g.dim() - 1))) if g.dim() > 2 else g)
            grad_bias = self.record(2, bias)
        if needs[1]:
            first = self.examples(x)
            contribution = LinearContribution(g, first) if self.transposed else LinearContribution(first, g, bias)
            grad_weight = self.record(1, contribution)
        return grad_input, grad_weight, grad_bias


def _product(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """Return ``x @ w + b``, not as a view, which could not be written to in place behind an autograd function."""
    if b is None or x.dim() == 2:
        return F.linear(x, w.t(), b)
    rows, out = math.prod(x.shape[:-1]), x.new_empty(*x.shape[:-1], w.shape[1])
    torch.addmm(b, x.reshape(rows, x.shape[-1]), w, out=out.view(rows, w.shape[1]))
    return out


def linear(tracer: Tracer, func: Any, args: Any, kwargs: Any) -> Any:
    """Handle `torch.nn.functional.linear`."""
    input, weight, bias = _bind(("input", "weight", "bias"), args, kwargs)
    return _run(tracer, input, weight, bias)


def matmul(tracer: Tracer, func: Any, args: Any, kwargs: Any) -> Any:
    """Handle the product of activations with a parameter, as ``[in, out]``."""
    if len(args) != 2 or kwargs:
        return NotImplemented
    input, weight = reversed(args) if func.__name__ == "__rmatmul__" else args
    if weight.dim() != 2 or tracer.shared(input):
        return product(tracer, input, weight)
    return _run(tracer, input, weight, None, transposed=True)


def addmm(tracer: Tracer, func: Any, args: Any, kwargs: Any) -> Any:
    """Handle ``bias + input @ weight`` with a weight ``[in, out]``."""
    if len(args) != 3 or kwargs or args[0].dim() != 1:
        return NotImplemented
    bias, input, weight = args
    return _run(tracer, input, weight, bias, transposed=True)


def _run(tracer: Tracer, input: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool = False) -> Any:
    axis = tracer.axis(input)
    if axis is None or weight.dim() != 2 or axis.dim >= input.dim() - 1:
        return NotImplemented
    weights = tracer.weights(weight)
    if weights is None:
        return NotImplemented
    shift = tracer.weights(bias)
    outputs = weight.shape[1:] if transposed else weight.shape[:1]
    if shift is None or (bias is not None and bias.shape != outputs):
        return _run(tracer, input, weight, None, transposed) + bias
    layer = Linear(tracer, [None, *weights, *shift], axis, autocast_dtype(input), transposed)
    return layer(input, weight, bias)


def bilinear(tracer: Tracer, func: Any, args: Any, kwargs: Any) -> Any:
    """Handle `torch.nn.functional.bilinear`: a linear layer of the products of two inputs."""
    first, second, weight, bias = _bind(("input1", "input2", "weight", "bias"), args, kwargs)
    with tracer:
        return F.linear((first[..., None] * second[..., None, :]).flatten(-2), weight.flatten(1), bias)


def _bind(names: Sequence[str], args: Any, kwargs: Any) -> list[Any]:
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]
