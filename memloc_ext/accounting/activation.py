"""Activations with parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memloc_ext.accounting.layer import Rule
from memloc_ext.accounting.session import Session
from memloc_ext.accounting.uses import Rows


class PReLU(Rule):
    """``x`` where it is positive, else ``weight * x``; one weight, or one for each channel, which is dimension 1."""

    def forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """See `Rule`."""
        return torch.prelu(x, weight), (x, weight)

    def backward(self, saved: Any, needs: Sequence[bool], grad: Tensor) -> tuple[Tensor | None, ...]:
        """See `Rule`."""
        x, weight = saved
        slope = weight.reshape([-1 if d == 1 else 1 for d in range(x.dim())]) if len(weight) > 1 else weight
        rows = (grad * x.clamp(max=0)).movedim(self.layout.dim, 0)
        if len(weight) > 1:
            rows = rows.movedim(1 if self.layout.dim == 0 else 2, 1)
        rows = rows.reshape(len(rows), len(weight), rows[0].numel() // len(weight)).sum(2)
        grad_weight = self.record(1, Rows(self.by_example(rows))) if needs[1] else None
        return torch.where(x > 0, grad, grad * slope) if needs[0] else None, grad_weight


def prelu(session: Session, func: Any, args: Any, kwargs: Any) -> Any:
    """Handle `torch.nn.functional.prelu`."""
    if len(args) != 2 or not args[0].numel():
        return NotImplemented
    x, weight = args
    layout = session.layout(x)
    layout = layout and layout.at(0, x)
    if layout is None or weight.dim() != 1 or (len(weight) > 1 and layout.dim == 1):
        return NotImplemented
    weights = session.weights(weight)
    return NotImplemented if weights is None else PReLU(session, [None, *weights], layout)(x, weight)
