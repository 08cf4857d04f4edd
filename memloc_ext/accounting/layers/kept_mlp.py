"""MLPs that compute the hidden channels which each example keeps: `memloc_ext.ops.example_tied_mlp`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memloc_ext import ops
from memloc_ext.accounting.contributions import Contribution, LinearContribution, Rows, scaled
from memloc_ext.accounting.layers.layer_function import Forward, Gradients, Product
from memloc_ext.accounting.tracer import Tracer
from memloc_ext.ops import Groups
from memloc_ext.ops.example_tied_mlp import Arguments
from memloc_ext.ops.kept_mlp import Plan, Weights, forward, input_grad, value_grads, weight_grad


@dataclass(eq=False, repr=False)
class KeptMlp(Product):
    """The MLP.

    Attributes:
        weights: Of input and the six weights of an MLP.
        activation: See `memloc_ext.ops.example_tied_mlp`.
        plan: Which channels are computed.
    """

    activation: str
    plan: Plan

    def forward(self, x: Tensor, *weights: Tensor | None) -> Forward:
        x, *cast = self.cast(x, *weights)
        y, values = forward(x.flatten(0, -2), Weights(*cast), self.activation, self.plan)
        return y.view(*x.shape[:-1], y.shape[-1]), (x, *cast, *values)

    def backward(self, saved: Any, needs: Sequence[bool], grad: Tensor) -> Gradients:
        x, *rest = saved
        weights, values = Weights(*rest[:6]), rest[6:]
        h, count = len(weights.w_in), len(weights.first)
        shared, own = value_grads(grad.reshape(-1, grad.shape[-1]), weights, values, self.activation, self.plan)
        grads: list[Tensor | None] = [None] * 7
        if needs[0]:
            grads[0] = input_grad(shared, own, weights, self.plan).view_as(x)
        if needs[4]:
            grads[4] = self.record(4, Rows.of_positions(self.examples(grad)))
        if needs[3]:
            hidden = (values[count], None if own is None else values[-1])
            grads[3] = self.record(3, self._contribution(grad, *hidden, h, transposed=True))
        for place, of_shared, of_own in zip((5, 1)[-count:], shared, own or [None] * count, strict=True):
            if needs[place + 1]:
                grads[place + 1] = self.record(place + 1, Rows.of_positions(self._dense(x, of_shared, of_own, h)))
            if needs[place]:
                grads[place] = self.record(place, self._contribution(x, of_shared, of_own, h))
        return tuple(grads)

    def _dense(self, like: Tensor, shared: Tensor, own: Tensor | None, h: int) -> Tensor:
        """Return values of all channels, ``[batch, *, h]``, zeros in place of those that are not computed."""
        result = shared.new_zeros(len(shared), h)
        result[:, : self.plan.shared] = shared
        if own is not None and self.plan.kept is not None:
            behind = result[:, self.plan.shared :]
            for channels, values, rows in self.plan.kept.runs(own, behind):
                rows[:, channels] = values.t()
        return self.examples(result.view(*like.shape[:-1], h))

    def _contribution(
        self, input: Tensor, shared: Tensor, own: Tensor | None, h: int, *, transposed: bool = False
    ) -> Contribution:
        """Return the contribution of a weight that made values of input ``[batch, *, n]``, or of its transpose."""
        axis, kept = self.example_axis, self.plan.kept
        runs = 0 if kept is None else len(kept.rows) - 1
        tokens = len(shared) // max(1, len(input))
        alone = runs == len(input) and kept is not None and kept.rows == list(range(0, len(shared) + 1, tokens))
        if axis is None or not alone or own is None or axis.batch != len(input) or axis.dim != 0:
            x, dense = self.examples(input), self._dense(input, shared, own, h)
            return LinearContribution(dense, x) if transposed else LinearContribution(x, dense)
        return KeptContribution(input.reshape(runs, tokens, -1), shared, own, h, self.plan, transposed=transposed)


class KeptContribution(Contribution):
    """A weight ``[h, n]`` of which each example has its own rows; or the transpose of one.

    Args:
        input: ``[batch, tokens, n]``.
        shared: Gradients of the values of shared channels, ``[batch * tokens, shared]``.
        own: Those of the examples' own channels, as `Kept` stores them; each example is a run.
        h: Number of channels.
        plan: Which channels each example keeps.
        transposed: Whether the weight is ``[n, h]``.
    """

    def __init__(self, input: Tensor, shared: Tensor, own: Tensor, h: int, plan: Plan, *, transposed: bool) -> None:
        shape = torch.Size((input.shape[-1], h) if transposed else (h, input.shape[-1]))
        super().__init__(len(input), shape, input)
        self._input, self._shared, self._own, self._h, self._plan = input, shared, own, h, plan
        self._transposed = transposed
        assert plan.kept is not None
        runs = [(channels, values) for channels, values, _ in plan.kept.runs(own, input.flatten(0, 1))]
        counts = [end - begin for begin, end in zip(plan.kept.ends, plan.kept.ends[1:], strict=False)]
        self._padded = own.new_zeros(*input.shape[:2], max(counts, default=0))  # without channels there is nothing
        self._channels = torch.full((self.batch, self._padded.shape[2]), plan.shared, device=own.device)
        filled = (b for b, count in enumerate(counts) if count * input.shape[1])
        for b, (channels, values) in zip(filled, runs, strict=True):
            self._padded[b, :, : len(channels)] = values.t()
            self._channels[b, : len(channels)] += channels

    def _turned(self, gradients: Tensor) -> Tensor:
        return gradients.mT if self._transposed else gradients

    def gradients(self, begin: int, end: int) -> Tensor:
        x = self._input[begin:end].to(self.dtype)
        result = torch.zeros(end - begin, self._h, x.shape[2], dtype=self.dtype, device=self.device)
        shared = self._shared.view(*self._input.shape[:2], -1)[begin:end].to(self.dtype)
        result[:, : self._plan.shared] = shared.mT @ x
        own, channels = self._padded[begin:end].to(self.dtype).mT @ x, self._channels[begin:end]
        return self._turned(result.scatter_add_(1, channels[..., None].expand_as(own), own))

    def total(self, factors: Tensor | None = None) -> Tensor:
        x = self._input if factors is None else scaled(self._input.to(self.dtype), factors)
        shared, own = (t.to(x.dtype) for t in (self._shared, self._own))
        return self._turned(weight_grad(shared, own, x.flatten(0, 1), self._h, self._plan))

    def sqnorm(self) -> Tensor:
        shared = self._shared.view(*self._input.shape[:2], -1)
        return ops.linear_grad_sqnorm(self._input, shared) + ops.linear_grad_sqnorm(self._input, self._padded)

    def sqnorm_and_groups(self, groups: Groups) -> tuple[Tensor, Tensor]:
        if groups.num == 1:
            return self.sqnorm(), self.total()[None]
        return self.sqnorm(), torch.stack([self.total(groups.ids == group) for group in range(groups.num)])

    def dot(self, directions: Tensor) -> Tensor:
        x = self._input.to(self.dtype)
        shared, result = self._shared.view(*x.shape[:2], -1).to(self.dtype), []
        for direction in directions.to(self.dtype):
            v = direction.t() if self._transposed else direction
            of_shared = (shared @ v[: self._plan.shared] * x).flatten(1).sum(1)
            result.append(of_shared + (self._padded.to(self.dtype) @ v[self._channels] * x).flatten(1).sum(1))
        return torch.stack(result)


def example_tied_mlp(tracer: Tracer, func: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Handle the operator `memloc_ext.ops.example_tied_mlp`."""
    arguments = Arguments(*args, **kwargs)
    if tracer.axis(arguments.x) is None:
        return NotImplemented
    arguments.check()
    return kept_mlp(tracer, func, arguments.x, arguments.activation, arguments.plan(), *arguments.weights)


def kept_mlp(
    tracer: Tracer, func: Any, /, x: Tensor, activation: str, plan: Plan, *weights: Tensor | None, **kwargs: Any
) -> Any:
    """Handle an MLP with a plan."""
    axis = tracer.axis(x)
    if axis is None or axis.dim >= x.dim() - 1:
        return NotImplemented
    return KeptMlp.handle(tracer, axis, (x, *weights), activation, plan)
