"""How the examples' own losses enter a loss, and which losses are refused."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memloc_ext.accounting.example_axis import ExampleAxis

if TYPE_CHECKING:
    from memloc_ext.accounting.tracer import Tracer

MEANS = frozenset((F.cross_entropy, F.nll_loss, F.mse_loss, getattr(F, "linear_cross_entropy", F.cross_entropy)))
"""Functions whose ``mean`` divides by a sum of weights that differs between examples."""
TWICE = (
    "GradientAccountant: the loss must not depend on gradients that torch.autograd takes with create_graph=True inside "
    "the with, as a gradient penalty does; take them by torch.func.grad and give losses by example, with "
    "loss_reduction='none', or account the loss without the penalty"
)


@dataclass(frozen=True)
class _Mean:
    """A call of a function of `MEANS` that has to do with the examples.

    Attributes:
        name: Of the function.
        axis: Of ``target``, or of ``weight`` if there is no target.
        target: Class indices, or None if ``weight`` has the shape of the losses.
        weight: By class, or None.
        ignore_index: Of the targets that do not count.
    """

    name: str
    axis: ExampleAxis
    target: Tensor | None
    weight: Tensor | None
    ignore_index: int

    def denominators(self, batch: int) -> Tensor:
        """Return what each example alone would be divided by, ``[batch]``, float64."""
        weights = self.weight
        if self.target is not None:
            counted = self.target != self.ignore_index
            weights = counted if weights is None else weights[self.target.where(counted, 0).long()] * counted
        assert weights is not None
        return self.axis.merged(batch).examples_first(weights.double()).reshape(batch, -1).sum(1)


def remember_mean(tracer: Tracer, func: Any, args: Any, kwargs: Any, result: Tensor) -> None:
    """Note on its node of the graph a call of a function of `MEANS`, whose arguments are as PyTorch hands them on."""
    by_reduction = kwargs["reduction"] == "mean" and kwargs.get("size_average") is kwargs.get("reduce") is None
    axis, target, weight = tracer.axis(args[0]), args[-1], kwargs.get("weight")
    if not by_reduction or not result.requires_grad or axis is None or axis.batch < 2:
        return
    if func is F.mse_loss:
        target = None
        if weight is None:
            return
    elif target.is_floating_point() or axis.dim == 1:  # probabilities: a mean over the rows
        return
    else:
        axis = replace(axis, dim=max(0, axis.dim - 1))  # targets have no dimension of classes
    index = kwargs.get("ignore_index")
    mean = _Mean(func.__name__, axis, target, weight, -100 if index is None else index)
    node: Any = result.grad_fn
    node.metadata[tracer] = mean  # lives as long as the graph


def read(t: Tensor) -> list[float] | None:
    """Return the values of a tensor, which may wait for the device; None while a CUDA graph is captured."""
    return None if t.is_cuda and torch.cuda.is_current_stream_capturing() else t.tolist()


def check_loss(tracer: Tracer, nodes: Collection[Any], batch: int, *, mean: bool) -> bool:
    """Refuse a gradient penalty, and a mean in which examples have unequal weights, by the nodes of a loss's graph.

    Returns whether there is such a mean and its weights are equal.

    Args:
        tracer: That the loss was computed in.
        nodes: Of the graph.
        batch: Number of examples.
        mean: Whether the loss is to be a mean over the examples.
    """
    found = False
    for node in nodes:
        if type(node).__name__ == "Error":
            raise ValueError(TWICE)
        call = node.metadata.get(tracer) if mean else None
        if call is not None and batch > 0 and call.axis.batch % batch == 0:
            _check_mean(call, batch)
            found = True
    return found


def _check_mean(call: _Mean, batch: int) -> None:
    low, high = read(torch.stack(call.denominators(batch).aminmax())) or (0.0, 0.0)
    eps = torch.finfo(torch.float64 if call.weight is None else call.weight.dtype).eps
    if high - low <= 4 * eps * abs(high):
        return
    counted = f"(target != {call.ignore_index})"
    weights = "weight" if call.target is None else counted if call.weight is None else f"weight[target] * {counted}"
    raise ValueError(
        f"GradientAccountant: loss_reduction='mean' needs a mean over the examples, and {call.name} divides by the "
        f"batch's sum of {weights}, to which examples add from {low:g} to {high:g}; give "
        "example_weights=w / w.sum(), where w [batch] is the sum of each example; or losses by example, of "
        "reduction='none' and reshaped to [batch, *], with loss_reduction='none'"
    )


def check_example_weights(loss: Tensor, weights: Tensor | None, batch: int) -> None:
    """Check the factors with which the examples' own losses enter a loss."""
    if weights is None:
        return
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        got = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise TypeError(f"GradientAccountant: example_weights must be a tensor of a floating dtype, got {got}")
    if weights.shape != (batch,) or weights.device != loss.device:
        raise ValueError(
            f"GradientAccountant: example_weights must be [{batch}] on {loss.device}, got {list(weights.shape)} on "
            f"{weights.device}"
        )
    wrong = [value for value in read(weights) or () if not 0 <= value < math.inf]
    if wrong:
        raise ValueError(
            f"GradientAccountant: example_weights must be finite and at least 0, got {wrong[0]}: each is the "
            "factor of an example's own loss in the loss"
        )
