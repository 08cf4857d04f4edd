"""Steps that run on PyTorch's own layers, once a traced step has found out what they are: no function is watched.

The first step of a model, of inputs of some shapes, is traced. Then the model runs once more on the same inputs,
untraced; if its autograd graph holds the layers that were traced, and they tell the same norms, the graph is kept as a
`Pattern`, and the step is accounted by it. A later pass of the same key runs untraced: the nodes of its graph tell the
layers' inputs and gradients. A graph that is another one then takes a pass per example, with a warning.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from memloc_ext.accounting.backward_pass import GradientPass
from memloc_ext.accounting.check import Checks, Known, differ
from memloc_ext.accounting.example_axis import Picked
from memloc_ext.accounting.forward_pass import ForwardPass, has_own_hooks
from memloc_ext.accounting.graph import Reached, reached
from memloc_ext.accounting.layers.elementwise import Broadcast
from memloc_ext.accounting.layers.layer_function import LayerFunction
from memloc_ext.accounting.outputs import Outputs, gradients_of, minimal
from memloc_ext.accounting.pattern import Pattern
from memloc_ext.accounting.recognise import pattern_of
from memloc_ext.accounting.told import run
from memloc_ext.accounting.tracer import Tracer
from memloc_ext.borrowing import any_of, any_sharded, kept_random_numbers, kept_state

_PATTERNS = 64  # that are kept of a model
_PLAIN = (int, float, str, bool, type(None))
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
    found.matched = (pattern, nodes)
    found.seen = {key: tracer.parameters[key] for key in pattern.leaves.values() if key}
    found.uses.update(found.seen.keys())
    return found


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
