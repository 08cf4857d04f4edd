"""An MLP in which each run of rows computes the hidden channels that it keeps, wherever the lists of them come from.

Channels that all rows keep are a slice of the weights: dense products over all rows. Each run of rows has products with
the rows of the weights that it alone keeps. Other channels are never computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from memloc_ext.ops._checks import result_dtype
from memloc_ext.ops.kept_products import Kept, add_kept_input_, add_kept_weight_, kept_linear

_aten = torch.ops.aten

RUN_ROWS = 24
"""Rows of a run whose products take as long as reading the weights that it keeps, and adding up their gradients."""
ROWS = 96
"""Rows of the batch whose products take as long as turning ``w_out`` and its gradient over, and clearing gradients."""


class Activation(NamedTuple):
    """A function of a value, and its gradient from that of the result and the value."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS = {
    "relu": Activation(F.relu, lambda grad, x: _aten.threshold_backward(grad, x, 0)),
    "gelu": Activation(F.gelu, _aten.gelu_backward),
    "gelu_tanh": Activation(
        lambda x: F.gelu(x, approximate="tanh"), lambda grad, x: _aten.gelu_backward(grad, x, approximate="tanh")
    ),
    "silu": Activation(F.silu, _aten.silu_backward),
}


class Weights(NamedTuple):
    """The weights of an MLP; those of the gate may be None."""

    w_in: Tensor
    b_in: Tensor | None
    w_out: Tensor
    b_out: Tensor | None
    w_gate: Tensor | None = None
    b_gate: Tensor | None = None

    @property
    def first(self) -> list[tuple[Tensor, Tensor | None]]:
        """Weight and bias of the first layers: the gate's, if there is one, and those of ``w_in``."""
        own = (self.w_in, self.b_in)
        return [own] if self.w_gate is None else [(self.w_gate, self.b_gate), own]


class Plan(NamedTuple):
    """How the rows of a batch are computed.

    ``shared`` channels are computed for all rows, the first ones; those behind them for the runs that keep them. If all
    are shared, because dense products cost less, ``dropout`` zeroes what is not kept.
    """

    dropout: Callable[[Tensor], Tensor]
    shared: int
    kept: Kept | None


def keeping_is_cheaper(rows: int, runs: int, shared: int, own: float, h: int) -> bool:
    """Return whether runs that keep ``own`` channels each, beside the shared ones, take less time than all ``h`` do."""
    return shared * rows + own * (rows + RUN_ROWS * runs) + ROWS * (h - shared) < h * rows


def composition(x: Tensor, weights: Weights, activation: str, dropout: Callable[[Tensor], Tensor]) -> Tensor:
    """Run the MLP in dense products, with a function between them that zeroes hidden channels."""
    values = [F.linear(x, w, b) for w, b in weights.first]
    hidden = ACTIVATIONS[activation].forward(values[0])
    for value in values[1:]:
        hidden = hidden * value
    return F.linear(dropout(hidden), weights.w_out, weights.b_out)


def _activate(values: list[Tensor], activation: str) -> Tensor:
    hidden = ACTIVATIONS[activation].forward(values[0])
    return hidden.mul_(values[1]) if len(values) > 1 else hidden


def _activate_backward(grad: Tensor, values: list[Tensor], activation: str) -> list[Tensor]:
    forward, backward = ACTIVATIONS[activation]
    if len(values) == 1:
        return [backward(grad, values[0])]
    return [backward(grad * values[1], values[0]), grad * forward(values[0])]


def forward(rows: Tensor, weights: Weights, activation: str, plan: Plan) -> tuple[Tensor, list[Tensor]]:
    """Return the output ``[rows, o]``, and the values that `backward` needs: of shared channels, then of the runs' own.

    Each part has the values of the first layers, in their order, and the hidden ones that come from them.
    """
    g, kept = plan.shared, plan.kept
    shared = [F.linear(rows, w[:g], None if b is None else b[:g]) for w, b in weights.first]
    hidden = _activate(shared, activation)
    if kept is None:
        hidden = plan.dropout(hidden)
    y = F.linear(hidden, weights.w_out[:, :g], weights.b_out)
    if kept is None:
        return y, [*shared, hidden]
    own = [kept_linear(rows, w[g:], None if b is None else b[g:], kept) for w, b in weights.first]
    own_hidden = _activate(own, activation)
    add_kept_input_(y, own_hidden, _turned(weights.w_out[:, g:]), kept)
    return y, [*shared, hidden, *own, own_hidden]


