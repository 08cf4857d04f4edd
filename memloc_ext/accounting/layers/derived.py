"""Tensors that are computed from parameters alone: normalised weights, merged adapters, tables of positions."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from memloc_ext.accounting.backward_pass import BackwardPass
from memloc_ext.accounting.contributions import Contribution, Rows, accumulated, chunks
from memloc_ext.accounting.layers.layer_function import Forward, Gradients, LayerFunction
from memloc_ext.accounting.uses import ParameterView, Use, by_position, together
from memloc_ext.borrowing import without_hooks

if TYPE_CHECKING:
    from memloc_ext.accounting.tracer import Tracer


class Derived(LayerFunction):
    """A tensor that is the same for all examples, in the place of a parameter.

    Layers get a copy of it that depends on the parameters directly, and account their uses of the copy. When a
    backward pass has been through all of them, each example's gradient goes on through the tensor's own graph, a few
    examples at a time. That graph is kept for as long as the copy.

    Args:
        value: The tensor.
        leaves: What it is computed from: parameters of the model, and other tensors that want a gradient.
    """

    def __init__(self, tracer: Tracer, value: Tensor, leaves: Sequence[Tensor]) -> None:
        weights = [tracer.weight(leaf) for leaf in leaves]
        super().__init__(tracer, weights, None)  # pyright: ignore[reportArgumentType] no example has a part in it
        self.edge, self.leaves, self.value = get_gradient_edge(value), list(leaves), value.detach()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those of the model that the tensor is computed from."""
        return [weight.parameter for weight in self.weights if weight is not None]

    def forward(self, *leaves: Tensor) -> Forward:
        return self.value.detach(), ()

    def backward(self, saved: Any, needs: Sequence[bool], grad: Tensor) -> Gradients:
        backward = self.tracer.backward
        uses = [] if backward is None else backward.take(self)
        if backward is not None and uses:
            parts = zip(self.weights, self._each(backward, uses), strict=True)
            return tuple(
                contribution.total() if weight is None else backward.record(weight, contribution)
                for weight, contribution in parts
            )
        wanted = [
            i for i, weight in enumerate(self.weights) if backward is None or weight is None or backward.wants(weight)
        ]
        result: list[Tensor | None] = [None] * len(self.leaves)
        if wanted:
            for i, gradients in zip(wanted, self.pull_back(grad[None], [self.leaves[i] for i in wanted]), strict=True):
                result[i] = gradients[0]
        return tuple(result)

    def _each(self, backward: BackwardPass, uses: Sequence[Use]) -> list[DerivedContribution]:
        """Return what the uses of the tensor add to the gradients of what it is computed from."""
        contribution = together(uses)
        batch, dtype = contribution.batch, accumulated(self.value.dtype)
        norms = [torch.zeros(batch, dtype=accumulated(t.dtype), device=t.device) for t in self.leaves]
        groups = backward.summation_groups(self.value.device) if backward.weight_grads or None in self.weights else None
        sums = [
            None if groups is None else t.new_zeros(groups.num, *t.shape, dtype=accumulated(t.dtype))
            for t in self.leaves
        ]
        size = max(self.value.numel(), sum(t.numel() for t in self.leaves))
        for begin, end in chunks(batch, (size,), dtype):
            for i, part in enumerate(self.pull_back(contribution.gradients(begin, end), self.leaves)):
                norms[i][begin:end] = Rows(part).sqnorm()
                if groups is not None and (total := sums[i]) is not None:
                    total.index_add_(0, groups.ids[begin:end], part.to(total.dtype))
        parts = zip(self.leaves, norms, sums, strict=True)
        return [DerivedContribution(self, leaf, uses, norm, total) for leaf, norm, total in parts]

    def pull_back(self, gradients: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients ``[n, *]`` of what the tensor is computed from, given ``[n, *shape]`` of its own."""
        gradients = gradients.to(self.value.dtype)
        if not len(gradients):
            return [leaf.new_zeros(0, *leaf.shape) for leaf in leaves]
        if len(gradients) > 1:
            with contextlib.suppress(RuntimeError):  # of functions that cannot be batched
                return self._pull(gradients, leaves, batched=True)
        each = [self._pull(gradient, leaves, batched=False) for gradient in gradients]
        return [torch.stack(parts) for parts in zip(*each, strict=True)]

    def _pull(self, gradient: Tensor, leaves: Sequence[Tensor], *, batched: bool) -> list[Tensor]:
        # checkpointing recomputes here, to be seen
        with torch._C._EnableTorchFunction(), without_hooks(leaves), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            found = torch.autograd.grad(
                self.edge, leaves, gradient, retain_graph=True, allow_unused=True, is_grads_batched=batched
            )
        shape = gradient.shape[:1] if batched else ()
        return [
            leaf.new_zeros(*shape, *leaf.shape) if t is None else t.to_dense() if t.is_sparse else t
            for leaf, t in zip(leaves, found, strict=True)
        ]


class DerivedContribution(Contribution):
    """What the uses of a derived tensor add to the gradient of a parameter that it is computed from.

    Args:
        layer: The derived tensor.
        leaf: The parameter.
        uses: All of the derived tensor.
        norms: Of each example's gradient, squared, ``[batch]``, if they are known.
        sums: Of the gradients of each group, ``[groups, *shape]``, where gradients are wanted.
    """

    def __init__(
        self, layer: Derived, leaf: Tensor, uses: Sequence[Use], norms: Tensor | None = None, sums: Tensor | None = None
    ) -> None:
        self.uses, self.contribution = uses, together(uses)
        super().__init__(self.contribution.batch, leaf.shape, leaf)
        self.layer, self.leaf, self.norms, self.sums = layer, leaf, norms, sums

    def gradients(self, begin: int, end: int) -> Tensor:
        parts = [
            self.layer.pull_back(self.contribution.gradients(begin + first, begin + last), [self.leaf])[0].to(
                self.dtype
            )
            for first, last in chunks(end - begin, self.layer.value.shape, self.dtype)
        ]
        return torch.cat(parts)

    def total(self, factors: Tensor | None = None) -> Tensor:
        if factors is None and self.sums is not None:
            return self.sums.sum(0)
        return self.layer.pull_back(self.contribution.total(factors)[None], [self.leaf])[0][0].to(self.dtype)

    def sqnorm(self) -> Tensor:
        return super().sqnorm() if self.norms is None else self.norms

    def by_position(self) -> Contribution | None:
        each = by_position(self.uses)
        own = ParameterView(cast("nn.Parameter", self.layer.value), self.layer.value)
        return None if each is None else DerivedContribution(self.layer, self.leaf, [(own, each)])

    def sqnorm_and_groups(self, groups: object) -> tuple[Tensor, Tensor]:
        assert self.sums is not None
        return self.sqnorm(), self.sums


def derive(tracer: Tracer, t: Tensor) -> ParameterView | None:
    """Return a copy of a tensor that is computed from parameters alone, to be accounted like one; else None."""
    if t.grad_fn is None or not torch.is_grad_enabled() or not tracer.shared(t):
        return None
    known = tracer.derived.get(t)
    if isinstance(known, tuple) and known[0] == t._version:
        return known[1]
    leaves, weight = _leaves(tracer, t), None
    if any(id(leaf) in tracer.parameters for leaf in leaves):
        layer = Derived(tracer, t, leaves)
        copy = layer.apply(*leaves)
        weight = ParameterView(cast("nn.Parameter", copy), copy, layer)
        tracer.count(None, *layer.weights)
    tracer.derived.put(t, (t._version, weight))
    return weight


def _leaves(tracer: Tracer, t: Tensor) -> list[Tensor]:
    """Return the leaves of a tensor's graph; none if a layer that is accounted is part of it."""
    leaves, pending, seen = [], [t.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        layer = getattr(node, "layer", None)
        if isinstance(layer, LayerFunction) and layer.tracer is tracer:
            return []
        if (variable := getattr(node, "variable", None)) is not None:
            leaves.append(variable)
        pending += [below for below, _ in node.next_functions]
    return leaves
