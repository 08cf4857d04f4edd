"""Steps that run on PyTorch's own layers, once a traced step has found out what they are: no function is watched.

The first step of a model, of inputs of some shapes, is traced. Then the model runs once more on the same inputs,
untraced; if its autograd graph holds the layers that were traced, and they tell the same norms, the graph is kept as a
`Pattern`, and the step is accounted by it. A later pass of the same key runs untraced: the nodes of its graph tell the
layers' inputs and gradients. A graph that is another one then takes a pass per example, with a warning.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import Self

from memloc_ext.accounting.backward_pass import BackwardPass, GradientPass, Repeated
from memloc_ext.accounting.check import Checks, Known, differ
from memloc_ext.accounting.contributions import Contribution, LinearContribution, Rows
from memloc_ext.accounting.example_axis import ExampleAxis, Picked
from memloc_ext.accounting.forward_pass import ForwardPass, has_own_hooks
from memloc_ext.accounting.graph import Reached, reached
from memloc_ext.accounting.layers.convolution import Convolution
from memloc_ext.accounting.layers.elementwise import Broadcast
from memloc_ext.accounting.layers.layer_function import LayerFunction, exactly
from memloc_ext.accounting.layers.normalization import BatchNorm
from memloc_ext.accounting.outputs import Outputs, gradients_of, minimal
from memloc_ext.accounting.pattern import SMALL, STACKED, Pattern, Place, pattern_of
from memloc_ext.accounting.tracer import Tracer
from memloc_ext.accounting.uses import ParameterView
from memloc_ext.borrowing import any_of, any_sharded, kept_random_numbers, kept_state, without_hooks
from memloc_ext.ops import Groups

_PATTERNS = 64  # that are kept of a model
_PLAIN = (int, float, str, bool, type(None))
_split: Any = torch.split_with_sizes_copy  # gradients are no views of each other
_unbind: Any = torch.unbind_copy
_OTHER = (
    "GradientAccountant: the model computed something else than in earlier steps with inputs of the same shapes, or "
    "the loss depends on parameters otherwise than through what it returned: in this step every layer takes a pass per "
    "example; check='always' follows each step from its start"
)


def key_of(tracer: Tracer, source: ForwardPass) -> object:
    """Return what tells calls of a model apart whose graphs may differ; None if it must be traced."""
    modules = tracer.members.modules
    if not source.closed or any_sharded(modules) or any_of(modules, DistributedDataParallel):
        return None
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:  # pyright: ignore
        return None
    given: list[object] = []
    if not _describe((source.args, source.kwargs), given):
        return None
    with torch._C.DisableTorchFunction():
        if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in tracer.parameters.values()):
            return None
        trained = tuple([p.requires_grad for p in tracer.parameters.values()])
    training = tuple([module.training for module in modules])
    return tuple(given), tuple(tracer.parameters), trained, training, source.autocast, source.rows


def _describe(tree: object, found: list[object]) -> bool:
    """Append what matters of a model's inputs to a list; return whether all are tensors, numbers and texts."""
    if isinstance(tree, Tensor):
        found.append((tree.shape, tree.stride(), tree.dtype, tree.device, tree.requires_grad, type(tree)))
        return True
    if isinstance(tree, _PLAIN):
        found.append((type(tree), tree))
        return True
    if isinstance(tree, tuple | list):
        found.append((type(tree), len(tree)))
        return all(_describe(inner, found) for inner in tree)
    if isinstance(tree, dict):
        found.append(tuple(tree))
        return all(_describe(inner, found) for inner in tree.values())
    return False


def begin(known: Known, tracer: Tracer, source: ForwardPass, *, checked: bool) -> None:
    """Have the tracer stand aside for a call of the model that begins, if its pattern is known.

    Args:
        known: Of the model.
        tracer: Of the step.
        source: The call.
        checked: Whether the pattern's norms must have been held against plain autograd.
    """
    if known.traced_only or known.slow or len(tracer.passes) > 1 or tracer.calls:
        return
    source.key = key_of(tracer, source)
    pattern = None if source.key is None else known.patterns.get(source.key)
    if pattern is not None and (pattern.checked or not checked) and tracer.stand_aside():
        source.pattern = pattern


def end(tracer: Tracer) -> None:
    """Have the tracer see functions again after a call of the model, and know where the examples are."""
    tracer.stand_in()
    source = tracer.passes[-1] if tracer.passes else None
    if source is not None and source.pattern is not None:
        for t, axis, shape in zip(source.outputs, source.pattern.axes, source.pattern.shapes, strict=False):
            if t.shape == shape:
                tracer.remember(t, axis)


