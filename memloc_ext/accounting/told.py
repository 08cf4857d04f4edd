"""What the layers of a graph of PyTorch's own tell in a backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from typing_extensions import Self

from memloc_ext.accounting.backward_pass import BackwardPass, Repeated
from memloc_ext.accounting.contributions import Contribution
from memloc_ext.accounting.example_axis import ExampleAxis
from memloc_ext.accounting.fused import Fused, Together, Waiting
from memloc_ext.accounting.layers.elementwise import Broadcast
from memloc_ext.accounting.layers.layer_function import LayerFunction, exactly
from memloc_ext.accounting.pattern import Pattern, Place
from memloc_ext.accounting.tracer import Tracer
from memloc_ext.accounting.uses import ParameterView
from memloc_ext.borrowing import without_hooks


def run(
    tracer: Tracer,
    backward: BackwardPass,
    matched: tuple[Pattern, list[Any]],
    roots: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None,
    leaves: Sequence[Tensor],
    retain_graph: bool,
) -> dict[Tensor, Tensor]:
    """Run an accounted backward pass through a graph of PyTorch's own layers; return what leaves are to be given.

    Layers that one operator accounts wait for each other. The gradients of small ones, and of those that nothing below
    is to be given a gradient of, are captured; a hook tells those of others.

    Args:
        tracer: Of the step.
        backward: Is told of the layers.
        matched: The pattern, and the nodes that it belongs to.
        roots: Where to start.
        cotangents: Of the roots, or None for numbers.
        leaves: That are no parameters, above that graph.
        retain_graph: Whether to keep the graph.
    """
    pattern, nodes = matched
    leaves = list({id(leaf): leaf for leaf in (*leaves, *(nodes[i].variable for i in pattern.others))}.values())
    together = backward.queries is None and not backward.clipped
    plan = pattern.plans.get((together, backward.weight_grads))
    if plan is None:
        plan = pattern.plans[together, backward.weight_grads] = Plan(pattern, together, backward.weight_grads)
    told, handles = Told(backward, nodes), []
    waiting = told.waiting
    last: list[Place] = []
    with exactly(roots[0].device.type), without_hooks(leaves), tracer.accounting(backward):
        given = [read and read(nodes[i]) for i, read in plan.captured]  # it is freed on the way
        edges = [GradientEdge(nodes[i], 0) for i, _ in plan.captured]
        try:
            for place in plan.others:
                node = nodes[place.node]
                if place.last:
                    last.append(place)
                    edges.append(GradientEdge(node, 0))
                else:
                    handles.append(node.register_prehook(partial(_first, told.how(place, plan), node)))
            wanted = [*edges, *leaves]
            gradients = torch.autograd.grad(roots, wanted, cotangents, retain_graph=retain_graph, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        with torch.no_grad():
            written = plan.account(backward, given, gradients[: len(given)])
            for place, gradient in zip(last, gradients[len(given) :], strict=False):
                if gradient is not None:
                    told.how(place, plan)(nodes[place.node], gradient)
            waiting.finish()
            backward.finish()
    written.update(waiting.written)
    others = zip(leaves, gradients[len(edges) :], strict=True)
    result = {tracer.parameters[key]: t for key, t in written.items()} | told.written
    return result | {leaf: t for leaf, t in others if t is not None}


class Plan:
    """How the layers of a pattern are accounted.

    Args:
        pattern: Of the graph.
        together: Whether layers may be accounted together.
        sums: Whether parameters get gradients.

    Attributes:
        captured: Numbers of the nodes whose gradients are captured for one call, and what reads their layers.
        others: Places of the other layers.
    """

    def __init__(self, pattern: Pattern, together: bool, sums: bool) -> None:
        self._fused = {
            p.node: p.fused for p in pattern.places if together and p.fused and (p.fused.one_pass or not sums)
        }
        taken = [place for place in pattern.places if place.waits and place.node in self._fused]
        self._layers = [self._fused[place.node] for place in taken]
        self._together = [Together(list(same)) for _, same in groupby(self._layers, lambda layer: layer.wide)]
        self.captured = [(place.node, layer.read) for place, layer in zip(taken, self._layers, strict=True)]
        nodes = {place.node for place in taken}
        self.others = [place for place in pattern.places if place.node not in nodes]

    def fused(self, place: Place) -> Fused | None:
        """Return how a place is accounted together with others, or None."""
        return self._fused.get(place.node)

    def account(
        self, backward: BackwardPass, given: Sequence[Any], gradients: Sequence[Tensor | None]
    ) -> dict[int, Tensor]:
        """Tell a backward pass of the captured layers; return gradients, by the ``id`` of each parameter."""
        written: dict[int, Tensor] = {}
        groups, begin = self._together, 0
        if any(t is None for t in gradients):  # of what nothing reached
            there = [i for i, t in enumerate(gradients) if t is not None]
            given, gradients = [given[i] for i in there], [gradients[i] for i in there]
            groups = [Together(list(same)) for _, same in groupby([self._layers[i] for i in there], lambda f: f.wide)]
        for same in groups:
            part = slice(begin, begin := begin + len(same.layers))
            written |= same.account(backward, given[part], gradients[part])  # pyright: ignore[reportArgumentType]
        return written


def _first(use: Callable[[Any, Tensor], None], node: Any, gradients: Sequence[Tensor | None]) -> None:
    """Hand on the gradient of a node's first output, if there is one."""
    if (gradient := gradients[0]) is not None:
        use(node, gradient)


