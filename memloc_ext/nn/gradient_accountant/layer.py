"""The autograd function that every rule runs through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from memloc_ext.nn.gradient_accountant.run import Weight
from memloc_ext.nn.gradient_accountant.session import Session
from memloc_ext.nn.gradient_accountant.uses import Use


class Rule:
    """How a kind of layer runs forward and backward.

    Args:
        session: That the layer is part of.
        weights: Which of the layer's tensors are parameters, in the order of its tensors; None for the others.
    """

    def __init__(self, session: Session, weights: Sequence[Weight | None]) -> None:
        self.session, self.weights, self.batch_dim = session, list(weights), session.batch_dim
        self.given: list[int] = []  # places of the arguments that are tensors

    def forward(self, *tensors: Any) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Return the output, and what `backward` is to be given."""
        raise NotImplementedError

    def backward(self, saved: Any, needs: Sequence[bool], grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the tensors that need one; those of parameters by `record`."""
        raise NotImplementedError

    def record(self, index: int, use: Use) -> Tensor | None:
        """Take note of a parameter's use and return its gradient of the batch, if parameters get gradients."""
        weight, run = self.weights[index], self.session.run
        assert weight is not None
        if run is None:  # a backward pass that nobody accounts
            return use.total().to(weight.tensor.dtype)
        return run.record(weight, use)

    def examples(self, first: Tensor) -> int:
        """Return the number of examples; outside of an accounted backward pass any that fits will do."""
        run = self.session.run
        return run.batch if run is not None else first.shape[self.batch_dim] if first.dim() > self.batch_dim else 1

    def name(self, index: int) -> str:
        """Describe a parameter for an error."""
        weight = self.weights[index]
        return f"a parameter of shape {list(weight.parameter.shape)}" if weight is not None else "a layer"

    def __call__(self, *tensors: Any) -> Any:
        """Run the layer."""
        self.session.count(*self.weights)
        self.given = [i for i, t in enumerate(tensors) if isinstance(t, Tensor)]
        return _Layer.apply(self, *tensors)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rule: Rule, *tensors: Any) -> Tensor:
        ctx.rule = rule
        device = next(t.device.type for t in tensors if t is not None)
        with torch.autocast(device, enabled=False):
            out, saved = rule.forward(*tensors)
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[1:]  # checkpointing recomputes here, to be seen
        with torch._C.DisableTorchFunction(), torch.autocast(grad.device.type, enabled=False):
            return (None, *ctx.rule.backward(saved, needs, grad))


def is_layer(node: object) -> bool:
    """Return whether a node of the graph is one of these layers, whose ``rule`` tells its parameters."""
    return isinstance(getattr(node, "rule", None), Rule)


def autocast_dtype(t: Tensor) -> torch.dtype:
    """Return the type that a matrix product with ``t`` is computed in here, under autocast or not."""
    device = t.device.type
    if torch.is_autocast_enabled(device) and t.is_floating_point() and t.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return t.dtype
