"""The autograd graph of a model that runs on PyTorch's own layers: what was found in it, and whether it is the same."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from memloc_ext.accounting.example_axis import ExampleAxis
from memloc_ext.accounting.layers.convolution import Convolution
from memloc_ext.accounting.layers.elementwise import Broadcast
from memloc_ext.accounting.layers.embedding import Embedding
from memloc_ext.accounting.layers.layer_function import LayerFunction
from memloc_ext.accounting.layers.linear import Linear
from memloc_ext.accounting.layers.normalization import BatchNorm, GroupNorm, LayerNorm

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
SMALL = 1 << 14  # elements of what layers are given that wait for each other
STACKED = 4  # of them, from which on they are accounted as one
_NUMBERS = (int, str, tuple, list, type(None))  # floating point ones move nothing


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
        like: Number of the first place with the same kind of layer and shapes.
        likes: How many of the same there are, if they can be accounted as one; else 1.
        small: Whether what it is given may wait for the end of the backward pass.
    """

    node: int
    layer: LayerFunction
    parameters: Mapping[int, int]
    shape: tuple[int, ...]
    rows: tuple[int, ...]
    last: bool
    like: int = 0
    likes: int = 1
    small: bool = False


@dataclass(frozen=True)
class Pattern:
    """A graph, its nodes by their numbers in the order of a walk.

    Attributes:
        outputs: Which of the tensors that the model returned it belongs to.
        axes: Where the examples are in each of all these tensors.
        shapes: Of each of all these tensors.
        roots: Numbers of the nodes, and of their outputs, that the loss depends on.
        kinds: Of the nodes.
        edges: Below each: number of a node, or -1, and of its output.
        numbers: Of a node, what reads the numbers that it keeps, and these.
        leaves: Number of each leaf to the ``id`` of the parameter that it is, or 0.
        places: Of the layers.
        checked: Whether norms were held against plain autograd.
        kept: Tensors that are the same in every step.
    """

    outputs: tuple[int, ...]
    axes: tuple[ExampleAxis, ...]
    shapes: tuple[tuple[int, ...], ...]
    roots: tuple[tuple[int, int], ...]
    kinds: list[type]
    edges: list[tuple[tuple[int, int], ...]]
    numbers: list[tuple[int, Callable[[Any], Any], Any]]
    leaves: dict[int, int]
    places: list[Place]
    checked: bool
    kept: dict[object, Tensor] = field(default_factory=dict)

    def match(self, outputs: Sequence[Tensor], reached: Collection[int]) -> list[Any] | None:
        """Return the nodes below what the model returned if the graph is this one, else None.

        Args:
            outputs: What the model returned.
            reached: Which of them the loss depends on.
        """
        if tuple(sorted(reached)) != self.outputs or tuple(tuple(t.shape) for t in outputs) != self.shapes:
            return None
        walk = Walk([outputs[i] for i in self.outputs])
        nodes, roots = walk.nodes, walk.roots
        if roots != self.roots:
            return None
        for i, edges in enumerate(self.edges):
            below = nodes[i].next_functions
            if len(below) != len(edges):
                return None
            for (node, nr), (number, expected) in zip(below, edges, strict=True):
                if nr != expected or (node is None) != (number < 0):
                    return None
                if number == len(nodes):  # met for the first time
                    nodes.append(node)
                elif number >= 0 and nodes[number] is not node:
                    return None
        if len(set(nodes)) != len(nodes) or list(map(type, nodes)) != self.kinds:
            return None
        if any(numbers(nodes[i]) != values for i, numbers, values in self.numbers):
            return None
        if any(_shape(nodes[place.node]) != place.shape for place in self.places):
            return None
        known = self.leaves.items()
        return nodes if all(key == 0 or id(nodes[i].variable) == key for i, key in known) else None

    def keep(self, numbers: Sequence[int], device: torch.device) -> Tensor:
        """Return some numbers as a tensor, which is made once."""
        key = (device, *numbers)
        if key not in self.kept:
            self.kept[key] = torch.tensor(numbers, device=device)
        return self.kept[key]


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
    places = _with_likes(graph, [_with_end(graph, place, chains) for place in places], parameters)
    return Pattern(
        chosen,
        tuple(axes),
        tuple(tuple(t.shape) for t in returned),
        walk.roots,
        [type(node) for node in walk],
        edges,
        _numbers(walk.nodes),
        leaves,
        places,
        checked,
    )


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
    return Place(node, kept, parameters, _shape(graph.nodes[node]), tuple(layer.output_shape or ()), False)


def _with_end(graph: _Graph, place: Place, chains: Collection[int]) -> Place:
    """Return a place that knows whether its node has anything below beside its parameters."""
    last = all(below < 0 or below in chains for below, _ in graph.edges[place.node])
    return replace(place, last=last)


def _with_likes(graph: _Graph, places: Sequence[Place], parameters: Mapping[int, nn.Parameter]) -> list[Place]:
    """Return places that know which others are like them."""
    same: dict[object, list[int]] = defaultdict(list)
    small = []
    for i, place in enumerate(places):
        node = graph.nodes[place.node]
        kept = [t for name in dir(node) if name.startswith("_saved_") and isinstance(t := getattr(node, name), Tensor)]
        kept += [graph.nodes[leaf].variable for leaf in place.parameters.values()]
        settings = {name: value for name, value in vars(place.layer).items() if name not in ("tracer", "weights")}
        sizes = tuple((t.shape, t.dtype, t.device) for t in kept)
        small.append(max(math.prod(place.shape), *(t.numel() for t in kept)) <= SMALL)
        alike = (type(place.layer), repr(settings), place.shape, place.rows, sizes)
        same[alike if small[i] and place.layer.axis.before == 1 else i].append(i)
    likes = {i: group for group in same.values() for i in group}
    return [replace(place, like=likes[i][0], likes=len(likes[i]), small=small[i]) for i, place in enumerate(places)]


def _numbers(nodes: Sequence[Any]) -> list[tuple[int, Callable[[Any], Any], Any]]:
    """Return which nodes keep numbers, what reads them and their values."""
    found = []
    for i, node in enumerate(nodes):
        given = [] if hasattr(node, "variable") else [name for name in dir(node) if name.startswith("_saved_")]
        names = [name for name in given if not name.endswith("_strides") and _is_number(getattr(node, name))]
        if names:
            read = attrgetter(*names)
            found.append((i, read, read(node)))
    return found


def _is_number(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_number, value))
    return isinstance(value, _NUMBERS)


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(node._input_metadata[0].shape)


def _kind(name: str) -> str:
    return name.rstrip("0123456789").removesuffix("Backward")
