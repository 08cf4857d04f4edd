"""Gradients that take a pass for each example, or for each group of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from memloc_ext.accounting.backward_pass import BackwardPass, GradientPass
from memloc_ext.accounting.contributions import BUDGET, accumulated
from memloc_ext.accounting.forward_pass import ForwardPass, unwrapped
from memloc_ext.accounting.outputs import Outputs, agree, unspoiled
from memloc_ext.accounting.tracer import Tracer
from memloc_ext.borrowing import without_hooks
from memloc_ext.ops import Groups

if TYPE_CHECKING:
    from memloc_ext.accounting.check import Checks


def account_examples(checks: Checks, outputs: Outputs, parameters: Mapping[int, nn.Parameter]) -> None:
    """Account these parameters, by their ``id``, one example at a time.

    The model runs on each example alone where that gives the same outputs and gradients: on many at a time if
    `torch.func.vmap` can. Where it does not, because the model mixes the examples of a batch or draws random numbers,
    each example takes a backward pass through the whole batch.
    """
    tracer, backward, source = checks.tracer, checks.backward, outputs.source
    if source is not None and source.closed and backward.batch and checks.may_run_alone(source, parameters):
        room = BUDGET // max(1, sum(p.numel() * p.element_size() for p in parameters.values()))
        for step in sorted({max(1, min(backward.batch, room)), 1}, reverse=True):
            alone = _account_alone(tracer, backward, outputs, source, parameters, step)
            if alone and checks.ran_alone(outputs, source, parameters):
                return
            backward.forget(parameters)
    outputs_for = unspoiled(tracer, outputs)
    for example in range(backward.batch):
        chosen = torch.tensor([example], device=outputs.tensors[0].device)
        gradients = gradients_of(tracer, GradientPass(backward, parameters), outputs_for(chosen), parameters, chosen)
        backward.add_examples(parameters, example, {key: gradient[None] for key, gradient in gradients.items()})


def exact_groups(
    tracer: Tracer, backward: BackwardPass, outputs: Outputs, parameters: Mapping[int, nn.Parameter], groups: Groups
) -> dict[int, Tensor]:
    """Return the gradients of the groups, ``[groups.num, *shape]``, with a backward pass for each that has examples."""
    result = {
        key: torch.zeros(groups.num, *p.shape, dtype=accumulated(p.dtype), device=p.device)
        for key, p in parameters.items()
    }
    outputs_for = unspoiled(tracer, outputs)
    for group in range(groups.num):
        chosen = (groups.ids == group).nonzero().flatten()
        if len(chosen):
            one = GradientPass(backward, parameters)
            for key, gradient in gradients_of(tracer, one, outputs_for(chosen), parameters, chosen).items():
                result[key][group] = gradient
    return result


@torch.no_grad()
def add_to_grads(parameters: Mapping[int, nn.Parameter], group_grad: Mapping[int, Tensor]) -> None:
    """Give the parameters the sum of the groups' gradients, on top of what they have."""
    for key, p in parameters.items():
        total = group_grad[key].sum(0).to(p.dtype)
        p.grad = total if p.grad is None else p.grad.add_(total)


def gradients_of(
    tracer: Tracer,
    backward: BackwardPass,
    outputs: Outputs,
    parameters: Mapping[int, nn.Parameter],
    chosen: Tensor | None = None,
) -> dict[int, Tensor]:
    """Return the gradients of what the chosen examples, or all, add to the loss, by the ``id`` of each parameter."""
    cotangents = outputs.cotangents if chosen is None else outputs.cotangents_of(chosen)
    wanted = list(parameters.values())
    # the cotangents have been through the hooks
    with tracer.accounting(backward), without_hooks([*wanted, *outputs.tensors]):
        gradients = torch.autograd.grad(outputs.tensors, wanted, cotangents, retain_graph=True, allow_unused=True)
        with torch.no_grad():
            backward.finish()
    found = zip(parameters, gradients, strict=True)
    return {key: t.to_dense() if t.is_sparse else t for key, t in found if t is not None}


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
