"""The autograd graph of a model that runs on PyTorch's own layers, and whether another one is the same."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from torch import Tensor

from memloc_ext.accounting.example_axis import ExampleAxis
from memloc_ext.accounting.fused import Fused
from memloc_ext.accounting.layers.layer_function import LayerFunction


@dataclass(frozen=True)
class Place:
    """A layer in a graph.

    Attributes:
        node: Number of the node that runs it.
        layer: How it runs backward; without its tracer, weights and tensors.
        parameters: Place among the layer's tensors to the number of the node of the parameter that it is.
        shape: Of the node's output.
        rows: Shape of the layer's output.
        last: Whether nothing below wants a gradient, beside its parameters.
        fused: How it is accounted together with others, or None.
        waits: Whether what it is given may wait for the end of the backward pass.
    """

    node: int
    layer: LayerFunction
    parameters: Mapping[int, int]
    shape: tuple[int, ...]
    rows: tuple[int, ...]
    last: bool = False
    fused: Fused | None = None
    waits: bool = False


@dataclass(frozen=True)
class Pattern:
    """A graph, its nodes by their numbers in the order of a walk.

    Attributes:
        outputs: Which of the tensors that the model returned it belongs to.
        axes: Where the examples are in each of all these tensors.
        shapes: Of each of all these tensors.
        roots: Numbers of the nodes, and of their outputs, that the loss depends on.
        kinds: Of the nodes.
        counts: Of the edges below each.
        first: Which edges below each lead to a node that is met for the first time.
        below: Number of the node of each edge, or -1.
        results: Number of the output that each edge leads to.
        numbers: Of a node, and what reads the numbers that it keeps.
        values: These numbers.
        leaves: Number of each leaf to the ``id`` of the parameter that it is, or 0.
        places: Of the layers.
        checked: Whether norms were held against plain autograd.
        others: Numbers of the leaves that are no parameters.
        plans: How its layers are accounted, by what is asked.
    """

    outputs: tuple[int, ...]
    axes: tuple[ExampleAxis, ...]
    shapes: tuple[tuple[int, ...], ...]
    roots: tuple[tuple[int, int], ...]
    kinds: list[type]
    counts: list[int]
    first: list[tuple[int, ...]]
    below: list[int]
    results: list[int]
    numbers: list[tuple[int, Callable[[Any], Any]]]
    values: list[Any]
    leaves: dict[int, int]
    places: list[Place]
    checked: bool
    others: list[int]
    plans: dict[object, Any] = field(default_factory=dict)

    def match(self, outputs: Sequence[Tensor], reached: Collection[int]) -> list[Any] | None:
        """Return the nodes below what the model returned if the graph is this one, else None.

        Args:
            outputs: What the model returned.
            reached: Which of them the loss depends on.
        """
        if tuple(sorted(reached)) != self.outputs or tuple(tuple(t.shape) for t in outputs) != self.shapes:
            return None
        nodes: list[Any] = []
        for (number, nr), t in zip(self.roots, (outputs[i] for i in self.outputs), strict=True):
            if number == len(nodes):  # met for the first time
                nodes.append(t.grad_fn)
            if nodes[number] is not t.grad_fn or t.output_nr != nr:
                return None
        below: list[tuple[tuple[Any, int], ...]] = []
        meet = nodes.append
        try:
            for node, first in zip(nodes, self.first, strict=False):  # grows on the way
                edges = node.next_functions
                below.append(edges)
                for i in first:
                    meet(edges[i][0])
        except (AttributeError, IndexError):  # fewer edges
            return None
        if len(set(nodes)) != len(self.kinds) or list(map(type, nodes)) != self.kinds:
            return None
        held = [*nodes, None]
        expected = list(zip(map(held.__getitem__, self.below), self.results, strict=True))
        if list(map(len, below)) != self.counts or list(chain.from_iterable(below)) != expected:
            return None
        if [read(nodes[i]) for i, read in self.numbers] != self.values:
            return None
        if any(shape_of(nodes[place.node]) != place.shape for place in self.places):
            return None
        known = self.leaves.items()
        return nodes if all(key == 0 or id(nodes[i].variable) == key for i, key in known) else None


def shape_of(node: Any) -> tuple[int, ...]:
    """Return the shape of a node's first output."""
    return tuple(node._input_metadata[0].shape)