def found_untraced(known: Known, tracer: Tracer, root: Tensor, batch: int) -> Reached | None:
    """Return what a loss depends on if the model ran untraced and its graph is the pattern; None if it was traced.

    If the graph is another one, every parameter is unseen, and from now on the model is traced.
    """
    sources = [source for source in tracer.passes if source.pattern is not None]
    if not sources:
        return None
    source, everything = sources[0], [t for own in tracer.passes for t in own.outputs]
    found = reached(root, tracer, tracer.parameters, everything)
    pattern: Any = source.pattern
    nodes = None
    if len(tracer.passes) == 1 and not found.all and source.rows == batch and not known.slow:
        nodes = pattern.match(source.outputs, found.stops)
    if nodes is None:
        known.patterns, known.traced_only = {}, True
        warnings.warn(_OTHER, UserWarning, stacklevel=3)
        whole = reached(root, tracer, tracer.parameters)
        return Reached(unseen=whole.all, nodes=whole.nodes)
    below = [nodes[i].variable for place in pattern.places for i in place.parameters.values()]
    found.matched = (pattern, nodes)
    found.seen = {id(p): p for p in below}
    found.uses.update(found.seen.keys())
    return found


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


def learn(checks: Checks, root: Tensor, found: Reached, retain_graph: bool) -> dict[Tensor, Tensor] | None:
    """Find the pattern of a step that was traced, if it is the first of its key, and account the step by it.

    So the first step and later ones tell the same numbers, bit for bit.

    Args:
        checks: Of the step.
        root: Of which the gradient is taken.
        found: What it depends on.
        retain_graph: Whether the graph that was traced is kept.

    Returns:
        What leaves are to be given; None if the step is to be accounted as it was traced.
    """
    tracer, backward, known = checks.tracer, checks.backward, checks.known
    source = tracer.passes[-1] if len(tracer.passes) == 1 else None
    if source is None or source.key is None or source.key in known.patterns or known.traced_only or retain_graph:
        return None
    if len(known.patterns) >= _PATTERNS or found.unseen or backward.slow or known.slow or not found.seen:
        return None
    if source.numbers or found.reentrant or source.rows != backward.batch or checks.due(found):
        return None
    known.patterns[source.key] = None
    chosen = minimal(root, tracer, source.outputs, found.all) if _simple(tracer, found) else None
    if not chosen or has_own_hooks(checks.model):
        return None
    leaves = reached(root, tracer, {}, chosen).others
    with tracer.accounting(GradientPass(backward, {})):
        gradients = torch.autograd.grad(root, [*chosen, *leaves], retain_graph=True, allow_unused=True)
    cotangents, above = gradients[: len(chosen)], zip(leaves, gradients[len(chosen) :], strict=True)
    if any(t is None for t in cotangents):
        return None
    with kept_state(checks.model), kept_random_numbers(), source.same_random_numbers():
        try:
            outputs = Outputs(chosen, [t for t in cotangents if t is not None], [])
            again = _again(checks, found, source, outputs)
        except Exception:  # a model that cannot run again, or functions that hide what they keep
            return None
        if again is None:
            return None
        (pattern, _), roots = again
        known.patterns[source.key] = pattern
        with torch._C.DisableTorchFunction():
            written = run(tracer, backward, again[0], roots, outputs.cotangents, (), retain_graph=False)
    return written | {leaf: t for leaf, t in above if t is not None}


def _again(
    checks: Checks, found: Reached, source: ForwardPass, outputs: Outputs
) -> tuple[tuple[Pattern, list[Any]], list[Tensor]] | None:
    """Run the model again; return the pattern of its graph, with the nodes, and what is now in the place of outputs.

    None if the graph is not that of the layers that were traced, or tells other norms.
    """
    tracer, backward = checks.tracer, checks.backward
    axes = [axis for t in source.outputs if (axis := tracer.axis(t)) is not None and not isinstance(axis, Picked)]
    trial = replace(backward, groups=None, weight_grads=False, queries=None, clipped=False)
    with tracer.untraced():
        returned = source.again(source.outputs, source.parts(backward.batch), backward.batch)
    if len(axes) < len(returned) or not all(map(torch.equal, returned, source.outputs)):
        return None
    places = [next(i for i, t in enumerate(source.outputs) if t is own) for own in outputs.tensors]
    pattern = pattern_of(returned, places, axes, found.layers, tracer.parameters, checks.mode != "never")
    nodes = pattern and pattern.match(returned, places)
    if pattern is None or nodes is None:
        return None
    gradients_of(tracer, trial, outputs, found.seen)
    if not all(bool(norms.isfinite().all()) for norms in trial.sqnorm.values()):
        del checks.known.patterns[source.key]  # nothing to be held against, in this step
        return None
    roots, other = [returned[i] for i in places], replace(trial)
    with torch._C.DisableTorchFunction():
        run(tracer, other, (pattern, nodes), roots, outputs.cotangents, (), retain_graph=True)
    return None if differ(tracer, other, trial, found.seen) else ((pattern, nodes), roots)


def _simple(tracer: Tracer, found: Reached) -> bool:
    """Return whether each parameter is used once, as it is, by a layer whose examples lie in a plain order."""
    calls = tracer.calls | found.uses
    once = all(calls[key] == 1 for key in found.seen)
    return once and not tracer.picks and all(_is_plain(layer) for layer in found.layers)


def _is_plain(layer: LayerFunction) -> bool:
    weights = [weight for weight in layer.weights if weight is not None]
    if isinstance(layer.axis, Picked) or layer.output_shape is None:
        return False
    whole = isinstance(layer, Broadcast) and layer.source.indices is None
    return all(w.derived is None and (whole or w.is_parameter) for w in weights)
