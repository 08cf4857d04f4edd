"""Tables of rows that are looked up by index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memloc_ext.accounting.backward_pass import Repeated
from memloc_ext.accounting.contributions import EmbeddingContribution
from memloc_ext.accounting.example_axis import ExampleAxis
from memloc_ext.accounting.layers.layer_function import Forward, Gradients, LayerFunction
from memloc_ext.accounting.tracer import Tracer


@dataclass(eq=False, repr=False)
class Embedding(LayerFunction):
    """``table[indices]``.

    Attributes:
        weights: Of indices and table ``[num, dim]``.
        padding_idx: A row that gets no gradient, or -1.
    """

    padding_idx: int

    def forward(self, indices: Tensor, table: Tensor) -> Forward:
        return torch.embedding(table, indices, self.padding_idx), (indices,)

    def backward(self, saved: Any, needs: Sequence[bool], grad: Tensor) -> Gradients:
        (indices,) = saved
        indices, grad = self.examples(indices), self.examples(grad)
        weight = self.weights[1]
        assert weight is not None
        return None, self.record(1, EmbeddingContribution(indices, grad, weight.tensor.shape[0], self.padding_idx))


def embedding(tracer: Tracer, func: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Handle `torch.nn.functional.embedding`."""
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    given = dict(zip(names, args, strict=False)) | kwargs
    if given.get("max_norm") is not None or given.get("scale_grad_by_freq") or given.get("sparse"):
        return NotImplemented
    padding_idx = given.get("padding_idx")
    table = given["weight"]
    padding_idx = -1 if padding_idx is None else padding_idx % max(1, table.shape[0])
    indices = given["input"]
    return _look_up(tracer, indices, table, padding_idx, tracer.axis(indices), tracer.shared(indices))


def embedding_bag(tracer: Tracer, func: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Handle `torch.nn.functional.embedding_bag` where each bag is an example's: a lookup, and what is made of it."""
    names = ("input", "weight", "offsets", "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse")
    more = ("per_sample_weights", "include_last_offset", "padding_idx")
    given = dict(zip((*names, *more), args, strict=False)) | kwargs
    plain = ("max_norm", "scale_grad_by_freq", "sparse", "include_last_offset")
    indices, offsets, factors = given["input"], given.get("offsets"), given.get("per_sample_weights")
    if any(given.get(name) for name in plain) or not indices.numel():
        return NotImplemented
    real = torch.ones_like(indices, dtype=torch.bool)
    if given.get("padding_idx") is not None:
        real = indices != given["padding_idx"] % len(given["weight"])
    if offsets is None:
        axis = tracer.axis(indices)
    else:  # bags of different lengths, one behind the other
        axis, mixed = tracer.axis(offsets), tracer.axis(indices)
        if factors is not None:
            return NotImplemented
        if axis is None and mixed is not None:  # indices were taken for examples, but these are the bags
            axis = ExampleAxis(0, 1, len(offsets), 1)
            tracer.recount(axis.batch)
        indices, real = _bags(offsets, indices, real)
    if axis is None or axis.dim:
        return NotImplemented
    for t in (indices, real):
        tracer.remember(t, axis)
    with tracer:
        rows = F.embedding(indices, given["weight"])
        if given.get("mode", "mean") == "max":
            found = rows.masked_fill(~real[..., None], -torch.inf).max(1).values
            return found.masked_fill(~real.any(1, keepdim=True), 0)
        rows = rows * (real if factors is None else real * factors)[..., None].to(rows.dtype)
        total = rows.sum(1)
        if given.get("mode", "mean") == "sum":
            return total
        return total / real.sum(1, keepdim=True).clamp(min=1).to(total.dtype)


def _bags(offsets: Tensor, *values: Tensor) -> list[Tensor]:
    """Return values of bags that lie one behind the other as ``[bags, longest]``, zeros behind."""
    ends = torch.cat([offsets[1:], offsets.new_tensor([len(values[0])])])
    lengths = ends - offsets
    places = offsets[:, None] + torch.arange(int(lengths.max()), device=offsets.device)
    inside = places < ends[:, None]
    places = places.clamp(max=len(values[0]) - 1)
    return [value[places].where(inside, value.new_zeros(())) for value in values]


def getitem(tracer: Tracer, func: Any, /, table: Tensor, indices: Any) -> Any:
    """Handle ``table[indices]`` with one tensor of indices, of a table of rows, or of matrices as experts have."""
    integers = isinstance(indices, Tensor) and indices.dtype in (torch.int64, torch.int32)
    if not integers or table.dim() < 2:
        return NotImplemented
    if not indices.dim():  # a loop over experts
        with tracer:
            return table[int(indices)]
    if table.dim() > 2:
        with tracer:
            return table.flatten(1)[indices].unflatten(-1, table.shape[1:])
    axis, shared = tracer.axis(indices), tracer.shared(indices)
    indices = indices % table.shape[0]  # negative ones count from the end
    if axis is not None:
        tracer.remember(indices, axis)
    return _look_up(tracer, indices, table, -1, axis, shared)


def _look_up(
    tracer: Tracer, indices: Tensor, table: Tensor, padding_idx: int, axis: ExampleAxis | None, shared: bool
) -> Any:
    weight = tracer.weight(table)
    if weight is None:
        return NotImplemented
    if shared:  # the same for every example, as positions are: it counts where it meets activations
        expanded = indices.dim() > 1 and indices.stride(0) == 0 and indices.shape[0] > 1
        once = indices[:1] if expanded else indices
        rows = torch.embedding(table, once, padding_idx)
        result = rows.expand(*indices.shape, -1) if expanded else rows
        if rows.requires_grad:
            tracer.remember(result, Repeated(weight, rows, once, padding_idx))
        return result
    if axis is None:
        return NotImplemented
    return Embedding(tracer, [None, weight], axis, padding_idx)(indices, table)
