"""Hold the norms of two examples against plain autograd, which does not need to know where the examples are."""

from __future__ import annotations

import math
import random
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from memloc_ext.accounting.forward_pass import ForwardPass
from memloc_ext.accounting.graph import Outputs, minimal
from memloc_ext.accounting.layout import Layout
from memloc_ext.accounting.one_by_one import agree, by_example, gradients_of
from memloc_ext.accounting.run import OneByOne, Run
from memloc_ext.accounting.session import Session
from memloc_ext.accounting.uses import Rows

_EXAMPLES = 2
_random = random.Random(0)
# how far a squared norm may be off: of itself, and of all parameters' together; rounding stays far below
_TOLERANCE = {torch.float64: (1e-6, 1e-20), torch.float32: (2e-3, 1e-10)}
_TOLERANCE_16_BITS = (0.1, 1e-4)


@dataclass
class Checked:
    """What is known of a model, for as long as it lives.

    Attributes:
        signatures: Of the passes that were checked.
        slow: Names of the parameters whose norms were found to be wrong.
        input_of_examples: Which of the model's inputs tells the number of examples, if it is not the first of several
            rows.
    """

    signatures: set[object] = field(default_factory=set)
    slow: set[str] = field(default_factory=set)
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
    session: Session, root: Tensor, losses: Tensor | None, parameters: Mapping[int, nn.Parameter], run: Run
) -> Outputs | None:
    """Return tensors whose rows are the examples and through which alone a loss depends on parameters, or None.

    Args:
        session: That the loss was computed in.
        root: The loss.
        losses: By example, ``[batch, *]``, of which it is the sum; or None.
        parameters: By their ``id``.
        run: Any backward pass of this batch.
    """
    own = None
    if losses is not None:
        own = Outputs([losses], [torch.ones_like(losses)], [Layout(0, 1, run.batch, 1)])
    returned = [(t, source) for source in session.passes for t in source.outputs]
    outputs = minimal(root, session, [t for t, _ in returned], parameters)
    layouts = [session.output_layout(t, run) for t in outputs or ()]
    if not outputs or None in layouts:
        return own
    with session.accounting(OneByOne(run, {})):
        cotangents = torch.autograd.grad(root, outputs, retain_graph=True)
    sources = {id(source): source for t, source in returned if any(t is output for output in outputs)}
    source = next(iter(sources.values())) if len(sources) == 1 else None
    result = Outputs(outputs, list(cotangents), [layout for layout in layouts if layout is not None], source)
    if losses is not None and own is not None and _meet(losses, result, run):
        return replace(own, meeting=True)
    return result


def different(
    session: Session, run: Run, outputs: Outputs, parameters: Mapping[int, nn.Parameter]
) -> dict[int, nn.Parameter] | None:
    """Return the parameters whose norms are not those of plain autograd; None if that cannot be told.

    Batch normalisation takes the batch's statistics for constants in what is compared: with them, an example's loss
    depends on the other examples.

    Args:
        session: That the layers are part of.
        run: The backward pass that is to come.
        outputs: What tells the examples apart.
        parameters: To be checked, by their ``id``.
    """
    trial = run.trial()
    gradients_of(session, trial, outputs, parameters)
    result: dict[int, nn.Parameter] = {}
    examples = _two_examples(trial, outputs)
    for example in examples:
        plain = OneByOne(trial, parameters)
        plain.constant_statistics = True
        chosen = torch.tensor([example], device=outputs.tensors[0].device)
        gradients = gradients_of(session, plain, outputs, parameters, chosen)
        exact = {key: float(Rows(gradient[None]).sqnorm()[0]) for key, gradient in gradients.items()}
        total = sum(exact.values())
        if not math.isfinite(total):  # another example's NaN, times zero
            return None
        for key, p in parameters.items():
            tolerance = _TOLERANCE_16_BITS if session.coarse else _TOLERANCE.get(p.dtype, _TOLERANCE_16_BITS)
            own, other = float(trial.sqnorm[key][example]) if key in trial.sqnorm else 0.0, exact.get(key, 0.0)
            if not abs(own - other) <= tolerance[0] * max(own, other) + tolerance[1] * total:
                result[key] = p
    return result if examples else None


def _meet(losses: Tensor, outputs: Outputs, run: Run) -> bool:
    """Return whether an example's loss depends on what the model returned for others, as a contrastive one does."""
    for example in _two_examples(run, outputs):
        gradients = torch.autograd.grad(losses[example].sum(), outputs.tensors, retain_graph=True, allow_unused=True)
        for gradient, layout in zip(gradients, outputs.layouts, strict=True):
            if gradient is not None:
                others = run.place(layout).first(gradient.contiguous()).abs() > 0  # False for NaN
                others[example] = False
                if others.any():
                    return True
    return False


def returned_by_model(session: Session, loss: Tensor, parameters: Mapping[int, nn.Parameter]) -> list[Tensor]:
    """Return the single numbers, returned by the model, through which alone a loss depends on parameters; or none."""
    numbers = [t for source in session.passes for t in source.numbers]
    return (minimal(loss, session, numbers, parameters) or []) if numbers else []


def check_own_mean(session: Session, loss: Tensor, numbers: Sequence[Tensor], outputs: Outputs, run: Run) -> None:
    """Refuse a loss that the model returned and that is not the mean of its examples' own, by two of them alone.

    Args:
        session: That the loss was computed in.
        loss: Computed from what the model returned.
        numbers: Which it depends on, see `returned_by_model`.
        outputs: What tells the examples apart.
        run: Any backward pass of this batch.

    Raises:
        ValueError: If an example alone has another gradient of the loss by the model's output.
    """
    source = outputs.source
    if source is None or not source.closed or not all(any(t is own for own in source.numbers) for t in numbers):
        return
    factors = torch.autograd.grad(loss, numbers, retain_graph=True)
    inputs = [by_example(t.detach(), session.batch_dim, run.batch) for t in source.parts(run.batch)]
    layouts = [run.place(layout) for layout in outputs.layouts]
    for example in _two_examples(run, outputs):
        try:
            with session.not_looking(), torch.enable_grad():
                found = source.again([*numbers, *outputs.tensors], [t[example] for t in inputs], run.batch, {})
                own, alone = found[: len(numbers)], found[len(numbers) :]
                gradients = torch.autograd.grad(own, alone, factors)
        except Exception:  # a model that takes whole batches only
            return
        for i, layout in enumerate(layouts):
            both = (outputs.tensors[i].detach(), outputs.cotangents[i])
            whole, part = (layout.first(t.contiguous())[[example]] for t in both)
            output, gradient = (layout.alone().first(t.detach()) for t in (alone[i], gradients[i]))
            if agree(output, whole, session.coarse) and not agree(gradient, run.batch * part, session.coarse):
                raise ValueError(
                    "GradientAccountant: loss_reduction='mean' needs the mean of the examples' own losses, but the "
                    "model returned one that weights them in another way, as a mean over tokens of unequal numbers "
                    "does; give losses by example and loss_reduction='none', or example_weights="
                )


def _two_examples(run: Run, outputs: Outputs) -> list[int]:
    """Return two examples, of those that have a finite part in the loss."""
    sizes = torch.stack(
        [
            run.place(layout).first(t.contiguous()).reshape(run.batch, -1).double().abs().sum(1)
            for t, layout in zip(outputs.cotangents, outputs.layouts, strict=True)
        ]
    ).sum(0)
    candidates = (sizes.isfinite() & (sizes > 0)).nonzero().flatten().tolist()
    return _random.sample(candidates, min(_EXAMPLES, len(candidates)))
