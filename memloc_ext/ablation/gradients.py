"""Gradients with respect to values of a recorded network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from memloc_ext.ablation.interpreter import Edit
from memloc_ext.ablation.network import Network


def gradients(
    network: Network,
    inputs: Sequence[Tensor],
    loss: Callable[[Any], Tensor],
    values: Sequence[int],
    edits: dict[int, Edit],
    keep: Iterable[int] = (),
) -> tuple[list[Tensor], Sequence[Tensor | None], dict[int, Tensor]]:
    """Differentiate a loss with respect to values of a network.

    Args:
        network: The network.
        inputs: As of `Graph.examples`.
        loss: What the model returns to a number.
        values: To differentiate with respect to, as they are after their edits.
        edits: As of `Graph.examples`.
        keep: Values to return besides.

    Returns:
        The values; their gradients, None of what the loss does not depend on; and those of ``keep``.
    """
    seen: dict[int, list[Tensor]] = {value: [] for value in values}  # of some examples each

    def watched(value: int) -> Edit:
        def edit(t: Tensor, rows: Tensor, read: Callable[[int], Tensor]) -> Tensor:
            t = edits[value](t, rows, read) if value in edits else t
            seen[value].append(t if t.requires_grad else t.detach().requires_grad_())
            return seen[value][-1]

        return edit

    with torch.enable_grad():
        watch = {value: watched(value) for value in values}
        kept = network.graph.examples([t.detach() for t in inputs], keep, edits | watch)
        total, parts = loss(network.output_of(kept)), [t for value in values for t in seen[value]]
        found = [seen[value][0] if len(seen[value]) == 1 else torch.cat(seen[value]) for value in values]
        if not total.requires_grad:
            return found, [None] * len(found), kept
        grads = iter(torch.autograd.grad(total, parts, allow_unused=True))
    return found, [_joined(seen[value], [next(grads) for _ in seen[value]]) for value in values], kept


def _joined(parts: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Tensor | None:
    """Return the gradients of all examples, None if the loss depends on none."""
    if all(grad is None for grad in grads) or len(grads) == 1:
        return grads[0]
    return torch.cat([torch.zeros_like(t) if g is None else g for t, g in zip(parts, grads, strict=True)])
