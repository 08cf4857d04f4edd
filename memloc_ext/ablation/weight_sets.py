"""Weights that a search changes for each example on its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from memloc_ext.ablation.deltas import Slab
from memloc_ext.ablation.interpreter import Edit
from memloc_ext.ablation.network import Network
from memloc_ext.ablation.unit_sets import Candidates, finite, gradients
from memloc_ext.ablation.weights import CHANNELS, Filters, WeightChange


class _Entries(NamedTuple):
    """Changed units, in the order in which they were changed."""

    owners: Tensor  # the example that each is changed for
    units: Tensor  # numbered through all sites
    changes: Tensor  # what is added to their weights, [entries, weights]


class ChangedWeights:
    """Each example's set of changed weights, with the interface of `Switched`.

    The network has ``how="filter"`` and ``weights=True``, and the filters are those of its sites. A unit's weights take
    one gradient step of a size; without one they are set to zero. The entries are of all examples.
    """

    def __init__(
        self, network: Network, filters: Sequence[Filters], step_size: float | None, examples: Tensor, entries: _Entries
    ) -> None:
        self.network, self.filters, self.step_size = network, list(filters), step_size
        self.examples, self.entries = examples, entries
        self.starts = list(accumulate((f.shape[0] for f in filters), initial=0))

    @classmethod
    def none(
        cls, network: Network, filters: Sequence[Filters], step_size: float | None, examples: int
    ) -> ChangedWeights:
        """Return the empty sets of so many examples.

        Raises:
            ValueError: If the gradient of one layer's weights does not fit into the memory budget.
        """
        least = max(4 * f.layer.weight.numel() * f.layer.weight.element_size() for f in filters)
        if least > network.share:
            raise ValueError(f"memory_budget must hold {least} bytes for one example's gradient, got {network.share}")
        weight = filters[0].layer.weight
        nobody = torch.zeros(0, dtype=torch.int64, device=weight.device)
        entries = _Entries(nobody, nobody, weight.new_zeros(0, max(f.shape[1] for f in filters)))
        return cls(network, filters, step_size, torch.arange(examples, device=weight.device), entries)

    def of(self, examples: Tensor) -> ChangedWeights:
        """Return the sets of some examples, ``[*]`` of their indices; what is added later is not in them."""
        return ChangedWeights(self.network, self.filters, self.step_size, self.examples[examples], self.entries)

    def add(self, examples: Tensor, chosen: Candidates) -> None:
        """Add one unit to the sets of some examples."""
        assert chosen.changes is not None
        new = (self.examples[examples], chosen.units[:, 0], chosen.changes[:, 0])
        self.entries = _Entries(*map(torch.cat, zip(self.entries, new, strict=True)))

    def bytes_per_example(self, units: int) -> int:
        """Return how much memory the changes of so many units of an example take."""
        return units * self.entries.changes.shape[1] * self.entries.changes.element_size()

    def changed(self, example: int) -> list[WeightChange]:
        """Return what is done to an example's weights, in the order in which it was."""
        (mine,) = (self.entries.owners == self.examples[example]).nonzero(as_tuple=True)
        found = []
        for unit, change in zip(self.entries.units[mine].tolist(), self.entries.changes[mine], strict=True):
            site = max(i for i, start in enumerate(self.starts[:-1]) if start <= unit)
            size = self.filters[site].shape[1]
            first = (unit - self.starts[site]) * size
            found.append(WeightChange(self.filters[site].parameter, first, change[:size].clone()))
        return found

    def edits(self) -> dict[int, Edit]:
        """Return what `Graph.examples` and `Suffix.run` are to be given."""
        here = [site for site in range(len(self.filters)) if len(self._entries(site)[0])]
        return {self.filters[site].layer.output: self._edit(site) for site in here}

    def slab(
        self, site: int, candidates: Candidates, rows: Tensor, columns: Tensor, unchanged: dict[int, Tensor]
    ) -> Slab:
        """Return some candidates of a site changed, one per row; see `Switched.slab`."""
        assert candidates.changes is not None
        filters = self.filters[site]
        units = candidates.units[rows, columns] - self.starts[site]
        changes = candidates.changes[rows, columns, : filters.shape[1]]
        added = filters.added(unchanged[filters.layer.input], rows, units, changes)
        outputs = filters.outputs(units)
        own = unchanged[filters.layer.output].movedim(CHANNELS, 1)[rows, outputs]
        return Slab((own + added).unsqueeze(CHANNELS), outputs, CHANNELS - 1)

    def screen(
        self,
        inputs: Sequence[Tensor],
        loss: Callable[[Any], Tensor],
        copies: int,
        population: Tensor | None,
        count: int,
    ) -> Candidates:
        """Return the units whose change raises an example's loss most over the population's; see `Switched.screen`."""
        values, grads = self._gradients(inputs, loss)
        device, found, begin = self.examples.device, [], 0
        sets = self.of(torch.arange(0, len(self.examples), copies, device=device))
        for site, filters in enumerate(self.filters):
            size = filters.layer.weight.numel()
            others = None if population is None else population[begin : begin + size].reshape(filters.shape)
            step, parts = max(1, self.network.share // (4 * size * grads[site].element_size())), []
            for first in range(0, len(sets.examples), step):
                rows = slice(first * copies, (first + step) * copies)
                own = filters.gradients(values[filters.layer.input][rows], grads[site][rows], copies)
                part = sets.of(torch.arange(first, first + len(own), device=device))
                parts.append(part._best(site, own.reshape(len(own), *filters.shape), others, count))
            found.append(Candidates.cat(parts))
            begin += size
        return Candidates.cat(found, 1).best(count)

    def total(self, inputs: Sequence[Tensor], loss: Callable[[Any], Tensor]) -> Tensor:
        """Return the gradient of a loss with respect to all sites' weights, ``[weights]``; see `screen`."""
        values, grads = self._gradients(inputs, loss)
        return torch.cat(
            [
                filters.gradients(values[filters.layer.input], grad, len(grad)).flatten()
                for filters, grad in zip(self.filters, grads, strict=True)
            ]
        )

    def _best(self, site: int, own: Tensor, others: Tensor | None, count: int) -> Candidates:
        """Return the best units of a site; overwrites the examples' gradients, ``[examples, units, weights]``."""
        weights = self.filters[site].weights()
        ascent = own if others is None else own.sub_(others)
        changes = -weights if self.step_size is None else ascent * self.step_size
        scores = finite((ascent * changes).sum(2))
        rows, entries = self._entries(site)
        scores[rows, self.entries.units[entries] - self.starts[site]] = -torch.inf
        scores, units = scores.topk(min(count, scores.shape[1]), 1)
        if self.step_size is None:
            changes = changes[units]
        else:
            changes = changes.gather(1, units[:, :, None].expand(-1, -1, weights.shape[1]))
        effects = torch.zeros_like(scores) if others is None else (changes * others[units]).sum(2)
        changes = F.pad(changes, (0, self.entries.changes.shape[1] - weights.shape[1]))
        return Candidates(units + self.starts[site], scores, effects, changes)

    def _gradients(
        self, inputs: Sequence[Tensor], loss: Callable[[Any], Tensor]
    ) -> tuple[dict[int, Tensor], list[Tensor]]:
        """Return the layers' inputs, and the gradient of a loss with respect to each layer's output."""
        outputs, reads = [f.layer.output for f in self.filters], {f.layer.input for f in self.filters}
        found, grads, kept = gradients(self.network, inputs, loss, outputs, self.edits(), reads)
        values = {value: t.detach() for value, t in kept.items()}
        return values, [torch.zeros_like(t) if grad is None else grad for t, grad in zip(found, grads, strict=True)]

    def _entries(self, site: int) -> tuple[Tensor, Tensor]:
        """Return rows and entries of what is changed at a site in each of the examples, rows in rising order."""
        of_site = (self.entries.units >= self.starts[site]) & (self.entries.units < self.starts[site + 1])
        rows, entries = ((self.examples[:, None] == self.entries.owners) & of_site).nonzero(as_tuple=True)
        return rows, entries

    def _edit(self, site: int) -> Edit:
        filters, size = self.filters[site], self.filters[site].shape[1]

        def edit(t: Tensor, rows: Tensor, read: Callable[[int], Tensor]) -> Tensor:
            row, entry = self.of(rows)._entries(site)
            units = self.entries.units[entry] - self.starts[site]
            added = filters.added(read(filters.layer.input), row, units, self.entries.changes[entry, :size])
            t = t.movedim(CHANNELS, 1)
            return t.index_put((row, filters.outputs(units)), added, accumulate=True).movedim(1, CHANNELS)

        return edit
