"""What runs before an accounted backward pass: checks, and gradients that take a pass for each example or group."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from memloc_ext.accounting.backward_pass import BackwardPass, GradientPass
from memloc_ext.accounting.check import Checks, check_own_mean, returned_by_model
from memloc_ext.accounting.clipping import Clipping
from memloc_ext.accounting.contributions import BUDGET, accumulated
from memloc_ext.accounting.forward_pass import ForwardPass, unwrapped
from memloc_ext.accounting.graph import Reached
from memloc_ext.accounting.outputs import Outputs, agree, gradients_of, no_outputs, outputs_of, whole_batch
from memloc_ext.accounting.tracer import Tracer
from memloc_ext.borrowing import kept_state, without_hooks
from memloc_ext.ops import Groups


def extra_passes(
    checks: Checks, loss: Tensor, root: Tensor, found: Reached, groups: Groups | None, own_mean: bool
) -> tuple[set[str], Outputs | None]:
    """Run what comes before a backward pass.

    Args:
        checks: Of the backward pass.
        loss: That was given, a number or losses by example.
        root: Of which the gradient is taken.
        found: What the loss depends on.
        groups: Whose gradients are to be exact, or None.
        own_mean: Whether a loss that the model returned is to be held against its examples' own.

    Returns:
        Names of the parameters that the user was told of, and what tells the examples apart if some parameters or
        groups take passes of their own.
    """
    tracer, backward = checks.tracer, checks.backward
    numbers = returned_by_model(tracer, loss) if own_mean else []
    due, told = checks.due(found), set()
    if not (backward.slow or groups or numbers or due):
        return told, None
    with kept_state(checks.model):  # what runs again, and what checkpointing recomputes, leaves no trace
        outputs = outputs_of(tracer, root, loss if loss.dim() else None, found.all, backward)
        if numbers and outputs is not None:
            check_own_mean(tracer, loss, numbers, outputs, backward)
        if due:
            told = checks.compare(outputs, found)
        if not (backward.slow or groups):
            return told, None
        if outputs is None:
            no_outputs(tracer, backward.slow or found.all)
        if backward.slow:
            _account_examples(checks, outputs, backward.slow)
        if groups is not None:
            backward.group_grad = _exact_groups(tracer, backward, outputs, found.all, groups)
    return told, outputs


def _account_examples(checks: Checks, outputs: Outputs, parameters: Mapping[int, nn.Parameter]) -> None:
    """Account these parameters, by their ``id``, one example at a time.

    The model runs on each example alone where that gives the same outputs and gradients: on many at a time if
    `torch.func.vmap` can. Where it does not, because the model mixes the examples of a batch or draws random numbers,
    each example takes a backward pass through the whole batch.
    """
    tracer, backward, source = checks.tracer, checks.backward, outputs.source
    if source is not None and backward.batch and checks.may_run_alone(source, parameters):
        room = BUDGET // max(1, sum(p.numel() * p.element_size() for p in parameters.values()))
        for step in sorted({max(1, min(backward.batch, room)), 1}, reverse=True):
            alone = _account_alone(tracer, backward, outputs, source, parameters, step)
            if alone and checks.ran_alone(outputs, source, parameters):
                return
            backward.forget(parameters)
    gradients_of_some = whole_batch(tracer, backward, outputs, parameters)
    for example in range(backward.batch):
        gradients = gradients_of_some(torch.tensor([example], device=outputs.tensors[0].device))
        backward.add_examples(parameters, example, {key: gradient[None] for key, gradient in gradients.items()})


def _exact_groups(
    tracer: Tracer, backward: BackwardPass, outputs: Outputs, parameters: Mapping[int, nn.Parameter], groups: Groups
) -> dict[int, Tensor]:
    """Return the gradients of the groups, ``[groups.num, *shape]``, with a backward pass for each that has examples."""
    result = {
        key: torch.zeros(groups.num, *p.shape, dtype=accumulated(p.dtype), device=p.device)
        for key, p in parameters.items()
    }
    gradients_of_some = whole_batch(tracer, backward, outputs, parameters)
    for group in range(groups.num):
        chosen = (groups.ids == group).nonzero().flatten()
        if len(chosen):
            for key, gradient in gradients_of_some(chosen).items():
                result[key][group] = gradient
    return result


class _Give(torch.autograd.Function):
    """A number whose backward pass gives leaves their gradients, which nothing else refers to then: no copy is made."""

    @staticmethod
    def forward(ctx: Any, gradients: dict[Tensor, Tensor], *leaves: Tensor) -> Tensor:
        ctx.gradients = gradients
        return torch.zeros((), device=leaves[0].device)

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> Any:
        gradients = tuple(ctx.gradients.values())
        ctx.gradients.clear()
        return (None, *gradients)


def add_to_grads(gradients: dict[Tensor, Tensor]) -> None:
    """Give leaves these gradients, on top of what they have, as a backward pass does: hooks are called.

    ``gradients``: is empty then.
    """
    with torch._C.DisableTorchFunction(), torch.enable_grad():
        own = {leaf: t if t.dtype == leaf.dtype else t.to(leaf.dtype) for leaf, t in gradients.items()}
        gradients.clear()
        number = _Give.apply(own, *own)  # pyright: ignore
        number.backward(number)  # of no matter


def clipped_gradients(
    checks: Checks,
    outputs: Outputs | None,
    factors: Mapping[int, Tensor],
    parameters: Mapping[int, nn.Parameter],
    clip: Clipping,
    retain_graph: bool,
) -> dict[Tensor, Tensor]:
    """Return the sums of the examples' gradients times their factors; zeros where nothing was told of a parameter.

    Slow parameters take another backward pass, of outputs' gradients times the factors; one for each if these differ.

    Args:
        checks: Of the backward pass, which is finished.
        outputs: What tells the examples apart, if there are slow parameters.
        factors: By the ``id`` of each parameter, ``[batch]``.
        parameters: By their ``id``.
        clip: How gradients are clipped.
        retain_graph: Whether the graph is kept.
    """
    tracer, backward = checks.tracer, checks.backward
    with torch._C.DisableTorchFunction(), torch.no_grad():
        result = {key: torch.zeros_like(p) for key, p in parameters.items()} | backward.clipped_gradients(factors)
    slow = backward.slow
    parts = [{key: p} for key, p in slow.items()] if clip.clipping == "per_parameter" else [slow] if slow else []
    with kept_state(checks.model) if parts else nullcontext():  # what checkpointing recomputes leaves no trace
        for i, part in enumerate(parts, 1):
            assert outputs is not None
            scaled, keep = outputs.times(factors[next(iter(part))]), retain_graph or i < len(parts)
            result |= gradients_of(tracer, GradientPass(backward, part), scaled, part, retain_graph=keep)
    return {p: result[key] for key, p in parameters.items()}


def _account_alone(
    tracer: Tracer,
    backward: BackwardPass,
    outputs: Outputs,
    source: ForwardPass,
    parameters: Mapping[int, nn.Parameter],
    step: int,
) -> bool:
    """Account so many examples at a time, each with the model on it alone; return whether that is the same."""
    named = {name: p for name, p in unwrapped(source.model).named_parameters() if id(p) in parameters}
    batch, inputs = backward.batch, source.examples(backward.batch)
    expected, cotangents = outputs.by_example(outputs.tensors), outputs.by_example(outputs.cotangents)

    def one(parts: list[Tensor], cotangents: list[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        def model(given: dict[str, Tensor]) -> list[Tensor]:
            return source.again(outputs.tensors, parts, batch, given)

        found, pull = torch.func.vjp(model, named)  # pyright: ignore[reportAssignmentType]
        return found, pull(cotangents)[0]

    def plainly(parts: list[Tensor], cotangents: list[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        found, wanted = source.again(outputs.tensors, [t[0] for t in parts], batch), list(named.values())
        with without_hooks(wanted):
            pulled = torch.autograd.grad(found, wanted, [t[0] for t in cotangents], materialize_grads=True)
        gradients = {name: t.to_dense()[None] for name, t in zip(named, pulled, strict=True)}
        return [t.detach()[None] for t in found], gradients

    many = torch.func.vmap(one) if step > 1 else plainly  # functions of a user's may not run inside of torch.func
    for begin in range(0, batch, step):
        chunk = slice(begin, begin + step)
        try:
            with tracer.untraced(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of functions that vmap runs one by one
                found, gradients = many([t[chunk] for t in inputs], [t[chunk] for t in cotangents])
        except Exception:  # a model that takes whole batches only, or that vmap cannot run
            return False
        if not all(agree(t, own[chunk], tracer.coarse) for t, own in zip(found, expected, strict=True)):
            return False
        backward.add_examples(parameters, begin, {id(p): gradients[name] for name, p in named.items()})
    return True
