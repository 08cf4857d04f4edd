"""Which parameters a loss depends on, and where: a walk over the autograd graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from memloc_ext.accounting.layers.layer_function import LayerFunction
from memloc_ext.accounting.tracer import Tracer

if TYPE_CHECKING:
    from memloc_ext.accounting.pattern import Pattern


@dataclass
class Reached:
    """Parameters by their ``id``.

    Attributes:
        seen: Those that reach the loss through layers of the accountant only.
        unseen: Those that reach it some other way.
        stops: Positions, in the tensors to stop at, of those that were met.
        nodes: Of the graph, that the walk went through.
        uses: How many layers use each parameter.
        layers: Of the accountant that were met.
        matched: The pattern of the graph below what the model returned, and its nodes, if it ran untraced.
    """

    seen: dict[int, nn.Parameter] = field(default_factory=dict)
    unseen: dict[int, nn.Parameter] = field(default_factory=dict)
    stops: set[int] = field(default_factory=set)
    nodes: set[Any] = field(default_factory=set)
    uses: Counter[int] = field(default_factory=Counter)
    layers: list[LayerFunction] = field(default_factory=list)
    matched: tuple[Pattern, list[Any]] | None = None

    @property
    def reentrant(self) -> bool:
        """Whether gradient checkpointing of the kind that allows no other backward pass was met."""
        return any(type(node).__name__ == "CheckpointFunctionBackward" for node in self.nodes)

    @property
    def others(self) -> list[Tensor]:
        """Leaves that reach the loss and are no parameters."""
        leaves, known = [node.variable for node in self.nodes if hasattr(node, "variable")], self.all
        return [leaf for leaf in leaves if id(leaf) not in known]

    @property
    def all(self) -> dict[int, nn.Parameter]:
        """Both kinds."""
        return self.seen | self.unseen


def reached(
    root: Tensor, tracer: Tracer, parameters: Mapping[int, nn.Parameter], stop_at: Sequence[Tensor] = ()
) -> Reached:
    """Walk from a tensor down to the parameters it depends on.

    Args:
        root: Where to start.
        tracer: Whose layers tell their parameters; to those of another one belongs what it belongs to without.
        parameters: Those of interest, by ``id``.
        stop_at: Tensors that the walk does not go below.
    """
    found = Reached()
    stops = {(t.grad_fn, t.output_nr): i for i, t in enumerate(stop_at)}
    pending: list[tuple[Any, int]] = [(root.grad_fn, root.output_nr)]
    while pending:
        edge = pending.pop()
        node = edge[0]
        if edge in stops:
            found.stops.add(stops[edge])
            continue
        if node is None or node in found.nodes:
            continue
        found.nodes.add(node)
        edges = list(node.next_functions)
        layer = getattr(node, "layer", None)
        if isinstance(layer, LayerFunction) and layer.tracer is tracer:
            edges = _below(layer, edges, found)
        elif (variable := getattr(node, "variable", None)) is not None and id(variable) in parameters:
            found.unseen[id(variable)] = variable
        pending += edges
    for key in found.unseen:
        found.seen.pop(key, None)
    return found


def _below(layer: LayerFunction, edges: Sequence[tuple[Any, int]], found: Reached) -> list[tuple[Any, int]]:
    """Return the edges below a layer, its parameters left out, which are taken note of."""
    below = []
    found.layers.append(layer)
    for weight, edge in zip([layer.weights[i] for i in layer.given], edges, strict=True):
        if weight is None or weight.derived is not None:
            below.append(edge)
        else:
            found.seen[id(weight.parameter)] = weight.parameter
            found.uses[id(weight.parameter)] += 1
    return below


def check_reentrant(found: Reached) -> None:
    """Refuse what allows no backward pass but that of the whole graph."""
    if found.reentrant:
        raise ValueError(
            "GradientAccountant: max_norm does not work with reentrant checkpointing: give checkpoint "
            "use_reentrant=False"
        )
