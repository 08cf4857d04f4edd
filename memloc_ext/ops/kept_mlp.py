"""An MLP in which each run of rows computes the hidden channels that it keeps, wherever the lists of them come from.

Channels that all rows keep are a slice of the weights: dense products over all rows. Each run of rows has products with
the rows of the weights that it alone keeps. Other channels are never computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from memloc_ext.ops._checks import cast_for_autocast, result_dtype
from memloc_ext.ops.kept_products import Kept, add_kept_input_, add_kept_weight_, kept_linear

_aten = torch.ops.aten

LINE = 16
"""Shared channels are a multiple of this: BLAS takes half as long again where rows begin inside of a cache line."""
RUN_ROWS = 20
"""Rows of a run whose products take as long as reading the weights that it keeps, and adding up their gradients."""
ROWS = 72
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

    Ordinary dropout zeroes hidden values with probability ``p``, by draws from ``seed``, and divides the others by
    ``1 - p``.
    """

    dropout: Callable[[Tensor], Tensor]
    shared: int
    kept: Kept | None
    p: float = 0
    seed: int = 0

    def thinned(self, values: Tensor, part: int) -> Tensor:
        """Return hidden values, or their gradients, of a part of the channels behind ordinary dropout."""
        if not self.p:
            return values
        generator = torch.Generator(values.device).manual_seed(self.seed + part)
        return values * torch.empty_like(values).bernoulli_(1 - self.p, generator=generator).div_(1 - self.p)


def keeping_is_cheaper(rows: int, runs: int, shared: int, own: float, h: int) -> bool:
    """Return whether runs that keep ``own`` channels each, beside the shared ones, take less time than all ``h`` do."""
    return shared * rows + own * (rows + RUN_ROWS * runs) + ROWS * (h - shared) < h * rows


def plan(
    dropout: Callable[[Tensor], Tensor],
    mask: Callable[[], Tensor],
    lengths: list[int],
    shared: int,
    own: float,
    h: int,
) -> Plan:
    """Return the plan of least time.

    Args:
        dropout: Zeroes what is not kept of hidden channels ``[rows, h]``; differentiable.
        mask: Returns which channels each run keeps, ``[runs, h]``, bool; called only if that is of use.
        lengths: Rows of each run.
        shared: How many channels all runs keep, the first ones.
        own: How many others a run keeps, on average.
        h: All channels.
    """
    if not keeping_is_cheaper(sum(lengths), len(lengths), shared, own, h):
        return Plan(dropout, h, None)
    shared = shared // LINE * LINE
    return Plan(dropout, shared, Kept.of(mask()[:, shared:], lengths))


def plan_of(mask: Tensor, lengths: list[int], shared: int) -> Plan:
    """Return the plan of least time for a mask ``[runs, h]``, bool; see `plan`."""

    def dropout(hidden: Tensor) -> Tensor:
        of_rows = mask.repeat_interleave(torch.tensor(lengths, device=mask.device), 0)
        return torch.where(of_rows, hidden, torch.zeros((), dtype=hidden.dtype, device=hidden.device))

    own = float(mask[:, shared:].sum()) / max(1, len(lengths))
    return plan(dropout, lambda: mask, lengths, shared, own, mask.shape[1])


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
    hidden = plan.thinned(hidden, 0)
    y = F.linear(hidden, weights.w_out[:, :g], weights.b_out)
    if kept is None:
        return y, [*shared, hidden]
    own = [kept_linear(rows, w[g:], None if b is None else b[g:].contiguous(), kept) for w, b in weights.first]
    own_hidden = plan.thinned(_activate(own, activation), 1)
    add_kept_input_(y, own_hidden, _turned(weights.w_out[:, g:]), kept)
    return y, [*shared, hidden, *own, own_hidden]


