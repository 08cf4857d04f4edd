"""Hold the squared norms of two examples, by parameter, against the gradient that each adds to the batch's."""

from __future__ import annotations

import math
import random
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from memloc_ext.accounting.backward_pass import BackwardPass, GradientPass
from memloc_ext.accounting.contributions import Rows
from memloc_ext.accounting.example_axis import ExampleAxis
from memloc_ext.accounting.forward_pass import ForwardPass
from memloc_ext.accounting.graph import Outputs, Reached, minimal, reached
from memloc_ext.accounting.per_example import agree, gradients_of
from memloc_ext.accounting.tracer import Tracer

_EXAMPLES = 2
_random = random.Random(0)
# how far a squared norm may be off: of itself, and of all parameters' together; rounding stays far below
_TOLERANCE = {torch.float64: (1e-6, 1e-20), torch.float32: (2e-3, 1e-10)}
_TOLERANCE_16_BITS = (0.1, 1e-4)
# by whether the losses of examples depend on each other
_DISAGREE = {
    False: "GradientAccountant: a check of two examples found norms that disagree with autograd, of {}: from now on "
    "these parameters take a pass per example; name inputs that are the same for all examples in shared_inputs, and "
    "give batch_size only where each example has the same number of consecutive rows, as stack(..., 1).flatten(0, 1) "
    "makes them",
    True: "GradientAccountant: an example's loss depends on what the model returned for others, as a contrastive loss "
    "does: the norms of {} are of each example's own loss and take a backward pass per example; give the sum of the "
    "losses and loss_reduction='sum' for the gradient that flows through each example's own activations",
}
_UNCHECKED = (
    "GradientAccountant: the loss depends on parameters in another way than through what the model returns for each "
    "example, as with a load-balancing term: the norms are of the gradient that flows through each example's own "
    "activations, and were not checked; account the loss without that term, or give losses by example and "
    "loss_reduction='none'"
)


@dataclass
class Checked:
    """What is known of a model, for as long as it lives.

    Attributes:
        signatures: Of the passes that were checked.
        slow: Names of the parameters whose norms were found to be wrong.
        alone: Signature of a pass to whether examples alone had the gradients that they have in the batch.
        input_of_examples: Which of the model's inputs tells the number of examples, if it is not the first of several
            rows.
    """

    signatures: set[object] = field(default_factory=set)
    slow: set[str] = field(default_factory=set)
    alone: dict[object, bool] = field(default_factory=dict)
    input_of_examples: int | None = None


_checked: weakref.WeakKeyDictionary[nn.Module, dict[object, Checked]] = weakref.WeakKeyDictionary()


def checked(model: nn.Module, told: object = None) -> Checked:
    """Return what is known of a model, under what its user told of its inputs."""
    return _checked.setdefault(model, {}).setdefault(told, Checked())


def signature(
    model: nn.Module, source: ForwardPass | None, batch: int, parameters: Mapping[int, nn.Parameter]
) -> object:
    """Return what tells passes apart that must be checked anew: sizes count where they equal the batch's."""
    inputs = source.inputs if source is not None else ()
    shapes = tuple((t.dtype, tuple(size == batch for size in t.shape)) for t in inputs)
    flags = hash(tuple(module.training for module in model.modules()))
    return batch, shapes, flags, frozenset(parameters)


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
    returned = [(t, source) for source in tracer.passes for t in source.outputs]
    outputs = minimal(root, tracer, [t for t, _ in returned], parameters)
    axes = [tracer.output_axis(t, backward) for t in outputs or ()]
    if not outputs or None in axes:
        return own
    with tracer.accounting(GradientPass(backward, {})):
        cotangents = torch.autograd.grad(root, outputs, retain_graph=True)
    sources = {id(source): source for t, source in returned if any(t is output for output in outputs)}
    source = next(iter(sources.values())) if len(sources) == 1 else None
    result = Outputs(outputs, list(cotangents), [axis for axis in axes if axis is not None], source)
    if losses is not None and own is not None and _mixed(losses, result, backward):
        return replace(own, mixed=True)
    return result


def different(
    tracer: Tracer, backward: BackwardPass, outputs: Outputs, parameters: Mapping[int, nn.Parameter]
) -> dict[int, nn.Parameter] | None:
    """Return the parameters whose norms are not those of plain autograd; None if that cannot be told.

    Batch normalisation takes the batch's statistics for constants in what is compared: with them, an example's loss
    depends on the other examples.

    Args:
        tracer: That the layers are part of.
        backward: The backward pass that is to come.
        outputs: What tells the examples apart.
        parameters: To be checked, by their ``id``.
    """
    trial = backward.trial()
    gradients_of(tracer, trial, outputs, parameters)
    return wrong_norms(tracer, trial, outputs, parameters)


