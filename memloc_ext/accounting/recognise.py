"""Find the layers of a traced step in the autograd graph of the same step on PyTorch's own layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from memloc_ext.accounting.example_axis import ExampleAxis
from memloc_ext.accounting.fused import BUDGET, SMALL, fused
from memloc_ext.accounting.layers.convolution import Convolution
from memloc_ext.accounting.layers.elementwise import Broadcast
from memloc_ext.accounting.layers.embedding import Embedding
from memloc_ext.accounting.layers.layer_function import LayerFunction
from memloc_ext.accounting.layers.linear import Linear
from memloc_ext.accounting.layers.normalization import BatchNorm, GroupNorm, LayerNorm
from memloc_ext.accounting.pattern import Pattern, Place, shape_of

# kind of layer to the nodes that run it: place of a tensor among the layer's to the node's edges that may lead to it
_INPUT_FIRST = {1: (1,), 2: (2,)}
_NODES: dict[type[LayerFunction], dict[str, dict[int, tuple[int, ...]]]] = {
    Linear: {"AddmmBackward0": {1: (2,), 2: (0,)}, "MmBackward0": {1: (1,)}},
    Convolution: {"ConvolutionBackward0": _INPUT_FIRST},
    BatchNorm: {"NativeBatchNormBackward0": _INPUT_FIRST, "CudnnBatchNormBackward0": _INPUT_FIRST},
    GroupNorm: {"NativeGroupNormBackward0": _INPUT_FIRST},
    LayerNorm: {"NativeLayerNormBackward0": _INPUT_FIRST},
    Embedding: {"EmbeddingBackward0": {1: (0,)}},
    Broadcast: {"AddBackward0": {0: (0, 1)}, "ExpandBackward0": {0: (0,)}},
}
_LAYERS = frozenset(name for names in _NODES.values() for name in names)
# what leads from a weight to its layer: transposed once by a linear one; a cast of autocast's
_CASTS = ("ToCopyBackward0",)
_MOVES = "View UnsafeView ReshapeAlias T Transpose Permute Unsqueeze Squeeze Select Slice Expand Cat Stack Split"
_MORE_MOVES = "SplitWithSizes Unbind Alias Clone ToCopy ConstantPadNd Flip"
_ELEMENTWISE = "Add Sub Mul Div Neg Abs Pow Exp Log Sqrt Rsqrt Sin Cos Erf Tanh Sigmoid Relu LeakyRelu Elu Gelu Silu"
_MORE_ELEMENTWISE = "Softplus Mish Hardtanh Hardswish Hardsigmoid LogSigmoid Clamp Maximum Minimum Where MaskedFill"
_REDUCTIONS = "Softmax LogSoftmax Mean Sum Amax Amin Max Min MaxPool2DWithIndices AvgPool2D AdaptiveAvgPool2D"
_PRODUCTS = "Mm Bmm Baddbmm ScaledDotProductFlashAttentionForCpu ScaledDotProductFlashAttention"
_MORE_PRODUCTS = "ScaledDotProductEfficientAttention ScaledDotProductCudnnAttention NativeDropout"
_STATIC = frozenset(
    " ".join((_MOVES, _MORE_MOVES, _ELEMENTWISE, _MORE_ELEMENTWISE, _REDUCTIONS, _PRODUCTS, _MORE_PRODUCTS)).split()
)
"""Functions that leave the examples in places that follow from shapes and numbers alone, never from values."""
_NUMBERS = (int, str, tuple, list, type(None))  # floating point ones move nothing


class Walk:
    """A walk through the graph below some tensors, which numbers the nodes as they are met."""

    def __init__(self, outputs: Sequence[Tensor]) -> None:
        self.nodes: list[Any] = []
        self._numbers: dict[Any, int] = {}
        self.roots = tuple((self._number(t.grad_fn), t.output_nr) for t in outputs)

    def __iter__(self) -> Any:
        return iter(self.nodes)  # grows on the way

    def edges(self, node: Any) -> tuple[tuple[int, int], ...]:
        """Return the edges below a node, whose nodes get the next numbers."""
        return tuple((-1 if below is None else self._number(below), nr) for below, nr in node.next_functions)

    def _number(self, node: Any) -> int:
        number = self._numbers.get(node)
        if number is None:
            number = self._numbers[node] = len(self.nodes)
            self.nodes.append(node)
        return number


def pattern_of(
    returned: Sequence[Tensor],
    reached: Collection[int],
    axes: Sequence[ExampleAxis],
    layers: Sequence[LayerFunction],
    parameters: Mapping[int, nn.Parameter],
    checked: bool,
) -> Pattern | None:
    """Return the pattern of a graph, or None if it holds something else than the layers that were traced.

    Args:
        returned: What the model returned, computed by PyTorch's own layers.
        reached: Which of these tensors the loss depends on.
        axes: Where the examples are in each of them.
        layers: That a traced pass of the same model went through.
        parameters: Of the model, by their ``id``.
        checked: See `Pattern`.
    """
    chosen = tuple(sorted(reached))
    walk = Walk([returned[i] for i in chosen])
    edges = [walk.edges(node) for node in walk]
    names = [type(node).__name__ for node in walk]
    if not all(name == "AccumulateGrad" or name in _LAYERS or _kind(name) in _STATIC for name in names):
        return None
    leaves = {i: id(node.variable) for i, node in enumerate(walk) if names[i] == "AccumulateGrad"}
    leaves = {i: key if key in parameters else 0 for i, key in leaves.items()}
    above: list[list[tuple[int, int]]] = [[] for _ in names]
    for i, own in enumerate(edges):
        for position, (below, _) in enumerate(own):
            if below >= 0:
                above[below].append((i, position))
    numbers_of = {key: i for i, key in leaves.items() if key}
    graph, places, chains = _Graph(names, edges, above, walk.nodes), [], set[int]()
    for layer in layers:
        keys = {i: id(weight.parameter) for i, weight in enumerate(layer.weights) if weight is not None}
        if not keys or not all(key in numbers_of for key in keys.values()):
            return None
        found = _places(graph, layer, {i: numbers_of.pop(key) for i, key in keys.items()}, chains)
        if None in found:
            return None
        places += found
    if numbers_of or len({place.node for place in places}) < len(places):
        return None
    flat, met, numbers = (
        [edge for own in edges for edge in own],
        {number for number, _ in walk.roots},
        _numbers(walk.nodes),
    )
    return Pattern(
        chosen,
        tuple(axes),
        tuple(tuple(t.shape) for t in returned),
        walk.roots,
        [type(node) for node in walk],
        list(map(len, edges)),
        [tuple(i for i, (number, _) in enumerate(own) if _adds(met, number)) for own in edges],
        [number for number, _ in flat],
        [nr for _, nr in flat],
        numbers,
        [read(walk.nodes[i]) for i, read in numbers],
        leaves,
        _completed(graph, places, chains),
        checked,
        [i for i, key in leaves.items() if not key],
    )


def _adds(met: set[int], number: int) -> bool:
    """Return whether a number is a new one, of a node, and add it."""
    new = number >= 0 and number not in met
    met.add(number)
    return new


@dataclass(frozen=True)
class _Graph:
    names: list[str]
    edges: list[tuple[tuple[int, int], ...]]
    above: list[list[tuple[int, int]]]
    nodes: list[Any]


def _places(graph: _Graph, layer: LayerFunction, parameters: dict[int, int], chains: set[int]) -> list[Place | None]:
    """Return where a layer is: a linear one may add its bias in a node of its own."""
    place = _place(graph, layer, parameters, chains)
    if place is not None or not isinstance(layer, Linear) or len(parameters) < 2:
        return [place]
    shape: Any = layer.output_shape
    shift = Broadcast(layer.tracer, (), layer.axis, None, list(shape))  # pyright: ignore[reportArgumentType]
    shift.output_shape = shape
    return [_place(graph, layer, {1: parameters[1]}, chains), _place(graph, shift, {0: parameters[2]}, chains)]


def _place(graph: _Graph, layer: LayerFunction, parameters: dict[int, int], chains: set[int]) -> Place | None:
    """Return where a layer with these parameters is; add the nodes between these and the layer to ``chains``."""
    nodes, own = _NODES.get(type(layer), {}), set[int]()
    if isinstance(layer, Linear) and layer.transposed:
        return None
    for position, leaf in parameters.items():
        between, where = [leaf], graph.above[leaf]
        while len(where) == 1 and graph.names[where[0][0]] in ("TBackward0", *_CASTS):
            between.append(where[0][0])
            where = graph.above[where[0][0]]
        if len(where) != 1 or graph.names[where[0][0]] not in nodes:
            return None
        node, edge = where[0]
        transposed = sum(graph.names[i] == "TBackward0" for i in between)
        if edge not in nodes[graph.names[node]].get(position, ()):
            return None
        if transposed != (isinstance(layer, Linear) and position == 1):
            return None
        own.add(node)
        chains.update(between)
    if len(own) != 1:
        return None
    (node,) = own
    if any(getattr(graph.nodes[node], name, 1) != 1 for name in ("_saved_alpha", "_saved_beta")):
        return None
    kept = copy.copy(layer)
    kept.tracer = kept.weights = kept.given = None  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(kept, BatchNorm):
        kept.running = (None, None)
    if isinstance(kept, Broadcast):
        kept.source = None  # pyright: ignore[reportAttributeAccessIssue]
    return Place(node, kept, parameters, shape_of(graph.nodes[node]), tuple(layer.output_shape or ()))


def _completed(graph: _Graph, places: Sequence[Place], chains: Collection[int]) -> list[Place]:
    """Return places that know what is below them, and which others they wait for."""
    found, waiting = [], 0
    for place in places:
        node = graph.nodes[place.node]
        last = all(below < 0 or below in chains for below, _ in graph.edges[place.node])
        parameters = {i: graph.nodes[leaf].variable for i, leaf in place.parameters.items()}
        own = fused(place.layer, node, place.shape, place.rows, parameters)
        waits = own is not None and own.size <= SMALL and waiting + own.size <= BUDGET
        waiting += own.size if own is not None and waits else 0
        found.append(replace(place, last=last, fused=own, waits=waits))
    return found


def _numbers(nodes: Sequence[Any]) -> list[tuple[int, Callable[[Any], Any]]]:
    """Return which nodes keep numbers, and what reads them."""
    found = []
    for i, node in enumerate(nodes):
        given = [] if hasattr(node, "variable") else [name for name in dir(node) if name.startswith("_saved_")]
        names = [name for name in given if not name.endswith("_strides") and _is_number(getattr(node, name))]
        if names:
            found.append((i, attrgetter(*names)))
    return found


def _is_number(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_number, value))
    return isinstance(value, _NUMBERS)


def _kind(name: str) -> str:
    return name.rstrip("0123456789").removesuffix("Backward")
