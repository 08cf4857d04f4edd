"""Hold the squared norms of two examples, by parameter, against the gradient that each adds to the batch's."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from memloc_ext.accounting.backward_pass import BackwardPass, GradientPass
from memloc_ext.accounting.contributions import Rows
from memloc_ext.accounting.forward_pass import ForwardPass
from memloc_ext.accounting.graph import Reached, reached
from memloc_ext.accounting.outputs import Outputs, agree, gradients_of, two_examples
from memloc_ext.accounting.tracer import Tracer

if TYPE_CHECKING:
    from memloc_ext.accounting.pattern import Pattern

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
class Known:
    """What is known of a model, for as long as it lives.

    Attributes:
        signatures: Of the passes that were checked.
        slow: Names of the parameters whose norms were found to be wrong.
        alone: Signature of a pass to whether examples alone had the gradients that they have in the batch.
        input_of_examples: Which of the model's inputs tells the number of examples, if it is not the first of several
            rows.
        patterns: Key of a call to the pattern of its graph; None if there is none.
        traced_only: Whether a pattern was found to be another one in a later step.
    """

    signatures: set[object] = field(default_factory=set)
    slow: set[str] = field(default_factory=set)
    alone: dict[object, bool] = field(default_factory=dict)
    input_of_examples: int | None = None
    patterns: dict[object, Pattern | None] = field(default_factory=dict)
    traced_only: bool = False


_known: weakref.WeakKeyDictionary[nn.Module, dict[object, Known]] = weakref.WeakKeyDictionary()


def known_of(model: nn.Module, told: object) -> Known:
    """Return what is known of a model, under what its user told of its inputs."""
    return _known.setdefault(model, {}).setdefault(told, Known())


@dataclass
class Checks:
    """What is checked of one backward pass of a model.

    Attributes:
        known: Of the model.
        mode: See ``check`` of `GradientAccountant`.
        model: That is accounted.
        tracer: That the loss was computed in.
        backward: The backward pass that is to come.
    """

    known: Known
    mode: str
    model: nn.Module
    tracer: Tracer
    backward: BackwardPass

    def due(self, found: Reached) -> bool:
        """Return whether norms are to be held against plain autograd."""
        tracer, batch = self.tracer, self.backward.batch
        if self.mode == "never" or batch < 2 or tracer.gathered or not found.seen or found.reentrant:
            return False
        # examples of several rows need not have as many in every batch
        done = all(source.rows in (None, batch) for source in tracer.passes)
        return self.mode == "always" or not done or self._last_signature(found) not in self.known.signatures

    def compare(self, outputs: Outputs | None, found: Reached) -> set[str]:
        """Add the covered parameters whose norms are not those of plain autograd to the slow ones; return their names.

        Batch normalisation takes the batch's statistics for constants in what is compared: with them, an example's loss
        depends on the other examples.
        """
        tracer, slow = self.tracer, self.backward.slow
        if outputs is None:
            if tracer.passes and not slow:
                self.known.signatures.add(self._last_signature(found))
                warnings.warn(_UNCHECKED, UserWarning, stacklevel=4)
            return set()
        parameters = {key: p for key, p in found.seen.items() if key not in slow}
        if not parameters:
            return set()
        trial = self.backward.trial()
        gradients_of(tracer, trial, outputs, parameters)
        wrong = _wrong_norms(tracer, trial, outputs, parameters)
        if wrong is None:
            return set()
        slow.update(wrong)
        self.known.signatures.add(self._last_signature(found))
        names = [name for name, p in tracer.named_parameters() if id(p) in wrong]
        self.known.slow.update(names)
        if names:
            warnings.warn(_DISAGREE[outputs.mixed].format(", ".join(names)), UserWarning, stacklevel=4)
        return set(names)

    def may_run_alone(self, source: ForwardPass, parameters: Mapping[int, nn.Parameter]) -> bool:
        """Return whether examples that the model runs on alone may have the gradients that they have in the batch.

        If they had not before, they have not now.
        """
        return self.mode == "always" or self.known.alone.get(self._signature(source, parameters), True)

    def ran_alone(self, outputs: Outputs, source: ForwardPass, parameters: Mapping[int, nn.Parameter]) -> bool:
        """Return whether they have, for two examples that were just accounted.

        Equal outputs do not tell: a hook of the user's may change gradients, a module may be used where a copy of the
        model does not reach it, and a branch with dropout may hardly change the output.
        """
        sign, known = self._signature(source, parameters), self.known.alone
        if self.mode == "always" or (self.mode == "first" and sign not in known):
            wrong = _wrong_norms(self.tracer, self.backward, outputs, parameters)
            if wrong is None:
                return True
            known[sign] = not wrong
        return known.get(sign, True)

    def _last_signature(self, found: Reached) -> object:
        return self._signature(self.tracer.passes[-1] if self.tracer.passes else None, found.seen)

    def _signature(self, source: ForwardPass | None, parameters: Mapping[int, nn.Parameter]) -> object:
        """Return what tells passes apart that must be checked anew: sizes count where they equal the batch's."""
        batch, inputs = self.backward.batch, source.inputs if source is not None else ()
        shapes = tuple((t.dtype, tuple(size == batch for size in t.shape)) for t in inputs)
        return batch, shapes, self._training, frozenset(parameters)

    @cached_property
    def _training(self) -> int:
        """A hash of the training flags."""
        return hash(tuple([module.training for module in self.tracer.members.modules]))