def wrong_norms(
    tracer: Tracer, backward: BackwardPass, outputs: Outputs, parameters: Mapping[int, nn.Parameter]
) -> dict[int, nn.Parameter] | None:
    """Return the parameters whose norms are not those of two examples' gradients in the batch, or None; see above."""
    result: dict[int, nn.Parameter] = {}
    examples = _two_examples(backward, outputs)
    for example in examples:
        plain = GradientPass(backward, parameters)
        plain.constant_statistics = backward.constant_statistics
        chosen = torch.tensor([example], device=outputs.tensors[0].device)
        gradients = gradients_of(tracer, plain, outputs, parameters, chosen)
        exact = {key: float(Rows(gradient[None]).sqnorm()[0]) for key, gradient in gradients.items()}
        total = sum(exact.values())
        if not math.isfinite(total):  # another example's NaN, times zero
            return None
        for key, p in parameters.items():
            tolerance = _TOLERANCE_16_BITS if tracer.coarse else _TOLERANCE.get(p.dtype, _TOLERANCE_16_BITS)
            own, other = float(backward.sqnorm[key][example]) if key in backward.sqnorm else 0.0, exact.get(key, 0.0)
            if not abs(own - other) <= tolerance[0] * max(own, other) + tolerance[1] * total:
                result[key] = p
    return result if examples else None


@dataclass(frozen=True)
class Alone:
    """Whether examples that the model runs on alone have the gradients that they have in the batch.

    Equal outputs do not tell: a hook of the user's may change gradients, a module may be used where a copy of the model
    does not reach it, and a branch with dropout may hardly change the output.

    Attributes:
        known: Of the model.
        check: See `GradientAccountant`.
        sign: The `signature` of the pass.
        wrong: See `wrong_norms`.
    """

    known: Checked
    check: str
    sign: object
    wrong: Callable[[], dict[int, nn.Parameter] | None]

    @property
    def expected(self) -> bool:
        """Whether they may have; if they had not before, they have not now."""
        return self.check == "always" or self.known.alone.get(self.sign, True)

    def right(self) -> bool:
        """Return whether they have, for two examples that were just accounted."""
        if self.check == "always" or (self.check == "first" and self.sign not in self.known.alone):
            wrong = self.wrong()
            if wrong is None:
                return True
            self.known.alone[self.sign] = not wrong
        return self.known.alone.get(self.sign, True)


def _mixed(losses: Tensor, outputs: Outputs, backward: BackwardPass) -> bool:
    """Return whether an example's loss depends on what the model returned for others, as a contrastive one does."""
    for example in _two_examples(backward, outputs):
        gradients = torch.autograd.grad(losses[example].sum(), outputs.tensors, retain_graph=True, allow_unused=True)
        for gradient, axis in zip(gradients, outputs.axes, strict=True):
            if gradient is not None:
                others = backward.place(axis).first(gradient.contiguous()).abs() > 0  # False for NaN
                others[example] = False
                if others.any():
                    return True
    return False


def returned_by_model(tracer: Tracer, loss: Tensor) -> list[Tensor]:
    """Return the single numbers, returned by the model, that a loss depends on."""
    numbers = [t for source in tracer.passes for t in source.numbers]
    return [numbers[i] for i in sorted(reached(loss, tracer, {}, numbers).stops)] if numbers else []


