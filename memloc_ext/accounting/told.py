"""What the layers of a graph of PyTorch's own tell in a backward pass, small ones of equal shapes together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from typing_extensions import Self

from memloc_ext.accounting.backward_pass import BackwardPass, Repeated
from memloc_ext.accounting.contributions import Contribution, LinearContribution, Rows
from memloc_ext.accounting.example_axis import ExampleAxis
from memloc_ext.accounting.layers.convolution import Convolution
from memloc_ext.accounting.layers.elementwise import Broadcast
from memloc_ext.accounting.layers.layer_function import LayerFunction, exactly
from memloc_ext.accounting.layers.normalization import BatchNorm
from memloc_ext.accounting.pattern import SMALL, STACKED, Pattern, Place
from memloc_ext.accounting.tracer import Tracer
from memloc_ext.accounting.uses import ParameterView
from memloc_ext.borrowing import without_hooks
from memloc_ext.ops import Groups

_split: Any = torch.split_with_sizes_copy  # gradients are no views of each other
_unbind: Any = torch.unbind_copy


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

    Small layers of the same shapes wait for each other, so that they are accounted in one go.

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
    waits = backward.queries is None and not backward.clipped
    told, later, handles = Told(backward, pattern, waits=waits), list[Use](), []
    backward.totals_later = waits
    with exactly(roots[0].device.type), without_hooks(leaves), tracer.accounting(backward):
        try:
            for place in pattern.places:
                node = nodes[place.node]
                parameters = {i: nodes[number].variable for i, number in place.parameters.items()}
                use = Use(place, node, parameters)
                if waits and place.small:
                    use.read()  # it is freed on the way
                    later.append(use)
                elif place.last:
                    later.append(use)
                else:
                    handles.append(node.register_prehook(partial(told.use, use)))
            wanted = [*(GradientEdge(use.node, 0) for use in later), *leaves]
            gradients = torch.autograd.grad(roots, wanted, cotangents, retain_graph=retain_graph, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        with torch.no_grad():
            stacks: dict[int, list[tuple[Use, Tensor]]] = defaultdict(list)
            for use, gradient in zip(later, gradients, strict=False):
                if gradient is not None:
                    stacks[use.place.like].append((use, gradient))
            for same in stacks.values():
                if len(same) >= STACKED and waits:
                    told.stack(same)
                else:
                    for use, gradient in same:
                        told.use(use, (gradient,))
            told.finish()
            backward.finish()
    others = zip(leaves, gradients[len(later) :], strict=True)
    return told.written | {leaf: t for leaf, t in others if t is not None}


class Use:
    """A layer in one step.

    Args:
        place: Where it is.
        node: That runs it.
        parameters: By their places among its tensors.
    """

    def __init__(self, place: Place, node: Any, parameters: Mapping[int, nn.Parameter]) -> None:
        self.place, self.node, self.parameters = place, node, parameters
        self._saved: tuple[Tensor | None, ...] | None = None

    def read(self) -> tuple[Tensor | None, ...]:
        """Return what the backward pass of the layer is to be given, and keep it."""
        saved = self._saved
        if saved is None:
            saved = self._saved = _READ[type(self.node).__name__](self.node, self.place.rows)
        return saved

    def layer(self, tracer: Any) -> LayerFunction:
        """Return the layer, to run backward."""
        kept = self.place.layer
        layer = object.__new__(type(kept))
        layer.__dict__.update(kept.__dict__)
        weights: list[ParameterView | None] = [None, None, None]
        for i, p in self.parameters.items():
            weights[i] = ParameterView(p, p)
        layer.tracer, layer.weights = tracer, weights
        if isinstance(layer, Broadcast):
            view: Any = weights[0]
            layer.source = Repeated(view, view.parameter)
        return layer

    def gradient(self, t: Tensor) -> Tensor:
        """Return the gradient of the layer's output, given that of the node's."""
        rows = self.place.rows
        if self.place.shape == rows:
            return t
        return t.sum_to_size(rows) if isinstance(self.place.layer, Broadcast) else t.reshape(rows)


class Told:
    """What the layers of a step tell, in the place of a tracer and of its backward pass.

    Args:
        backward: That is told.
        pattern: Of the step.
        waits: Whether small gradients by example wait for each other, so that they are accounted in one go.

    Attributes:
        written: The gradients of the parameters.
    """

    per_example, constant_statistics, slow = True, False, ()

    def __init__(self, backward: BackwardPass, pattern: Pattern, *, waits: bool) -> None:
        self._whole, self._pattern, self._waits = backward, pattern, waits
        self.written: dict[Tensor, Tensor] = {}
        self._rows: dict[object, list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)

    @property
    def backward(self) -> Self:
        """Itself."""
        return self

    def place(self, axis: ExampleAxis) -> ExampleAxis:
        """See `BackwardPass`; the examples are where the rows are."""
        return axis

    def record(self, weight: ParameterView, contribution: Contribution) -> Tensor | None:
        """See `BackwardPass`."""
        if self._waits and isinstance(contribution, Rows):
            rows, dtype = contribution.rows, contribution.dtype
            if rows.numel() <= SMALL and rows.dtype in (torch.float32, torch.float64):
                self._rows[rows.device, dtype].append((weight.parameter, rows))
                return None
        return self._whole.record(weight, contribution)

    def use(self, use: Use, gradients: Sequence[Tensor | None]) -> None:
        """Account a layer, given the gradients of its node's outputs."""
        if (gradient := gradients[0]) is not None:
            needs = [i in use.parameters for i in range(3)]
            results = use.layer(self).backward(use.read(), needs, use.gradient(gradient))
            for i, p in use.parameters.items():
                if (total := results[i]) is not None:
                    self.written[p] = total

    def stack(self, same: Sequence[tuple[Use, Tensor]]) -> None:
        """Account layers of the same shapes as one of more examples."""
        first, count = same[0][0], len(same)
        stacked = Stacked(self._whole, count, same[0][1].device)
        layer = first.layer(stacked)
        axis = layer.axis
        kinds, given = _STACKED.get(type(layer), ""), zip(*(use.read() for use, _ in same), strict=True)
        saved = [_stacked(parts, axis, kinds[i : i + 1]) for i, parts in enumerate(given)]
        gradient = torch.cat([use.gradient(t) for use, t in same], axis.dim)
        layer.axis = replace(axis, batch=axis.batch * count)
        layer.backward(saved, [i in first.parameters for i in range(3)], gradient)
        for i, p in first.parameters.items():
            self.written.update(stacked.tell(id(p), [use.parameters[i] for use, _ in same]))

    def finish(self) -> None:
        """Account what waited."""
        whole = self._whole
        for waiting in self._rows.values():
            parameters = [p for p, _ in waiting]
            keys, sizes = [id(p) for p in parameters], [p.numel() for p in parameters]
            rows = torch.cat([t if t.dim() == 2 else t.reshape(whole.batch, -1) for _, t in waiting], 1)
            squares = rows.t().square()
            lengths = self._pattern.keep(sizes, rows.device)
            sqnorm = torch.segment_reduce(squares, "sum", lengths=lengths, axis=0, unsafe=True)
            whole.sqnorm.update(zip(keys, sqnorm.unbind(), strict=True))
            if whole.groups is not None:
                sums = rows.new_zeros(whole.groups.num, rows.shape[1]).index_add_(0, whole.groups.ids, rows)
                each = zip(_split(sums, sizes, 1), parameters, strict=True)
                shaped = (t if p.dim() == 1 else t.reshape(-1, *p.shape) for t, p in each)
                whole.group_grad.update(zip(keys, shaped, strict=True))
            if whole.weight_grads:
                each = zip(_split(rows.sum(0), sizes), parameters, strict=True)
                shaped = (t if p.dim() == 1 else t.reshape(p.shape) for t, p in each)
                self.written.update(zip(parameters, shaped, strict=True))
        self._rows.clear()
        if self._waits:
            whole.note_totals({id(p): t for p, t in self.written.items()})


