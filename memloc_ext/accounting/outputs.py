"""What tells the examples of a loss apart: what the model returned for each, or losses by example."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor, nn

from memloc_ext.accounting.backward_pass import BackwardPass, GradientPass
from memloc_ext.accounting.contributions import scaled
from memloc_ext.accounting.example_axis import ExampleAxis, Picked
from memloc_ext.accounting.forward_pass import ForwardPass, has_own_hooks
from memloc_ext.accounting.graph import reached
from memloc_ext.accounting.tracer import Tracer
from memloc_ext.borrowing import without_hooks

_EXAMPLES = 2  # that a check takes
_random = random.Random(0)
_ROUNDING, _COARSE = {torch.float64: 1e-9, torch.float32: 1e-4}, 0.05  # of outputs, relative to an example's largest


@dataclass(frozen=True)
class Outputs:
    """What tells the examples apart: a loss is the sum of the products of these tensors with these cotangents.

    Attributes:
        tensors: Of all examples.
        cotangents: Of the loss by each.
        axes: Where the examples are in each.
        source: The call of the model that returned them, which can run again on other inputs; or None.
        mixed: Whether the tensors are losses by example, of which one depends on what the model returned for others.
    """

    tensors: list[Tensor]
    cotangents: list[Tensor]
    axes: list[ExampleAxis]
    source: ForwardPass | None = None
    mixed: bool = False

    def by_example(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return tensors like these as ``[batch, *]``, each example's as if it were alone."""
        return [axis.alone(t.detach().contiguous()) for t, axis in zip(tensors, self.axes, strict=True)]

    def cotangents_of(self, chosen: Tensor) -> list[Tensor]:
        """Return the cotangents of the chosen examples only, zeros elsewhere; ``chosen``: indices."""
        result = []
        for cotangent, axis in zip(self.cotangents, self.axes, strict=True):
            part = torch.zeros_like(cotangent, memory_format=torch.contiguous_format)
            axis.examples_first(part)[chosen] = axis.examples_first(cotangent)[chosen]
            result.append(part)
        return result

    def times(self, factors: Tensor) -> Outputs:
        """Return the same with each example's cotangents times its factor ``[batch]``."""
        result = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in self.cotangents]
        for to, cotangent, axis in zip(result, self.cotangents, self.axes, strict=True):
            axis.examples_first(to).copy_(scaled(axis.examples_first(cotangent), factors.to(to.device)))
        return replace(self, cotangents=result)


def outputs_of(
    tracer: Tracer, root: Tensor, losses: Tensor | None, parameters: Mapping[int, nn.Parameter], backward: BackwardPass
) -> Outputs | None:
    """Return tensors whose rows are the examples and through which alone a loss depends on parameters, or None.

    Args:
        tracer: That the loss was computed in.
        root: The loss.
        losses: By example, ``[batch, *]``, of which it is the sum; or None.
        parameters: By their ``id``.
        backward: Any backward pass of this batch.
    """
    own = None
    if losses is not None:
        own = Outputs([losses], [torch.ones_like(losses)], [ExampleAxis(0, 1, backward.batch, 1)])
    returned = [t for source in tracer.passes for t in source.outputs]
    outputs = minimal(root, tracer, returned, parameters)
    axes = [axis for t in outputs or () if (axis := _axis(tracer, t, backward)) is not None]
    if not outputs or len(axes) < len(outputs):
        return own
    with tracer.accounting(GradientPass(backward, {})):
        cotangents = torch.autograd.grad(root, outputs, retain_graph=True)
    sources = [source for source in tracer.passes if any(t is output for t in source.outputs for output in outputs)]
    source = sources[0] if len(sources) == 1 and sources[0].closed else None
    result = Outputs(outputs, list(cotangents), axes, source)
    if losses is not None and own is not None and _mixed(losses, result):
        return replace(own, mixed=True)
    return result


def minimal(
    root: Tensor, tracer: Tracer, outputs: Sequence[Tensor], parameters: Mapping[int, nn.Parameter]
) -> list[Tensor] | None:
    """Return the outputs through which alone a loss depends on the parameters, none through another; else None."""
    found = reached(root, tracer, parameters, outputs)
    chosen = [outputs[i] for i in sorted(found.stops)]
    if found.seen or found.unseen:
        return None
    for t in chosen:
        others = [other for other in chosen if other is not t]
        if reached(t, tracer, {}, others).stops:
            return None
    return chosen


def _axis(tracer: Tracer, t: Tensor, backward: BackwardPass) -> ExampleAxis | None:
    """Return where the examples are in what the model returned: if that cannot be told, where they were."""
    axis, dim = tracer.axis(t), tracer.batch_dim
    if axis is not None and not isinstance(axis, Picked) and backward.fits(axis):
        return backward.place(axis)
    return ExampleAxis(dim, 1, backward.batch, 1) if t.dim() > dim and t.shape[dim] == backward.batch else None


def _mixed(losses: Tensor, outputs: Outputs) -> bool:
    """Return whether an example's loss depends on what the model returned for others, as a contrastive one does."""
    for example in two_examples(outputs):
        own = losses[example].sum()
        gradients = torch.autograd.grad(own, outputs.tensors, retain_graph=True, materialize_grads=True)
        for gradient in outputs.by_example(gradients):
            others = gradient.abs() > 0  # False for NaN
            others[example] = False
            if others.any():
                return True
    return False