def check_own_mean(
    tracer: Tracer, loss: Tensor, numbers: Sequence[Tensor], outputs: Outputs, backward: BackwardPass
) -> None:
    """Refuse a loss that the model returned and that is not the mean of its examples' own, by two of them alone.

    Args:
        tracer: That the loss was computed in.
        loss: Computed from what the model returned.
        numbers: Which it depends on, see `returned_by_model`.
        outputs: What tells the examples apart.
        backward: Any backward pass of this batch.

    Raises:
        ValueError: If an example alone has another gradient of the loss by the model's output.
    """
    source = outputs.source
    if source is None or not source.closed or not all(any(t is own for own in source.numbers) for t in numbers):
        return
    with tracer.accounting(GradientPass(backward, {})):
        factors = torch.autograd.grad(loss, numbers, retain_graph=True)
        cotangents = torch.autograd.grad(numbers, outputs.tensors, factors, retain_graph=True, allow_unused=True)
    if any(t is None for t in cotangents):
        return
    inputs = source.examples(backward.batch)
    axes = [backward.place(axis) for axis in outputs.axes]
    for example in _two_examples(backward, outputs):
        try:
            with tracer.not_looking(), torch.enable_grad():
                found = source.again([*numbers, *outputs.tensors], [t[example] for t in inputs], backward.batch, {})
                own, alone = found[: len(numbers)], found[len(numbers) :]
                gradients = torch.autograd.grad(own, alone, factors)
        except Exception:  # a model that takes whole batches only
            return
        for i, axis in enumerate(axes):
            both = (outputs.tensors[i].detach(), cotangents[i])
            whole, part = (axis.first(t.contiguous())[[example]] for t in both)
            output, gradient = (axis.alone().first(t.detach()) for t in (alone[i], gradients[i]))
            if agree(output, whole, tracer.coarse) and not agree(gradient, backward.batch * part, tracer.coarse):
                raise ValueError(
                    "GradientAccountant: loss_reduction='mean' needs the mean of the examples' own losses, but the "
                    "model returned one that weights them in another way, as a mean over tokens of unequal numbers "
                    "does; give losses by example and loss_reduction='none', or example_weights="
                )


def _two_examples(backward: BackwardPass, outputs: Outputs) -> list[int]:
    """Return two examples, of those that have a finite part in the loss."""
    sizes = torch.stack(
        [
            backward.place(axis).first(t.contiguous()).reshape(backward.batch, -1).double().abs().sum(1)
            for t, axis in zip(outputs.cotangents, outputs.axes, strict=True)
        ]
    ).sum(0)
    candidates = (sizes.isfinite() & (sizes > 0)).nonzero().flatten().tolist()
    return _random.sample(candidates, min(_EXAMPLES, len(candidates)))


def mistook(known: Checked, tracer: Tracer, loss: Tensor, batch: int, several: bool) -> bool:
    """Return whether the examples were looked for in an input that has no row for each; remember the right one."""
    for source in tracer.passes:
        if source.rows in (None, batch):
            continue
        where = None
        if batch in source.sizes:
            known.input_of_examples = source.sizes.index(batch)
            where = "another has {batch}, the number of examples"
        elif several and source.rows % max(1, batch) and (loss.dim() or source.returned_rows(batch)):
            where = "batch_size is {batch}, which does not divide that"
        if where is not None:
            warnings.warn(
                f"GradientAccountant: the model's first input has {source.rows} rows, and "
                f"{where.format(batch=batch)}: every layer takes a pass per example in this step; name inputs that "
                "are the same for all examples in shared_inputs",
                UserWarning,
                stacklevel=3,
            )
            return True
    return False


def known_slow(known: Checked, tracer: Tracer, found: Reached) -> dict[int, nn.Parameter]:
    """Return the covered parameters whose norms were found to be wrong before."""
    named = tracer.named_parameters() if known.slow else ()
    return {id(p): p for name, p in named if name in known.slow and id(p) in found.seen}


def unchecked_signature(
    known: Checked, check: str, model: nn.Module, tracer: Tracer, batch: int, found: Reached
) -> object | None:
    """Return what a pass is remembered by, if it is to be checked."""
    if check == "never" or batch < 2 or tracer.whole or not found.seen or found.reentrant:
        return None
    source = tracer.passes[-1] if tracer.passes else None
    sign = signature(model, source, batch, found.seen)
    # examples of several rows need not have as many in every batch
    done = sign in known.signatures and all(source.rows in (None, batch) for source in tracer.passes)
    return None if check == "first" and done else sign


def compare(
    known: Checked, tracer: Tracer, backward: BackwardPass, outputs: Outputs | None, found: Reached, sign: object
) -> set[str]:
    """Add the covered parameters whose norms are not those of plain autograd to the slow ones; return their names."""
    if outputs is None:
        if tracer.passes and not backward.slow:
            known.signatures.add(sign)
            warnings.warn(_UNCHECKED, UserWarning, stacklevel=3)
        return set()
    parameters = {key: p for key, p in found.seen.items() if key not in backward.slow}
    wrong = different(tracer, backward, outputs, parameters) if parameters else None
    if wrong is None:
        return set()
    backward.slow.update(wrong)
    known.signatures.add(sign)
    names = [name for name, p in tracer.named_parameters() if id(p) in wrong]
    known.slow.update(names)
    if names:
        warnings.warn(_DISAGREE[outputs.mixed].format(", ".join(names)), UserWarning, stacklevel=3)
    return set(names)
