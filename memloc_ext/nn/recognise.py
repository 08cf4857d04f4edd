"""What a chain of functions between linear layers computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memloc_ext.nn.unrun import Step, with_each_step
from memloc_ext.ops.kept_mlp import ACTIVATIONS

_LARGE = torch.logspace(-3, 6, 19, dtype=torch.float64)
_PROBES = [torch.cat((torch.linspace(-9, 9, 181, dtype=torch.float64), _LARGE, -_LARGE))]
_PROBES.append(2 * torch.sin(37 * torch.arange(len(_PROBES[0]), dtype=torch.float64)))  # as good as independent
_recognised: dict[str, Found | None] = {}


class Found(NamedTuple):
    """What is between linear layers: an activation, of the gate if there is one, and ordinary dropout.

    Attributes:
        activation: Its name.
        order: Numbers of the layers: of the gate, if there is one, and of the other.
        p: Probability of ordinary dropout.
    """

    activation: str
    order: list[int]
    p: float


def recognise(formula: str, step: Step, layers: Sequence[Step]) -> Found | None:
    """Return what a step computes of the layers that its formula numbers; None if the operator does not compute it."""
    if formula not in _recognised:
        _recognised[formula] = _recognise(step, layers)
    return _recognised[formula]


def _recognise(step: Step, layers: Sequence[Step]) -> Found | None:
    """Return what a chain is.

    It is run on numbers, without the ordinary dropout at its end: kept channels must be those of the activation, others
    zero.
    """
    behind = all(isinstance(s.args[0], Step) for s in step.before() if s.site is not None)
    if not 1 <= len(layers) <= 2 or not behind:
        return None
    last, p = step, 0.0
    while last.product is None and (last.site is not None or last.reshapes or last.drops is not None):
        if last.drops:
            if p or last.drops >= 1:
                return None
            p = last.drops
        last = last.args[0]
    passed = set(step.before()) - set(last.before())

    def value(step: Step, keep: int) -> Tensor:
        if step in layers:
            return _PROBES[layers.index(step)].clone()
        args, kwargs = with_each_step((step.args, dict(step.kwargs)), lambda inner: value(inner, keep))
        if step.site is not None:
            return args[0] * keep
        return args[0] if step.reshapes or step in passed else step.function(*args, **kwargs)

    with torch._C.DisableTorchFunction(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        if value(step, 0).any():
            return None
        result = value(step, 1)
    for name, activation in ACTIVATIONS.items():
        for order in ([0],) if len(layers) == 1 else ([0, 1], [1, 0]):
            expected = activation.forward(_PROBES[order[0]]) * (_PROBES[order[1]] if len(order) > 1 else 1)
            if torch.allclose(result, expected, rtol=1e-9, atol=1e-9):
                return Found(name, order, p)
    return None
