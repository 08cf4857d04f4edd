"""Sets of units that a search switches off for each example on its own, and how good other units are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memloc_ext.ablation.deltas import Slab
from memloc_ext.ablation.interpreter import Edit
from memloc_ext.ablation.network import Network
from memloc_ext.ablation.sites import Site
from memloc_ext.ablation.weights import WeightChange
from memloc_ext.ops import ablate_channels, channel_saliency

HUGE = 1e30  # in the place of infinite scores, above those of units that must not be chosen


class Candidates(NamedTuple):
    """Some units of each example.

    Attributes:
        units: ``[examples, count]``, int64, numbered through all sites.
        scores: First-order change of the example's loss less that of the population's, likewise.
        effects: First-order change of the population's loss, likewise.
        changes: What is added to the weights of each, ``[examples, count, weights]``, with zeros behind those of units
            that have fewer; None where no weights change.
    """

    units: Tensor
    scores: Tensor
    effects: Tensor
    changes: Tensor | None = None

    @staticmethod
    def cat(parts: Sequence[Candidates], dim: int = 0) -> Candidates:
        """Join the candidates of different examples, or along dimension 1 different candidates of the same."""
        columns = zip(*parts, strict=True)
        return Candidates._make(None if t[0] is None else torch.cat(t, dim) for t in columns)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Candidates:
        return Candidates._make(None if t is None else change(t) for t in self)

    def pick(self, columns: Tensor) -> Candidates:
        """Return those of some columns, ``[examples, *]``."""
        rows = torch.arange(len(columns), device=columns.device)[:, None]
        return self._map(lambda t: t[rows, columns])

    def repeated(self, example: int, times: int) -> Candidates:
        """Return those of one example, for so many examples."""
        return self._map(lambda t: t[example].expand(times, *t.shape[1:]))

    def best(self, count: int) -> Candidates:
        """Return those with the largest scores, in falling order."""
        return self.pick(self.scores.topk(count, 1).indices)


def finite(scores: Tensor) -> Tensor:
    """Return scores of which none is infinite; those that are not a number are the smallest."""
    return scores.nan_to_num(nan=-HUGE, posinf=HUGE, neginf=-HUGE)


def gradients(
    network: Network,
    inputs: Sequence[Tensor],
    loss: Callable[[Any], Tensor],
    values: Sequence[int],
    edits: dict[int, Edit],
    keep: Iterable[int] = (),
) -> tuple[list[Tensor], Sequence[Tensor | None], dict[int, Tensor]]:
    """Differentiate what a loss makes of a network's output with respect to values, as they are after their edits.

    Returns:
        The values; their gradients, None of what the loss does not depend on; and the values of ``keep``, see
        `Graph.examples`.
    """
    seen: dict[int, list[Tensor]] = {value: [] for value in values}  # of some examples each

    def watched(value: int) -> Edit:
        def edit(t: Tensor, rows: Tensor, read: Callable[[int], Tensor]) -> Tensor:
            t = edits[value](t, rows, read) if value in edits else t
            seen[value].append(t if t.requires_grad else t.detach().requires_grad_())
            return seen[value][-1]

        return edit

    with torch.enable_grad():
        watch = {value: watched(value) for value in values}
        kept = network.graph.examples([t.detach() for t in inputs], keep, edits | watch)
        total, parts = loss(network.output(kept)), [t for value in values for t in seen[value]]
        found = [seen[value][0] if len(seen[value]) == 1 else torch.cat(seen[value]) for value in values]
        if not total.requires_grad:
            return found, [None] * len(found), kept
        grads = iter(torch.autograd.grad(total, parts, allow_unused=True))
    return found, [_joined(seen[value], [next(grads) for _ in seen[value]]) for value in values], kept


def _joined(parts: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Tensor | None:
    """Return the gradients of all examples, None if the loss depends on none."""
    if all(grad is None for grad in grads) or len(grads) == 1:
        return grads[0]
    return torch.cat([torch.zeros_like(t) if g is None else g for t, g in zip(parts, grads, strict=True)])


class Switched:
    """Each example's set of switched-off units.

    Attributes:
        mask: ``[examples, units]``, bool, units numbered through all sites.
        starts: Number of each site's first unit when they are numbered through all sites, then how many there are.
    """

    def __init__(self, network: Network, baselines: Sequence[Tensor], mask: Tensor) -> None:
        self.network, self.baselines, self.mask = network, baselines, mask
        self.starts = list(accumulate((len(b) for b in baselines), initial=0))

    @classmethod
    def none(cls, network: Network, baselines: Sequence[Tensor], examples: int) -> Switched:
        """Return the empty sets of so many examples."""
        units = sum(map(len, baselines))
        return cls(network, baselines, torch.zeros(examples, units, dtype=torch.bool, device=baselines[0].device))

    def of(self, examples: Tensor) -> Switched:
        """Return the sets of some examples, ``[*]`` of their indices; copies."""
        return Switched(self.network, self.baselines, self.mask[examples])

    def edits(self) -> dict[int, Edit]:
        """Return what `Graph.examples` and `Suffix.run` are to be given."""
        edits: dict[int, Edit] = {}
        masks = self.mask.split([len(b) for b in self.baselines], 1)
        used = torch.stack([mask.any() for mask in masks]).tolist()
        for place, baseline, mask, here in zip(self.network.places, self.baselines, masks, used, strict=True):
            if here:
                edits |= dict.fromkeys(place.values, _edit(mask, baseline, place.dim))
        return edits

    def add(self, examples: Tensor, chosen: Candidates) -> None:
        """Add one unit to the sets of some examples."""
        self.mask[examples, chosen.units[:, 0]] = True

    def bytes_per_example(self, units: int) -> int:
        """Return how much memory so many units of an example take besides the masks."""
        return 0

    def changed(self, example: int) -> list[WeightChange]:
        """Return what is done to an example's weights: nothing."""
        return []

    def slab(
        self, site: int, candidates: Candidates, rows: Tensor, columns: Tensor, unchanged: dict[int, Tensor]
    ) -> Slab:
        """Return some candidates of a site switched off, one per row.

        Args:
            site: Index of the site.
            candidates: Of the examples.
            rows: Example of each row, in rising order.
            columns: Candidate of each row.
            unchanged: Values with what is switched off already, ``[examples, *shape]``.
        """
        units = candidates.units[rows, columns] - self.starts[site]
        return self.network.slab(site, units, self.baselines[site])

    def screen(
        self,
        inputs: Sequence[Tensor],
        loss: Callable[[Any], Tensor],
        copies: int,
        population: Tensor | None,
        count: int,
    ) -> Candidates:
        """Return the units that raise an example's loss most over the population's, to first order.

        Args:
            inputs: As of `Graph.examples`; each example ``copies`` times.
            loss: What the model returns to a number, the sum of the examples' losses.
            copies: Rows of each example.
            population: See `total`.
            count: How many, at most those that are not switched off yet.
        """
        own = torch.cat(first_order(inputs, self, loss), 1).unflatten(0, (-1, copies)).sum(1)
        sets = self.of(torch.arange(0, len(inputs[0]), copies, device=own.device))
        return sets.best(own if population is None else own - population, population, count)

    def best(self, scores: Tensor, population: Tensor | None, count: int) -> Candidates:
        """Return the units with the largest scores, ``[examples, units]``, of those that are not switched off."""
        scores, units = finite(scores).masked_fill(self.mask, -torch.inf).topk(count, 1)
        return Candidates(units, scores, torch.zeros_like(scores) if population is None else population[units])

    def total(self, inputs: Sequence[Tensor], loss: Callable[[Any], Tensor]) -> Tensor:
        """Return the first-order change of a loss when a unit is switched off, ``[units]``; see `first_order`."""
        return torch.cat(first_order(inputs, self, loss), 1).sum(0)


