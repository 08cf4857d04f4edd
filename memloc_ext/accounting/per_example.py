"""Gradients that take a pass for each example, or for each group of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor, nn

from memloc_ext.accounting.backward_pass import BackwardPass, GradientPass
from memloc_ext.accounting.contributions import BUDGET, accumulated
from memloc_ext.accounting.forward_pass import ForwardPass, has_own_hooks, unwrapped
from memloc_ext.accounting.graph import Outputs
from memloc_ext.accounting.tracer import Tracer
from memloc_ext.borrowing import without_hooks
from memloc_ext.ops import Groups

if TYPE_CHECKING:
    from memloc_ext.accounting.check import Alone

_ROUNDING, _COARSE = {torch.float64: 1e-9, torch.float32: 1e-4}, 0.05  # of outputs, relative to an example's largest


def account_examples(
    tracer: Tracer,
    backward: BackwardPass,
    outputs: Outputs,
    parameters: Mapping[int, nn.Parameter],
    alone: Alone,
) -> None:
    """Account these parameters, by their ``id``, one example at a time.

    The model runs on each example alone where that gives the same outputs and gradients: on many at a time if
    `torch.func.vmap` can. Where it does not, because the model mixes the examples of a batch or draws random numbers,
    each example takes a backward pass through the whole batch.
    """
    source = outputs.source
    if source is not None and source.closed and backward.batch and alone.expected:
        room = BUDGET // max(1, sum(p.numel() * p.element_size() for p in parameters.values()))
        for step in sorted({max(1, min(backward.batch, room)), 1}, reverse=True):
            if _account_alone(tracer, backward, outputs, source, parameters, step) and alone.right():
                return
            backward.forget(parameters)
    outputs_for = unspoiled(tracer, backward, outputs)
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
    outputs_for = unspoiled(tracer, backward, outputs)
    for group in range(groups.num):
        chosen = (groups.ids == group).nonzero().flatten()
        if len(chosen):
            one = GradientPass(backward, parameters)
            for key, gradient in gradients_of(tracer, one, outputs_for(chosen), parameters, chosen).items():
                result[key][group] = gradient
    return result


def unspoiled(tracer: Tracer, backward: BackwardPass, outputs: Outputs) -> Callable[[Tensor], Outputs]:
    """Return what gives the outputs through which the gradients of chosen examples, by their indices, are taken.

    A pass through the whole batch multiplies the NaN of one example by the zeros of the others' gradients. So the model
    runs again, with the same random numbers and a finite example in the place of each that is not: where this leaves
    the outputs of the others as they were, the gradients of these are taken from there.
    """
    axes, source = [backward.place(axis) for axis in outputs.axes], outputs.source

    def rows(tensors: list[Tensor]) -> list[Tensor]:
        return [axis.first(t.detach().contiguous()) for t, axis in zip(tensors, axes, strict=True)]

    expected = rows(outputs.tensors)
    finite = torch.stack(
        [t.isfinite().unsqueeze(-1).flatten(1).all(1) for t in expected + rows(outputs.cotangents)]
    ).all(0)
    if finite.all() or not finite.any() or source is None or not source.closed or has_own_hooks(source.model):
        return lambda chosen: outputs
    places = torch.arange(backward.batch, device=finite.device).where(finite, finite.int().argmax())
    try:
        with tracer.not_looking(), torch.enable_grad(), source.same_random_numbers():
            again = source.again(outputs.tensors, source.rearranged(places), backward.batch, {})
        pairs = zip(rows(again), expected, strict=True)
        same = all(agree(t[finite], whole[finite], tracer.coarse) for t, whole in pairs)
    except Exception:  # a model whose inputs are not tensors alone
        same, again = False, []
    if not same:
        return lambda chosen: outputs
    healed = replace(outputs, tensors=again)
    return lambda chosen: healed if finite[chosen].all() else outputs


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
    cotangents = outputs.cotangents if chosen is None else outputs.of(backward, chosen)
    wanted = list(parameters.values())
    with (
        tracer.accounting(backward),
        without_hooks([*wanted, *outputs.tensors]),
    ):  # the cotangents have been through those
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
    axes = [backward.place(axis) for axis in outputs.axes]
    named = {name: p for name, p in unwrapped(source.model).named_parameters() if id(p) in parameters}
    inputs = source.examples(backward.batch)
    expected = [axis.first(t.detach()) for t, axis in zip(outputs.tensors, axes, strict=True)]

    def one(parts: list[Tensor], cotangents: list[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        def model(given: dict[str, Tensor]) -> list[Tensor]:
            return source.again(outputs.tensors, parts, backward.batch, given)

        found, pull = torch.func.vjp(model, named)  # pyright: ignore[reportAssignmentType]
        return found, pull(cotangents)[0]

    def plainly(parts: list[Tensor], cotangents: list[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        found, wanted = source.again(outputs.tensors, [t[0] for t in parts], backward.batch, {}), list(named.values())
        with without_hooks(wanted):
            pulled = torch.autograd.grad(found, wanted, [t[0] for t in cotangents], materialize_grads=True)
        gradients = {name: t.to_dense()[None] for name, t in zip(named, pulled, strict=True)}
        return [t.detach()[None] for t in found], gradients

    many = torch.func.vmap(one) if step > 1 else plainly  # functions of a user's may not run inside of torch.func
    for begin in range(0, backward.batch, step):
        end = min(backward.batch, begin + step)
        cotangents = []
        for t, cotangent, axis in zip(outputs.tensors, outputs.cotangents, axes, strict=True):
            own = axis.alone()
            shape = [end - begin, *t.shape]
            shape[own.dim + 1] = own.size
            cotangents.append(t.new_empty(shape))
            own.behind().first(cotangents[-1])[0] = axis.first(cotangent.contiguous())[begin:end]
        try:
            with tracer.not_looking(), torch.enable_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of functions that vmap runs one by one
                found, gradients = many([t[begin:end] for t in inputs], cotangents)
        except Exception:  # a model that takes whole batches only, or that vmap cannot run
            return False
        for t, axis, whole in zip(found, axes, expected, strict=True):
            if not agree(axis.alone().behind().first(t)[0], whole[begin:end], tracer.coarse):
                return False
        by_id = {id(p): gradients[name] for name, p in named.items()}
        backward.add_examples(parameters, begin, by_id)
    return True


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
