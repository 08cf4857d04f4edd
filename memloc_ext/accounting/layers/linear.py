"""Linear layers, and matrix products with a parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memloc_ext.accounting.contributions import LinearContribution, Rows
from memloc_ext.accounting.layers.contraction import product
from memloc_ext.accounting.layers.layer_function import Forward, Gradients, Product
from memloc_ext.accounting.tracer import Tracer


@dataclass(eq=False, repr=False)
class Linear(Product):
    """``input @ weight.T + bias``.

    Attributes:
        weights: Of input, weight and bias.
        transposed: The weight is ``[in, out]``.
    """

    transposed: bool = False

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Forward:
        x, w, b = self.cast(input, weight, bias)
        out = _product(x, w if self.transposed else w.t(), b)
        return out, (x if self.weights[1] else None, w if input.requires_grad else None)

    def backward(self, saved: Any, needs: Sequence[bool], grad: Tensor) -> Gradients:
        x, w = saved
        grad_input = grad_weight = grad_bias = None
        if needs[0]:
            grad_input = grad @ (w.t() if self.transposed else w)
        g, bias = self.examples(grad), None
        if needs[2]:
            bias = Rows.of_positions(g)
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


def linear(
    tracer: Tracer,
    func: Any,
    /,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    transposed: bool = False,
    **kwargs: Any,
) -> Any:
    """Handle `torch.nn.functional.linear`; ``transposed``: the weight is ``[in, out]``."""
    axis = tracer.axis(input)
    if axis is None or weight.dim() != 2 or axis.dim >= input.dim() - 1 or kwargs:
        return NotImplemented
    weights = tracer.weights(weight)
    if weights is None:
        return NotImplemented
    shift = tracer.weights(bias)
    outputs = weight.shape[1:] if transposed else weight.shape[:1]
    if shift is None or (bias is not None and bias.shape != outputs):
        return linear(tracer, func, input, weight, None, transposed) + bias
    return Linear(tracer, [None, *weights, *shift], axis, transposed)(input, weight, bias)


def matmul(tracer: Tracer, func: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Handle the product of activations with a parameter, as ``[in, out]``."""
    if len(args) != 2 or kwargs:
        return NotImplemented
    input, weight = reversed(args) if func.__name__ == "__rmatmul__" else args
    if weight.dim() != 2 or tracer.shared(input):
        return product(tracer, input, weight)
    return linear(tracer, func, input, weight, None, transposed=True)


def addmm(tracer: Tracer, func: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Handle ``bias + input @ weight`` with a weight ``[in, out]``."""
    if len(args) != 3 or kwargs or args[0].dim() != 1:
        return NotImplemented
    bias, input, weight = args
    return linear(tracer, func, input, weight, bias, transposed=True)


def bilinear(
    tracer: Tracer, func: Any, /, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Any:
    """Handle `torch.nn.functional.bilinear`: a linear layer of the products of two inputs."""
    with tracer:
        return F.linear((input1[..., None] * input2[..., None, :]).flatten(-2), weight.flatten(1), bias)