def _wrong_norms(
    tracer: Tracer, backward: BackwardPass, outputs: Outputs, parameters: Mapping[int, nn.Parameter]
) -> dict[int, nn.Parameter] | None:
    """Return the parameters whose norms are not those of two examples in the batch; None if that cannot be told."""
    result: dict[int, nn.Parameter] = {}
    examples = two_examples(outputs)
    for example in examples:
        plain = GradientPass(backward, parameters)
        chosen = torch.tensor([example], device=outputs.tensors[0].device)
        gradients = gradients_of(tracer, plain, outputs, parameters, chosen)
        exact = {key: float(Rows(gradient[None]).sqnorm()[0]) for key, gradient in gradients.items()}
        total = sum(exact.values())
        if not math.isfinite(total):  # another example's NaN, times zero
            return None
        for key, p in parameters.items():
            tolerance = _allowed(tracer, p)
            own, other = float(backward.sqnorm[key][example]) if key in backward.sqnorm else 0.0, exact.get(key, 0.0)
            if not abs(own - other) <= tolerance[0] * max(own, other) + tolerance[1] * total:
                result[key] = p
    return result if examples else None


def differ(tracer: Tracer, one: BackwardPass, other: BackwardPass, parameters: Mapping[int, nn.Parameter]) -> bool:
    """Return whether two backward passes found other norms, beyond rounding."""
    if not parameters.keys() <= one.sqnorm.keys() & other.sqnorm.keys():
        return True
    total = torch.stack([other.sqnorm[key].double() for key in parameters]).sum(0)
    for key, p in parameters.items():
        of_own, of_total = _allowed(tracer, p)
        a, b = one.sqnorm[key].double(), other.sqnorm[key].double()
        if not bool(((a - b).abs() <= of_own * torch.maximum(a, b) + of_total * total).all()):
            return True
    return False


def _allowed(tracer: Tracer, p: Tensor) -> tuple[float, float]:
    """Return how far the squared norms of a parameter may be apart, of themselves and of those of all parameters."""
    return _TOLERANCE_16_BITS if tracer.coarse else _TOLERANCE.get(p.dtype, _TOLERANCE_16_BITS)


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
    if source is None or not all(any(t is own for own in source.numbers) for t in numbers):
        return
    with tracer.accounting(GradientPass(backward, {})):
        factors = torch.autograd.grad(loss, numbers, retain_graph=True)
        cotangents = torch.autograd.grad(numbers, outputs.tensors, factors, retain_graph=True, allow_unused=True)
    if any(t is None for t in cotangents):
        return
    inputs, expected = source.examples(backward.batch), outputs.by_example(outputs.tensors)
    parts = outputs.by_example([backward.batch * t for t in cotangents])
    for example in two_examples(outputs):
        try:
            with tracer.untraced():
                found = source.again([*numbers, *outputs.tensors], [t[example] for t in inputs], backward.batch)
                own, alone = found[: len(numbers)], found[len(numbers) :]
                gradients = torch.autograd.grad(own, alone, factors)
        except Exception:  # a model that takes whole batches only
            return
        for output, gradient, same, part in zip(alone, gradients, expected, parts, strict=True):
            right = agree(gradient[None], part[[example]], tracer.coarse)
            if agree(output.detach()[None], same[[example]], tracer.coarse) and not right:
                raise ValueError(
                    "GradientAccountant: loss_reduction='mean' needs the mean of the examples' own losses, but the "
                    "model returned one that weights them in another way, as a mean over tokens of unequal numbers "
                    "does; give losses by example and loss_reduction='none', or example_weights="
                )


def mistook(known: Known, tracer: Tracer, loss: Tensor, batch: int, several_rows: bool) -> bool:
    """Return whether the examples were looked for in an input that has no row for each; remember the right one."""
    for source in tracer.passes:
        if source.rows in (None, batch):
            continue
        where = None
        if batch in source.sizes:
            known.input_of_examples = source.sizes.index(batch)
            where = "another has {batch}, the number of examples"
        elif several_rows and source.rows % max(1, batch) and (loss.dim() or source.returned_rows(batch)):
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


def known_slow(known: Known, tracer: Tracer, found: Reached) -> dict[int, nn.Parameter]:
    """Return the covered parameters whose norms were found to be wrong before."""
    named = tracer.named_parameters() if known.slow else ()
    return {id(p): p for name, p in named if name in known.slow and id(p) in found.seen}
