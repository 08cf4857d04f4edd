"""Variants that differ from the unchanged network in a few neighbouring channels, and operators that keep them so."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memloc_ext.ablation.channels import RESHAPES, permutation
from memloc_ext.ablation.recording import Call, Ref, as_list
from memloc_ext.ablation.rows import BATCH_NORMS, COPIES, POOLS, normalises_by_batch

_REDUCTIONS = frozenset(("mean", "amax", "amin", "sum"))


@dataclass
class Slab:
    """In row ``r``, indices ``start[r]`` to ``start[r] + width`` of one dimension are replaced.

    Attributes:
        values: What they are replaced by, ``[rows, *shape]`` with ``width`` at the dimension.
        start: ``[rows]``, int64.
        dim: Of the value without rows.
    """

    values: Tensor
    start: Tensor
    dim: int

    @property
    def width(self) -> int:
        """How many indices are replaced."""
        return self.values.shape[self.dim + 1]

    def indices(self) -> Tensor:
        """Return the replaced indices, ``[rows, width]``."""
        return self.start[:, None] + torch.arange(self.width, device=self.start.device)

    def of(self, unchanged: Tensor, rows: Tensor) -> Tensor:
        """Return what ``unchanged``, ``[examples, *shape]``, has there for the example of each row."""
        picked = unchanged.movedim(self.dim + 1, 1)[rows[:, None], self.indices()]
        return picked.movedim(1, self.dim + 1)

    def of_constant(self, t: Tensor, rank: int) -> Tensor:
        """Return the part of a constant that meets the slab when it is broadcast to values of so many dimensions."""
        place = self.dim - (rank - t.dim())
        if place < 0 or t.shape[place] == 1:
            return t
        picked = t.movedim(place, 0)[self.indices()]  # [rows, width, *]
        picked = picked.movedim(1, place + 1)
        return picked.reshape(len(picked), *[1] * (rank - t.dim()), *picked.shape[1:])

    def dense(self, unchanged: Tensor, rows: Tensor) -> Tensor:
        """Return the whole values, ``[rows, *shape]``; see `of`."""
        return self.written_into(unchanged[rows])

    def written_into(self, values: Tensor) -> Tensor:
        """Return ``values`` themselves, ``[rows, *shape]``, with the replaced ones in them."""
        index = torch.arange(len(values), device=values.device)[:, None]
        values.movedim(self.dim + 1, 1)[index, self.indices()] = self.values.movedim(self.dim + 1, 1).to(values.dtype)
        return values


def run_slab(
    call: Call,
    slabs: dict[int, Slab],
    shapes: Sequence[torch.Size],
    unchanged: Callable[[int], Tensor],
    rows: Tensor,
) -> list[Slab] | None:
    """Run a call on slabs if its outputs are slabs too, else return None.

    Args:
        call: That reads a slab, and else what is the unchanged network's.
        slabs: Value to slab.
        shapes: Of the values, without rows.
        unchanged: Value to what it is in the unchanged network, ``[examples, *shape]``.
        rows: Example of each row.
    """
    first, *others = slabs.values()
    if any((s.dim, s.width) != (first.dim, first.width) for s in others):
        return None
    if any(s.start is not first.start and not torch.equal(s.start, first.start) for s in others):
        return None
    name, refs, function = call.name, call.refs, call.function
    if len(call.outputs) == 1 and (call.is_pointwise or name in COPIES):
        shape = shapes[call.outputs[0]]
        if any(len(shapes[ref]) != len(shape) or shapes[ref][first.dim] != shape[first.dim] for ref in refs):
            return None
        given = []
        for leaf in call.leaves:
            if isinstance(leaf, Ref):
                kept = slabs.get(leaf.index)
                given.append(kept.values if kept else first.of(unchanged(leaf.index), rows))
            elif isinstance(leaf, Tensor):
                given.append(first.of_constant(leaf, len(shape)))
            else:
                given.append(leaf)
        return [Slab(call.run(given), first.start, first.dim)]
    ref = call.args[0]
    if not isinstance(ref, Ref) and name != "cat":
        return None
    if name in BATCH_NORMS and first.dim == 1 and len(refs) == 1:
        return [_normalised(call, first)]
    if name in POOLS and first.dim == 1 and len(shapes[ref.index]) == 4:
        pooled = as_list(function(first.values.flatten(0, 1), *call.args[1:], **call.kwargs))
        return [Slab(t.unflatten(0, (len(rows), -1)), first.start, 1) for t in pooled]
    if name in _REDUCTIONS and len(call.args) > 1 and call.args[1]:
        rank = len(shapes[ref.index])
        dims = {d % rank for d in call.args[1]}
        if first.dim in dims:
            return None
        keep = len(shapes[call.outputs[0]]) == rank
        dim = first.dim if keep else first.dim - sum(d < first.dim for d in dims)
        return [Slab(torch.vmap(lambda t: function(t, *call.args[1:], **call.kwargs))(first.values), first.start, dim)]
    if name in RESHAPES and getattr(function, "_overloadname", "") != "dtype":
        return _reshaped(first, shapes[ref.index], shapes[call.outputs[0]])
    if name in ("transpose", "permute", "t"):
        order = permutation(name, call.args, len(shapes[ref.index]))
        values = first.values.permute(0, *(d + 1 for d in order))
        return [Slab(values, first.start, order.index(first.dim))]
    if name == "cat":
        return _concatenated(call, first, slabs, shapes)
    return None


def _normalised(call: Call, slab: Slab) -> Slab:
    """Return what a batch norm makes of a slab of channels."""
    _, weight, bias, mean, var, *_, eps = call.args
    index, shape = slab.indices(), (len(slab.values), 1, slab.width, *[1] * (slab.values.dim() - 3))
    if normalises_by_batch(call):
        var, mean = torch.var_mean(slab.values.transpose(1, 2).flatten(2), 2, correction=0)
    else:
        var, mean = var[index], mean[index]
    scale = (var + eps).rsqrt() * (1 if weight is None else weight[index])
    values = (slab.values - mean.reshape(shape)) * scale.reshape(shape)
    values = values + (0 if bias is None else bias[index].reshape(shape))
    return Slab(values.to(slab.values.dtype), slab.start, 1)


def _reshaped(slab: Slab, old: torch.Size, new: torch.Size) -> list[Slab] | None:
    """Return a slab of the same elements in another shape, if they are neighbours there too."""
    outer, inner = math.prod(old[: slab.dim]), math.prod(old[slab.dim + 1 :])
    for dim, size in enumerate(new):
        block = math.prod(new[dim + 1 :])
        if math.prod(new[:dim]) != outer or (size == 1 and old[slab.dim] != 1) or not block or inner % block:
            continue
        shape = (len(slab.values), *new[:dim], slab.width * inner // block, *new[dim + 1 :])
        return [Slab(slab.values.reshape(shape), (slab.start * inner).div(block, rounding_mode="floor"), dim)]
    return None


def _concatenated(call: Call, slab: Slab, slabs: dict[int, Slab], shapes: Sequence[torch.Size]) -> list[Slab] | None:
    """Return the slab behind the channels that come before it."""
    arguments: list[Any] = [*call.args, 0]
    parts, dim = arguments[0], arguments[1]
    sizes = [(shapes[p.index] if isinstance(p, Ref) else p.shape) for p in parts]
    dim %= len(sizes[0])
    changed = [i for i, p in enumerate(parts) if isinstance(p, Ref) and p.index in slabs]
    if dim != slab.dim or len(changed) != 1:
        return None
    before = sum(size[dim] for size in sizes[: changed[0]])
    return [Slab(slab.values, slab.start + before, dim)]
