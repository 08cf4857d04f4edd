"""Gradients that take a pass for each example, or for each group of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from memloc_ext.nn.gradient_accountant.graph import Outputs
from memloc_ext.nn.gradient_accountant.run import OneByOne, Run
from memloc_ext.nn.gradient_accountant.session import Session
from memloc_ext.nn.gradient_accountant.uses import accumulated
from memloc_ext.ops import Groups


def account_examples(session: Session, run: Run, outputs: Outputs, parameters: Mapping[int, nn.Parameter]) -> None:
    """Account these parameters, by their ``id``, one example at a time.

    The model runs on each example alone where that gives the same outputs. Where it does not (examples meet, or the
    model draws random numbers), each example takes a backward pass through the whole batch.
    """
    for example, gradients in enumerate(_alone(session, run, outputs, parameters)):
        if gradients is None:
            break
        run.add_example(parameters, example, gradients)
    else:
        return
    run.forget(parameters)
    for example in range(run.batch):
        chosen = torch.tensor([example], device=outputs.tensors[0].device)
        gradients = gradients_of(session, OneByOne(run, parameters), outputs, parameters, chosen)
        run.add_example(parameters, example, gradients)


def exact_groups(
    session: Session, run: Run, outputs: Outputs, parameters: Mapping[int, nn.Parameter], groups: Groups
) -> dict[int, Tensor]:
    """Return the gradients of the groups, ``[groups.num, *shape]``, with a backward pass for each that has examples."""
    result = {
        key: torch.zeros(groups.num, *p.shape, dtype=accumulated(p.dtype), device=p.device)
        for key, p in parameters.items()
    }
    for group in range(groups.num):
        chosen = (groups.ids == group).nonzero().flatten()
        if len(chosen):
            for key, gradient in gradients_of(session, OneByOne(run, parameters), outputs, parameters, chosen).items():
                result[key][group] = gradient
    return result


@torch.no_grad()
def add_to_grads(parameters: Mapping[int, nn.Parameter], group_grad: Mapping[int, Tensor]) -> None:
    """Give the parameters the sum of the groups' gradients, on top of what they have."""
    for key, p in parameters.items():
        total = group_grad[key].sum(0).to(p.dtype)
        p.grad = total if p.grad is None else p.grad.add_(total)


def gradients_of(
    session: Session, run: Run, outputs: Outputs, parameters: Mapping[int, nn.Parameter], chosen: Tensor
) -> dict[int, Tensor]:
    """Return the gradients of what the chosen examples add to the loss, by the ``id`` of each parameter."""
    cotangents = outputs.of(run, chosen)
    return _gradients(session, run, outputs.tensors, cotangents, parameters, retain_graph=True)


def _alone(
    session: Session, run: Run, outputs: Outputs, parameters: Mapping[int, nn.Parameter]
) -> Iterator[dict[int, Tensor] | None]:
    """Yield the gradients of each example, out of the model run on it alone; None if that is something else."""
    source = outputs.source
    if source is None or not run.batch:
        yield None
        return
    places = [next(i for i, t in enumerate(source.outputs) if t is output) for output in outputs.tensors]
    layouts = [run.place(layout) for layout in outputs.layouts]
    with session.not_looking():
        for example in range(run.batch):
            returned = source.alone(example, run.batch)
            if returned is None or len(returned[0]) != len(source.outputs):
                yield None
                return
            own = [returned[0][place] for place in places]
            agree = zip(places, own, layouts, strict=True)
            if not all(source.agrees(place, t, layout, example) for place, t, layout in agree):
                yield None
                return
            cotangents = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in own]
            for to, cotangent, layout in zip(cotangents, outputs.cotangents, layouts, strict=True):
                layout.alone().first(to)[0] = layout.first(cotangent.contiguous())[example]
            yield _gradients(session, None, own, cotangents, parameters)


def _gradients(
    session: Session,
    run: Run | None,
    tensors: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    parameters: Mapping[int, nn.Parameter],
    retain_graph: bool = False,
) -> dict[int, Tensor]:
    session.run = run
    try:
        wanted = list(parameters.values())
        gradients = torch.autograd.grad(tensors, wanted, cotangents, retain_graph=retain_graph, allow_unused=True)
    finally:
        session.run = None
    return {key: gradient for key, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