def backward(
    grad: Tensor,
    rows: Tensor,
    weights: Weights,
    values: list[Tensor],
    activation: str,
    plan: Plan,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradients of ``rows`` and the weights, in their order, from that of the output; None if not needed."""
    g, kept = plan.shared, plan.kept
    w_out, layers = weights.w_out, weights.first
    values_of_part = len(layers) + 1
    *shared, hidden = values[:values_of_part]
    by_hidden = grad @ w_out[:, :g]
    by_shared = _activate_backward(by_hidden if kept else plan.dropout(by_hidden), shared, activation)
    own_hidden: Tensor | None = None
    by_own: Sequence[Tensor | None] = [None] * len(layers)
    if kept is not None:
        *own, own_hidden = values[values_of_part:]
        by_own = _activate_backward(kept_linear(grad, _turned(w_out[:, g:]), None, kept), own, activation)

    def by_weight(shared: Tensor, own: Tensor | None, input: Tensor) -> Tensor:
        """Return the gradient of a weight ``[h, n]`` whose layer is given ``input [rows, n]``."""
        result = grad.new_empty(len(weights.w_in), input.shape[1])
        torch.mm(shared.t(), input, out=result[:g])
        if kept is not None and own is not None:
            dtype = result_dtype(grad)  # in which the runs' terms are added up
            sums = result[g:].zero_() if dtype == grad.dtype else torch.zeros_like(result[g:], dtype=dtype)
            add_kept_weight_(sums, own, input, kept)
            if dtype != grad.dtype:
                result[g:] = sums
        return result

    by_input = None
    if needed[0]:
        by_input = by_shared[0] @ layers[0][0][:g]
        for of_shared, (w, _) in zip(by_shared[1:], layers[1:], strict=True):
            by_input.addmm_(of_shared, w[:g])
        for of_own, (w, _) in zip(by_own, layers, strict=True):
            if kept is not None and of_own is not None:
                add_kept_input_(by_input, of_own, w[g:], kept)
    by_first = []
    ones = rows.new_ones(len(rows), 1)
    for place, shared, own in zip(((5, 6), (1, 2))[-len(layers) :], by_shared, by_own, strict=True):
        by_first.append(by_weight(shared, own, rows) if needed[place[0]] else None)
        by_first.append(by_weight(shared, own, ones)[:, 0] if needed[place[1]] else None)
    *by_gate, by_w_in, by_b_in = by_first
    by_w_out = None
    if needed[3]:
        by_w_out = _turned(by_weight(hidden, own_hidden, grad))
    by_b_out = grad.sum(0) if needed[4] else None
    return [by_input, by_w_in, by_b_in, by_w_out, by_b_out, *(by_gate or (None, None))]


def _turned(weight: Tensor) -> Tensor:
    return weight.t().contiguous()


class KeptMlp(torch.autograd.Function):
    """The MLP on rows ``[rows, d]``; second derivatives are those of dense products."""

    @staticmethod
    def forward(ctx: Any, activation: str, plan: Plan, rows: Tensor, *weights: Tensor | None) -> Tensor:
        """Take the activation, the plan, rows and the seven weights."""
        y, values = forward(rows, Weights(*weights), activation, plan)  # pyright: ignore[reportArgumentType]
        ctx.activation, ctx.plan = activation, plan
        ctx.save_for_backward(rows, *weights, *values)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        """Return the gradients of the rows and the weights."""
        inputs, values = ctx.saved_tensors[:7], list(ctx.saved_tensors[7:])
        rows, weights = inputs[0], Weights(*inputs[1:])
        needed = ctx.needs_input_grad[2:]
        with torch.autocast(grad.device.type, enabled=False):
            if not torch.is_grad_enabled():
                return None, None, *backward(grad, rows, weights, values, ctx.activation, ctx.plan, needed)
            y = composition(rows, weights, ctx.activation, ctx.plan.dropout)
            wanted = [t for t, need in zip(inputs, needed, strict=True) if need]
            found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
            return None, None, *(next(found) if need else None for need in needed)
