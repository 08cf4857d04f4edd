"""Which parameters a loss depends on, and where: a walk over the autograd graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from memloc_ext.nn.gradient_accountant.layer import Rule, is_layer
from memloc_ext.nn.gradient_accountant.session import examples_first


@dataclass
class Reached:
    """Parameters by their ``id``.

    Attributes:
        seen: Those that reach the loss through layers of the accountant only.
        unseen: Those that reach it some other way.
        stops: Positions, in the tensors to stop at, of those that were met.
    """

    seen: dict[int, nn.Parameter] = field(default_factory=dict)
    unseen: dict[int, nn.Parameter] = field(default_factory=dict)
    stops: set[int] = field(default_factory=set)

    @property
    def all(self) -> dict[int, nn.Parameter]:
        """Both kinds."""
        return self.seen | self.unseen


def reached(root: Tensor, parameters: Mapping[int, nn.Parameter], stop_at: Sequence[Tensor] = ()) -> Reached:
    """Walk from a tensor down to the parameters it depends on.

    Args:
        root: Where to start.
        parameters: Those of interest, by ``id``.
        stop_at: Tensors that the walk does not go below.
    """
    found = Reached()
    stops = {t.grad_fn: i for i, t in enumerate(stop_at)}
    pending: list[Any] = [root.grad_fn]
    visited = set()
    while pending:
        node = pending.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if node in stops:
            found.stops.add(stops[node])
            continue
        edges = [edge for edge, _ in node.next_functions]
        if is_layer(node):
            edges = _below(node.rule, edges, found)
        elif (variable := getattr(node, "variable", None)) is not None and id(variable) in parameters:
            found.unseen[id(variable)] = variable
        pending += edges
    for key in found.unseen:
        found.seen.pop(key, None)
    return found


def _below(rule: Rule, edges: Sequence[Any], found: Reached) -> list[Any]:
    """Return the nodes under a layer, its parameters left out, which are taken note of."""
    below = []
    for weight, edge in zip([rule.weights[i] for i in rule.given], edges, strict=True):
        if weight is None:
            below.append(edge)
        else:
            found.seen[id(weight.parameter)] = weight.parameter
    return below


@dataclass(frozen=True)
class Rows:
    """What tells the examples apart: a loss is the sum of the products of these tensors with these cotangents.

    Attributes:
        tensors: A row per example.
        cotangents: Of the loss by each.
        batch_dim: Dimension of the examples in each.
    """

    tensors: list[Tensor]
    cotangents: list[Tensor]
    batch_dim: int

    def of(self, batch: int, chosen: Tensor) -> list[Tensor]:
        """Return the cotangents of the chosen examples only, zeros elsewhere; ``chosen``: indices."""
        result = []
        for cotangent in self.cotangents:
            part = torch.zeros_like(cotangent, memory_format=torch.contiguous_format)
            views = (examples_first(t, batch, self.batch_dim, 0, "the loss") for t in (part, cotangent.contiguous()))
            to, source = views
            to[chosen] = source[chosen]
            result.append(part)
        return result


def minimal(root: Tensor, outputs: Sequence[Tensor], parameters: Mapping[int, nn.Parameter]) -> list[Tensor] | None:
    """Return the outputs through which alone a loss depends on the parameters, none through another; else None."""
    found = reached(root, parameters, outputs)
    chosen = [outputs[i] for i in sorted(found.stops)]
    if found.seen or found.unseen:
        return None
    for t in chosen:
        others = [other for other in chosen if other is not t]
        if reached(t, {}, others).stops:
            return None
    return chosen