def _edit(mask: Tensor, baseline: Tensor, dim: int) -> Edit:
    """Return what switches units off; on a GPU it does not wait to know how many they are."""

    def edit(t: Tensor, rows: Tensor, read: Callable[[int], Tensor]) -> Tensor:
        row, unit = mask[rows].nonzero(as_tuple=True)
        offsets = torch.searchsorted(row, torch.arange(len(rows) + 1, device=row.device))
        return ablate_channels(t, offsets, unit, baseline.to(t.dtype), dim + 1)

    return masked_edit(mask, baseline, dim) if mask.is_cuda else edit


def masked_edit(mask: Tensor, baseline: Tensor, dim: int) -> Edit:
    """Return what replaces the units of a mask, ``[examples, units]``, by their baseline, ``[units]``, in one pass."""

    def edit(t: Tensor, rows: Tensor, read: Callable[[int], Tensor]) -> Tensor:
        shape = [1] * (t.dim() - 1)
        shape[dim] = len(baseline)
        return torch.where(mask[rows].reshape(-1, *shape), baseline.to(t.dtype).reshape(shape), t)

    return edit


def first_order(
    inputs: Sequence[Tensor],
    switched: Switched,
    loss: Callable[[Any], Tensor],
    only: int | None = None,
    scale: float = 1.0,
) -> list[Tensor]:
    """Return the first-order change of a loss when a unit is switched off, per site ``[examples, units]``.

    That is the sum over positions of (baseline - activation) times the gradient with respect to the activation.

    Args:
        inputs: As of `Graph.examples`.
        switched: Units of the same examples that are switched off already.
        loss: What the model returns to a number, the sum of the examples' losses.
        only: Index of the one site that is asked about; by default all are.
        scale: Where between the baseline, 0, and the activation, 1, the gradient is taken; not 0.
    """
    network, edits = switched.network, switched.edits()

    def scaled(value: int, place: Site, baseline: Tensor) -> Edit:
        def edit(t: Tensor, rows: Tensor, read: Callable[[int], Tensor]) -> Tensor:
            t = edits[value](t, rows, read) if value in edits else t
            origin = baseline.to(t.dtype).reshape(-1, *[1] * (t.dim() - place.dim - 2))
            return origin + scale * (t - origin)

        return edit

    sites = list(zip(network.places, switched.baselines, strict=True))
    asked = sites if only is None else sites[only : only + 1]
    values = [value for place, _ in asked for value in place.values]
    towards = {}
    if scale != 1:
        towards = {value: scaled(value, place, baseline) for place, baseline in asked for value in place.values}
    found, grads, _ = gradients(network, inputs, loss, values, edits | towards)
    changes, given = [], iter(zip(found, grads, strict=True))
    for place, baseline in asked:
        change = baseline.new_zeros(len(inputs[0]), len(baseline))
        for _ in place.values:
            activation, grad = next(given)
            if grad is None:
                continue
            own = channel_saliency(activation.detach(), grad, place.dim + 1)
            if network.how != "zero":
                own = own - baseline * grad.movedim(place.dim + 1, 1).flatten(2).sum(2)
            change = change - own
        changes.append(change / scale)
    return changes