def value_grads(
    grad: Tensor, weights: Weights, values: list[Tensor], activation: str, plan: Plan
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Return the gradients of the first layers' values: of shared channels, and of the runs' own or None."""
    g, count = plan.shared, len(weights.first)
    by_hidden = plan.thinned(grad @ weights.w_out[:, :g], 0)
    by_shared = _activate_backward(by_hidden if plan.kept else plan.dropout(by_hidden), values[:count], activation)
    if plan.kept is None:
        return by_shared, None
    by_hidden = plan.thinned(kept_linear(grad, _turned(weights.w_out[:, g:]), None, plan.kept), 1)
    return by_shared, _activate_backward(by_hidden, values[count + 1 : -1], activation)


def input_grad(shared: list[Tensor], own: list[Tensor] | None, weights: Weights, plan: Plan) -> Tensor:
    """Return the gradient of the rows, given `value_grads`."""
    g, layers = plan.shared, weights.first
    result = shared[0] @ layers[0][0][:g]
    for values, (w, _) in zip(shared[1:], layers[1:], strict=True):
        result.addmm_(values, w[:g])
    for values, (w, _) in zip(own or [], layers if own else [], strict=True):
        assert plan.kept is not None
        add_kept_input_(result, values, w[g:], plan.kept)
    return result


def weight_grad(shared: Tensor, own: Tensor | None, input: Tensor, h: int, plan: Plan) -> Tensor:
    """Return the sum over all rows of values times input, ``[h, n]``: the gradient of the weight that made them.

    Args:
        shared: Values of shared channels, ``[rows, shared]``, or their gradients.
        own: Those of the runs' own channels, or None.
        input: ``[rows, n]``.
        h: Number of channels.
        plan: Which channels each run keeps.
    """
    g, result = plan.shared, shared.new_empty(h, input.shape[1])
    torch.mm(shared.t(), input, out=result[:g])
    if plan.kept is not None and own is not None:
        dtype = result_dtype(shared)  # in which the runs' terms are added up
        sums = result[g:].zero_() if dtype == shared.dtype else torch.zeros_like(result[g:], dtype=dtype)
        add_kept_weight_(sums, own, input, plan.kept)
        if dtype != shared.dtype:
            result[g:] = sums
    return result


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
    h, count = len(weights.w_in), len(weights.first)
    shared, own = value_grads(grad, weights, values, activation, plan)
    result: list[Tensor | None] = [None] * 7
    if needed[0]:
        result[0] = input_grad(shared, own, weights, plan)
    ones = rows.new_ones(len(rows), 1)
    for place, by_shared, by_own in zip((5, 1)[-count:], shared, own or [None] * count, strict=True):
        if needed[place]:
            result[place] = weight_grad(by_shared, by_own, rows, h, plan)
        if needed[place + 1]:
            result[place + 1] = weight_grad(by_shared, by_own, ones, h, plan)[:, 0]
    if needed[3] and own is None:
        result[3] = grad.t() @ values[count]
    elif needed[3]:
        result[3] = _turned(weight_grad(values[count], values[-1], grad, h, plan))
    if needed[4]:
        result[4] = grad.sum(0)
    return result


def _turned(weight: Tensor) -> Tensor:
    """Return ``weight.t()``, dense in memory."""
    if not weight.is_cuda and weight.stride(1) == 1:
        return torch.ops.memloc_ext.turned(weight)
    return weight.t().contiguous()


def kept_mlp(x: Tensor, activation: str, plan: Plan, *weights: Tensor | None) -> Tensor:
    """Run the MLP on ``x [*, d]`` by a plan for its rows; the weights are those of `Weights`, in their order."""
    given = (x, *weights)
    if has_torch_function(given):
        return handle_torch_function(kept_mlp, given, x, activation, plan, *weights)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        given = cast_for_autocast(device, given)
    rows = cast(Tensor, given[0]).flatten(0, -2)
    with torch.autocast(device, enabled=False):
        if plan.kept is None:
            own = Weights(*given[1:])  # pyright: ignore[reportArgumentType]
            y = composition(rows, own, activation, lambda hidden: plan.thinned(plan.dropout(hidden), 0))
        else:
            y = cast(Tensor, KeptMlp.apply(activation, plan, rows, *given[1:]))
    return y.view(*x.shape[:-1], y.shape[-1])


class KeptMlp(torch.autograd.Function):
    """The MLP on rows ``[rows, d]`` with channels kept by some runs; second derivatives are those of dense products."""

    @staticmethod
    def forward(ctx: Any, activation: str, plan: Plan, rows: Tensor, *weights: Tensor | None) -> Tensor:
        """Take the activation, the plan, rows and the weights, those that are None too."""
        y, values = forward(rows, Weights(*weights), activation, plan)  # pyright: ignore[reportArgumentType]
        ctx.activation, ctx.plan = activation, plan
        ctx.save_for_backward(rows, *weights, *values)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        """Return the gradients of the rows and the weights."""
        saved = ctx.saved_tensors  # once: checkpointing gives them once
        inputs, values = saved[:7], list(saved[7:])
        rows, weights = inputs[0], Weights(*inputs[1:])
        needed, again = ctx.needs_input_grad[2:], torch.is_grad_enabled()
        batched = is_legacy_batchedtensor(grad)  # of is_grads_batched
        with torch.autocast(grad.device.type, enabled=False):
            if not again and not batched:
                return None, None, *backward(grad, rows, weights, values, ctx.activation, ctx.plan, needed)
            if ctx.plan.p:
                raise RuntimeError(
                    "kept_mlp: behind ordinary dropout that is active there are no second derivatives, and no passes "
                    "of many gradients; set p to 0"
                )
            with torch.enable_grad():
                y = composition(rows, weights, ctx.activation, ctx.plan.dropout)
            wanted = [t for t, need in zip(inputs, needed, strict=True) if need]
            found = iter(torch.autograd.grad(y, wanted, grad, create_graph=again))
            return None, None, *(next(found) if need else None for need in needed)
