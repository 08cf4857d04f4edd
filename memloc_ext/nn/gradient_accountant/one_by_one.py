"""Gradients that take a backward pass for each example, or for each group of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from memloc_ext.nn.gradient_accountant.graph import Outputs
from memloc_ext.nn.gradient_accountant.run import OneByOne, Run
from memloc_ext.nn.gradient_accountant.session import Session
from memloc_ext.nn.gradient_accountant.uses import accumulated
from memloc_ext.ops import Groups


def account_examples(session: Session, run: Run, outputs: Outputs, parameters: Mapping[int, nn.Parameter]) -> None:
    """Account these parameters, by their ``id``, with a backward pass per example."""
    for b in range(run.batch):
        chosen = torch.tensor([b], device=outputs.tensors[0].device)
        for key, gradient in _gradients(session, run, outputs, parameters, chosen).items():
            run.add_example(parameters[key], b, gradient)


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
            for key, gradient in _gradients(session, run, outputs, parameters, chosen).items():
                result[key][group] = gradient
    return result


@torch.no_grad()
def add_to_grads(parameters: Mapping[int, nn.Parameter], group_grad: Mapping[int, Tensor]) -> None:
    """Give the parameters the sum of the groups' gradients, on top of what they have."""
    for key, p in parameters.items():
        total = group_grad[key].sum(0).to(p.dtype)
        p.grad = total if p.grad is None else p.grad.add_(total)


def _gradients(
    session: Session, run: Run, outputs: Outputs, parameters: Mapping[int, nn.Parameter], chosen: Tensor
) -> dict[int, Tensor]:
    session.run = OneByOne(run, parameters)
    try:
        cotangents = outputs.of(run, chosen)
        wanted = list(parameters.values())
        gradients = torch.autograd.grad(outputs.tensors, wanted, cotangents, retain_graph=True, allow_unused=True)
    finally:
        session.run = None
    return {key: gradient for key, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