class Told:
    """What the layers of a step tell, in the place of a tracer and of its backward pass.

    Args:
        backward: That is told.
        nodes: Of the graph.

    Attributes:
        waiting: Layers that are accounted together.
        written: The gradients of the parameters of the others.
    """

    per_example, constant_statistics, slow = True, False, ()

    def __init__(self, backward: BackwardPass, nodes: Sequence[Any]) -> None:
        self._whole, self._nodes = backward, nodes
        self.waiting = Waiting(backward)
        self.written: dict[Tensor, Tensor] = {}

    @property
    def backward(self) -> Self:
        """Itself."""
        return self

    def place(self, axis: ExampleAxis) -> ExampleAxis:
        """See `BackwardPass`; the examples are where the rows are."""
        return axis

    def record(self, weight: ParameterView, contribution: Contribution) -> Tensor | None:
        """See `BackwardPass`."""
        return self._whole.record(weight, contribution)

    def how(self, place: Place, plan: Plan) -> Callable[[Any, Tensor], None]:
        """Return what takes note of a layer, given its node and the gradient of that one's output."""
        layer = plan.fused(place)
        return partial(self.use, place) if layer is None else partial(self.waiting.add, layer)

    def use(self, place: Place, node: Any, gradient: Tensor) -> None:
        """Account a layer, given the gradient of its node's output."""
        parameters = {i: self._nodes[number].variable for i, number in place.parameters.items()}
        layer = self._layer(place, {i: ParameterView(p, p) for i, p in parameters.items()})
        if place.shape != place.rows:
            added = isinstance(layer, Broadcast)
            gradient = gradient.sum_to_size(place.rows) if added else gradient.reshape(place.rows)
        saved = _READ[type(node).__name__](node, place.rows)
        results = layer.backward(saved, [i in parameters for i in range(3)], gradient)
        for i, p in parameters.items():
            if (total := results[i]) is not None:
                self.written[p] = total

    def _layer(self, place: Place, weights: Mapping[int, ParameterView]) -> LayerFunction:
        """Return the layer of a place, to run backward."""
        layer: Any = object.__new__(type(place.layer))
        layer.__dict__.update(place.layer.__dict__)
        layer.tracer, layer.weights = self, [weights.get(i) for i in range(3)]
        if isinstance(layer, Broadcast):
            layer.source = Repeated(weights[0], weights[0].parameter)
        return layer


def _products(name: str) -> Callable[[Any, tuple[int, ...]], Any]:
    def read(node: Any, rows: tuple[int, ...]) -> Any:
        x = getattr(node, name)
        return x if len(rows) == 2 else x.view(*rows[:-1], x.shape[-1]), None

    return read


def _batch_norm(node: Any, rows: tuple[int, ...]) -> Any:
    if node._saved_training:
        return node._saved_input, None, node._saved_result1, node._saved_result2, None, None
    return node._saved_input, None, None, None, node._saved_running_mean, node._saved_running_var


# name of a node to what the layer's backward pass is to be given, of a layer's output of this shape
_READ: Mapping[str, Callable[[Any, tuple[int, ...]], Any]] = {
    "AddmmBackward0": _products("_saved_mat1"),
    "MmBackward0": _products("_saved_self"),
    "ConvolutionBackward0": lambda node, rows: (node._saved_input, node._saved_weight),
    "NativeBatchNormBackward0": _batch_norm,
    "CudnnBatchNormBackward0": _batch_norm,
    "NativeGroupNormBackward0": lambda node, rows: (
        node._saved_input, None, node._saved_result1, node._saved_result2,
    ),
    "NativeLayerNormBackward0": lambda node, rows: (
        node._saved_input, None, None, node._saved_result1, node._saved_result2,
    ),
    "EmbeddingBackward0": lambda node, rows: (node._saved_indices,),
    "AddBackward0": lambda node, rows: (),
    "ExpandBackward0": lambda node, rows: (),
}  # fmt: skip
