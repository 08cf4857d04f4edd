"""Per-example gradients, spelled out: each example alone, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def per_example_gradients(
    model: nn.Module,
    loss_of: Callable[[Any, Tensor], Tensor],
    inputs: Tensor | tuple[Tensor, ...],
    targets: Tensor,
    *,
    batch_dim: int = 0,
) -> dict[str, Tensor]:
    """Return the gradient of each example's own loss by every parameter that requires one.

    What lets examples meet (batch normalisation in training mode, whose statistics are those of a single example here)
    has no such gradient, so the model is usually in evaluation mode. Computed in the dtype of the model; no ``grad`` is
    written.

    Args:
        model: Called as ``model(*inputs)`` with a batch of one.
        loss_of: Output for a batch of one and its target ``[1, *]`` to that example's loss, a scalar.
        inputs: What the model is called with, ``[batch, *]`` each.
        targets: ``[batch, *]``.
        batch_dim: Dimension of the examples in ``inputs``; in ``targets`` it is 0.

    Returns:
        Parameter name to ``[batch, *shape]``; zeros where the loss does not depend on the parameter.
    """
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    parameters = [p for _, p in named]
    result = {name: p.new_zeros(len(targets), *p.shape) for name, p in named}
    for b in range(len(targets)):
        loss = loss_of(model(*(t.narrow(batch_dim, b, 1) for t in given)), targets[b : b + 1])
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for (name, _), gradient in zip(named, gradients, strict=True):
            if gradient is not None:
                result[name][b] = gradient.to_dense()
    return result


def squared_norms(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the squared L2 norms ``[batch]`` of gradients ``[batch, *shape]``."""
    return {name: gradient.unsqueeze(-1).flatten(1).square().sum(1) for name, gradient in gradients.items()}