def two_examples(outputs: Outputs) -> list[int]:
    """Return two random examples, of those that have a finite part in the loss."""
    parts = outputs.by_example(outputs.cotangents)
    sizes = torch.stack([t.flatten(1).double().abs().sum(1) for t in parts]).sum(0)
    candidates = (sizes.isfinite() & (sizes > 0)).nonzero().flatten().tolist()
    return _random.sample(candidates, min(_EXAMPLES, len(candidates)))


def gradients_of(
    tracer: Tracer,
    backward: BackwardPass,
    outputs: Outputs,
    parameters: Mapping[int, nn.Parameter],
    chosen: Tensor | None = None,
    *,
    retain_graph: bool = True,
) -> dict[int, Tensor]:
    """Return the gradients of what the chosen examples, or all, add to the loss, by the ``id`` of each parameter."""
    cotangents = outputs.cotangents if chosen is None else outputs.cotangents_of(chosen)
    wanted = list(parameters.values())
    # the cotangents have been through the hooks
    with tracer.accounting(backward), without_hooks([*wanted, *outputs.tensors]):
        gradients = torch.autograd.grad(
            outputs.tensors, wanted, cotangents, retain_graph=retain_graph, allow_unused=True
        )
        with torch.no_grad():
            backward.finish()
    return _dense(parameters, gradients)


def _dense(parameters: Mapping[int, nn.Parameter], gradients: Sequence[Tensor | None]) -> dict[int, Tensor]:
    found = zip(parameters, gradients, strict=True)
    return {key: t.to_dense() if t.is_sparse else t for key, t in found if t is not None}


def whole_batch(
    tracer: Tracer, backward: BackwardPass, outputs: Outputs, parameters: Mapping[int, nn.Parameter]
) -> Callable[[Tensor], dict[int, Tensor]]:
    """Return what gives the gradients of chosen examples, by their indices, from a pass through the whole batch.

    Such a pass multiplies the NaN of one example by the zeros of the others' gradients. Where this spoils them, they
    are taken from a pass in which another example stands in its place, if there is one; see `_replaced`.
    """
    other = functools.cache(lambda: _replaced(tracer, outputs))
    wanted = list(parameters.values())

    def gradients(chosen: Tensor) -> dict[int, Tensor]:
        found = gradients_of(tracer, GradientPass(backward, parameters), outputs, parameters, chosen)
        if all(t.isfinite().all() for t in found.values()) or (replay := other()) is None:
            return found
        finite, healed = replay
        if not finite[chosen].all():
            return found
        with tracer.untraced(), without_hooks(wanted):  # as it ran, for what checkpointing recomputes
            pulled = torch.autograd.grad(
                healed.tensors, wanted, healed.cotangents_of(chosen), retain_graph=True, allow_unused=True
            )
        return _dense(parameters, pulled)

    return gradients


def _replaced(tracer: Tracer, outputs: Outputs) -> tuple[Tensor, Outputs] | None:
    """Run the model again with a finite example in the place of each whose input or output is not.

    With the same random numbers, and only where this leaves the outputs of the others as they were.

    Returns:
        Which examples are finite, ``[batch]``, and the outputs; or None.
    """
    source, expected = outputs.source, outputs.by_example(outputs.tensors)
    if source is None or has_own_hooks(source.model) or tracer.coarse:  # rounding would hide what batch norm mixes
        return None
    parts = expected + source.examples(len(expected[0]))
    finite = torch.stack([t.isfinite().flatten(1).all(1) for t in parts]).all(0)
    if not finite.any():
        return None
    places = torch.arange(len(finite), device=finite.device).where(finite, finite.int().argmax())
    try:
        with tracer.untraced(), source.same_random_numbers():
            again = source.again(outputs.tensors, source.rearranged(places), len(finite))
    except Exception:  # a model whose inputs are not tensors alone
        return None
    pairs = zip(outputs.by_example(again), expected, strict=True)
    same = all(agree(t[finite], own[finite], coarse=False) for t, own in pairs)
    return (finite, replace(outputs, tensors=again)) if same else None


def agree(actual: Tensor, expected: Tensor, coarse: bool) -> bool:
    """Return whether outputs of examples alone, ``[n, *]``, are those of the batch, up to rounding."""
    if actual.shape != expected.shape:
        return False
    allowed = _COARSE if coarse else _ROUNDING.get(actual.dtype, _COARSE)
    scale = expected.abs().nan_to_num(0, 0, 0).reshape(len(expected), -1).amax(1) if expected.numel() else expected
    error = (actual - expected).abs().nan_to_num(0).reshape(len(expected), -1)
    same = torch.equal(actual.isfinite(), expected.isfinite())
    return same and bool((error <= allowed * scale.reshape(-1, 1).clamp_min(1e-30)).all())


def no_outputs(tracer: Tracer, parameters: Mapping[int, nn.Parameter]) -> NoReturn:
    """Refuse a loss of which nothing tells what examples add to it."""
    names = [name for name, p in tracer.named_parameters() if id(p) in parameters]
    raise ValueError(
        f"GradientAccountant: nothing tells what each example adds to the gradients of {', '.join(names)}: call the "
        "model inside the with, and give a loss that depends on these parameters through what the model returns "
        "alone, without a penalty on weights; or losses by example, with loss_reduction='none'"
    )