class Stacked:
    """A backward pass, in the place of a tracer and of its backward pass, whose examples are those of several layers.

    Args:
        backward: Of one layer's examples.
        count: Of layers.
        device: Of the layers.
    """

    per_example, constant_statistics, slow = True, False, ()
    backward, place = Told.backward, Told.place

    def __init__(self, backward: BackwardPass, count: int, device: torch.device) -> None:
        self._whole, self._count = backward, count
        self._device = device
        self._answers: dict[int, tuple[Tensor, Tensor | None]] = {}

    def record(self, weight: ParameterView, contribution: Contribution) -> Tensor | None:
        """Take note of the squared norms, and of the sums over each group of each layer."""
        sums, whole, count = None, self._whole, self._count
        if not whole.weight_grads:
            sqnorm = contribution.sqnorm()
        elif whole.groups is not None:
            sqnorm, sums = contribution.sqnorm_and_groups(self._groups)
        elif isinstance(contribution, LinearContribution):
            x, g = contribution.input, contribution.grad_output
            x, g = (t.reshape(count, -1, t.shape[-1]).to(contribution.dtype) for t in (x, g))
            sqnorm, sums = contribution.sqnorm(), torch.bmm(g.mT, x)
        elif isinstance(contribution, Rows):
            rows = contribution.rows.reshape(count, whole.batch, *contribution.shape)
            sqnorm, sums = contribution.sqnorm(), rows.sum(1, dtype=contribution.dtype)
        else:
            sqnorm, sums = contribution.sqnorm_and_groups(self._groups)
        self._answers[id(weight.parameter)] = sqnorm, sums
        return None

    def tell(self, key: int, parameters: Sequence[nn.Parameter]) -> dict[Tensor, Tensor]:
        """Tell of the layers' parameters, in their order; return their gradients, if parameters get gradients.

        ``key``: the ``id`` of the first one.
        """
        whole, (sqnorm, sums) = self._whole, self._answers.pop(key)
        keys = [id(p) for p in parameters]
        whole.sqnorm.update(zip(keys, sqnorm.reshape(self._count, whole.batch).unbind(), strict=True))
        if sums is None:
            return {}
        if whole.groups is not None:
            sums = sums.unflatten(0, (self._count, -1))
            whole.group_grad.update(zip(keys, sums.unbind(), strict=True))
            sums = sums.sum(1)
        return dict(zip(parameters, _unbind(sums.to(parameters[0].dtype)), strict=True))

    @cached_property
    def _groups(self) -> Groups:
        """The groups of each layer, behind those of the one before."""
        own, count = self._whole.summation_groups(self._device), self._count
        first = own.num * torch.arange(count, device=self._device)
        groups = Groups.single(0, self._device)
        groups.ids, groups.num = (own.ids + first[:, None]).flatten(), own.num * count
        return groups


def _stacked(parts: Sequence[Tensor | None], axis: ExampleAxis, kind: str) -> Tensor | None:
    """Return tensors of several layers as those of one; see `_STACKED`."""
    given = [t for t in parts if t is not None]
    if not given:
        return None
    if kind == "w":
        return given[0]
    return torch.stack(given).repeat_interleave(axis.size, 0) if kind == "c" else torch.cat(given, axis.dim)


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


# what a layer's backward pass is given: w, a weight of which only the shape counts; c, a number for each channel; else
# something with rows for the examples
_STACKED = {Convolution: "xw", BatchNorm: "xwcccc"}
