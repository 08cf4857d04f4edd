"""Products with parameters of more dimensions, as a matrix for each head or expert, and ``einsum``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from memloc_ext import ops
from memloc_ext.accounting.contributions import Contribution, scaled
from memloc_ext.accounting.layers.elementwise import spread
from memloc_ext.accounting.layers.layer_function import Forward, Gradients, Product
from memloc_ext.accounting.tracer import Tracer

_LEAD = "abcdefghijklmnopqrstuvw"


class BatchedLinear(Product):
    """``[experts, rows, in] @ [experts, in, out]``; the examples are among the rows."""

    def forward(self, input: Tensor, weight: Tensor) -> Forward:
        x, w = self.cast(input, weight)
        return x @ w, (x, w)

    def backward(self, saved: Any, needs: Sequence[bool], grad: Tensor) -> Gradients:
        x, w = saved
        grad_weight = self.record(1, BatchedLinearContribution(self._rows(x), self._rows(grad))) if needs[1] else None
        return grad @ w.mT if needs[0] else None, grad_weight

    def _rows(self, t: Tensor) -> Tensor:
        """Return ``[batch, experts, rows, *]``."""
        first = self.examples(t)
        return first.reshape(*first.shape[:2], -1, first.shape[-1])


class BatchedLinearContribution(Contribution):
    """Matrices ``[experts, in, out]``, each of a linear layer of its own.

    Args:
        input: ``[batch, experts, rows, in]``.
        grad_output: ``[batch, experts, rows, out]``, of the same dtype.
    """

    def __init__(self, input: Tensor, grad_output: Tensor) -> None:
        super().__init__(len(input), torch.Size((input.shape[1], input.shape[-1], grad_output.shape[-1])), input)
        self.input, self.grad_output = input, grad_output

    def gradients(self, begin: int, end: int) -> Tensor:
        x, g = (t[begin:end].to(self.dtype) for t in (self.input, self.grad_output))
        return x.mT @ g

    def total(self, factors: Tensor | None = None) -> Tensor:
        x, g = self.input, self.grad_output
        if factors is not None:
            x, g = x.to(self.dtype), scaled(g.to(self.dtype), factors)
        x, g = (t.transpose(0, 1).flatten(1, 2) for t in (x, g))
        return x.mT @ g

    def sqnorm(self) -> Tensor:
        norms = ops.linear_grad_sqnorm(self.input.flatten(0, 1), self.grad_output.flatten(0, 1))
        return norms.reshape(self.batch, self.shape[0]).sum(1)


def contract(tracer: Tracer, x: Tensor, w: Tensor, letters: tuple[str, str, str]) -> Any:
    """Return the sum over products of activations and a parameter, for the letters of both and of the result."""
    own, given, result = letters
    axis = tracer.axis(x)
    free, rows = [a for a in given if a not in own], [a for a in own if a not in given]
    if axis is None or not x.numel() or len({*own}) < len(own) or len({*given}) < len(given):
        return NotImplemented
    if any(x.shape[own.index(a)] != w.shape[given.index(a)] for a in own if a in given):
        return NotImplemented  # a size of 1 is repeated
    axis = axis.prefer_dim(own.index(rows[0]), x) if rows else axis
    if (letter := own[axis.dim]) in given:  # rows for each example, as positions are that were repeated
        each = spread(tracer, w, replace(axis, dim=given.index(letter)))
        if each is None:
            return NotImplemented
        with tracer:
            return torch.einsum(f"{own},{given}->{result}", x, each)
    batched = [a for a in given if a in own and a in result]
    summed = [a for a in given if a in own and a not in result]
    if sorted([*batched, *free, *rows]) != sorted(result):
        return NotImplemented  # sums over one of the two alone, or diagonals
    size = dict(zip(own + given, (*x.shape, *w.shape), strict=True))
    experts, inner, columns = (math.prod(size[a] for a in part) for part in (batched, summed, free))
    with tracer:
        x = x.permute([own.index(a) for a in (*batched, *rows, *summed)])
        w = w.permute([given.index(a) for a in (*batched, *summed, *free)])
        x = x.flatten(-len(summed)) if summed else x.unsqueeze(-1)
        if batched:
            x = x.flatten(len(batched), -2).flatten(0, len(batched) - 1)
            out = torch.bmm(x, w.reshape(experts, inner, columns))
            out = out.unflatten(1, [size[a] for a in rows]).unflatten(0, [size[a] for a in batched])
        else:
            out = x @ w.reshape(inner, columns)
        out = out.unflatten(-1, [size[a] for a in free]) if free else out.squeeze(-1)
        order = [*batched, *rows, *free]
        return out.permute([order.index(a) for a in result])


def product(tracer: Tracer, first: Tensor, second: Tensor) -> Any:
    """Return ``first @ second``, one of which is a parameter."""
    shared = tracer.shared(first)
    x, w = (second, first) if shared else (first, second)
    if shared == tracer.shared(second) or x.dim() < 2 or not w.dim():
        return NotImplemented
    inner, kept, free = "xyz"
    lead = _LEAD[: max(x.dim(), w.dim()) - 2]
    own, given = lead[len(lead) - x.dim() + 2 :], lead[len(lead) - max(0, w.dim() - 2) :]
    for a in set(own) & set(given):
        if x.shape[own.index(a)] != w.shape[given.index(a)]:  # one is repeated
            with tracer:
                if w.shape[given.index(a)] == 1:
                    w, given = w.squeeze(given.index(a)), given.replace(a, "")
                else:
                    x, own = x.squeeze(own.index(a)), own.replace(a, "")
    matrix, free = ("", "") if w.dim() == 1 else (free + inner if shared else inner + free, free)
    given = given + matrix if matrix else inner
    own, result = (own + inner + kept, lead + free + kept) if shared else (own + kept + inner, lead + kept + free)
    return contract(tracer, x, w, (own, given, result))


def bmm(tracer: Tracer, func: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Handle `torch.bmm` with a matrix for each expert."""
    if len(args) != 2 or kwargs:
        return NotImplemented
    x, w = args
    axis = tracer.axis(x)
    axis = axis and axis.prefer_dim(1, x)
    if axis is None or axis.dim != 1 or not x.numel():
        return product(tracer, x, w)
    return BatchedLinear.handle(tracer, axis, (x, w))


