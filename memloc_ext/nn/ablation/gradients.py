"""Gradients with respect to values of a recorded network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from memloc_ext.nn.ablation.evaluation import Edit, Graph


def gradients(
    graph: Graph,
    inputs: Sequence[Tensor],
    loss: Callable[[Tensor], Tensor],
    values: Sequence[int],
    edits: dict[int, Edit],
    keep: Iterable[int] = (),
) -> tuple[list[Tensor], Sequence[Tensor | None], dict[int, Tensor]]:
    """Differentiate a loss with respect to values of a network.

    Args:
        graph: The network.
        inputs: As of `Graph.examples`.
        loss: Logits ``[examples, classes]`` to a number.
        values: To differentiate with respect to, as they are after their edits.
        edits: As of `Graph.examples`.
        keep: Values to return besides.

    Returns:
        The values; their gradients, None of what the loss does not depend on; and those of ``keep``.
    """
    seen: dict[int, Tensor] = {}

    def watched(value: int) -> Edit:
        def edit(t: Tensor, rows: Tensor, read: Callable[[int], Tensor]) -> Tensor:
            t = edits[value](t, rows, read) if value in edits else t
            seen[value] = t if t.requires_grad else t.detach().requires_grad_()
            return seen[value]

        return edit

    with torch.enable_grad():
        watch = {value: watched(value) for value in values}
        kept = graph.examples([t.detach() for t in inputs], keep, edits | watch)
        total, found = loss(kept[graph.recording.output][:, 0]), [seen[value] for value in values]
        if not total.requires_grad:
            return found, [None] * len(found), kept
        return found, torch.autograd.grad(total, found, allow_unused=True), kept
