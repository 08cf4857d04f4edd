"""What the layers of a graph of PyTorch's own tell in a backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from typing_extensions import Self

from memloc_ext.accounting.backward_pass import BackwardPass, Repeated
from memloc_ext.accounting.contributions import Contribution
from memloc_ext.accounting.example_axis import ExampleAxis
from memloc_ext.accounting.fused import Fused, Waiting
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
    own = [nodes[i].variable for i, key in pattern.leaves.items() if not key]
    leaves = list({id(leaf): leaf for leaf in (*leaves, *own)}.values())
    together = backward.queries is None and not backward.clipped
    told, handles = Told(backward, nodes), []
    waiting = told.waiting
    edges: list[GradientEdge] = []
    uses: list[Callable[[Tensor], None]] = []  # of what is captured
    with exactly(roots[0].device.type), without_hooks(leaves), tracer.accounting(backward):
        try:
            for place in pattern.places:
                node, fused = nodes[place.node], place.fused if together else None
                if fused is None or not (fused.one_pass or not backward.weight_grads):
                    use = partial(told.use, place, node)
                elif place.waits:
                    use = partial(waiting.add, fused, fused.read and fused.read(node))  # which is freed on the way
                else:
                    use = partial(told.wait, fused, node)
                if place.last or use.func == waiting.add:
                    edges.append(GradientEdge(node, 0))
                    uses.append(use)
                else:
                    handles.append(node.register_prehook(partial(_first, use)))
            wanted = [*edges, *leaves]
            gradients = torch.autograd.grad(roots, wanted, cotangents, retain_graph=retain_graph, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        with torch.no_grad():
            for use, gradient in zip(uses, gradients, strict=False):
                if gradient is not None:
                    use(gradient)
            waiting.finish()
            backward.finish()
    written = told.written | {tracer.parameters[key]: t for key, t in waiting.written.items()}
    others = zip(leaves, gradients[len(edges) :], strict=True)
    return written | {leaf: t for leaf, t in others if t is not None}


def _first(use: Callable[[Tensor], None], gradients: Sequence[Tensor | None]) -> None:
    """Hand on the gradient of a node's first output, if there is one."""
    if (gradient := gradients[0]) is not None:
        use(gradient)


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

    def wait(self, fused: Fused, node: Any, gradient: Tensor) -> None:
        """Have a layer wait for others, given the gradient of its node's output."""
        self.waiting.add(fused, fused.read and fused.read(node), gradient)

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