def grouped(tracer: Tracer, func: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Handle `torch.nn.functional.grouped_mm`: rows for one expert behind those for the other."""
    ends, plain = kwargs.get("offs"), all(value is None for name, value in kwargs.items() if name != "offs")
    if len(args) != 2 or ends is None or not plain:
        return NotImplemented
    x, w = args
    axis = tracer.axis(x)
    if axis is None or axis.dim or x.dim() != 2 or w.dim() != 3:
        return NotImplemented
    ends, out = [0, *ends.tolist()], []
    with tracer:
        for i, (begin, end) in enumerate(pairwise(ends)):
            out.append(x[begin:end] @ w[i])
    out = torch.cat([*out, x.new_zeros(len(x) - ends[-1], w.shape[-1])])
    tracer.remember(out, axis)
    return out


def einsum(tracer: Tracer, func: Any, /, equation: Any, *given: Any) -> Any:
    """Handle `torch.einsum` of activations and a parameter."""
    if len(given) == 1 and not isinstance(given[0], Tensor):
        given = tuple(given[0])
    if not isinstance(equation, str) or len(given) != 2 or "->" not in equation or "." in equation:
        return NotImplemented
    inputs, result = equation.replace(" ", "").split("->")
    first, second = inputs.split(",")
    a, b = given
    if tracer.shared(a) == tracer.shared(b):
        return NotImplemented
    if tracer.shared(a):
        return contract(tracer, b, a, (second, first, result))
    return contract(tracer, a, b, (first, second, result))
