"""The greedy search in a network that is recorded, for blocks of examples."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memloc_ext.ablation.network import Network
from memloc_ext.ablation.signature import check_classes
from memloc_ext.ablation.sites import producer
from memloc_ext.ablation.unit_sets import Candidates, Switched, finite
from memloc_ext.ablation.weight_sets import ChangedWeights
from memloc_ext.ablation.weights import find_filters
from memloc_ext.probes.localization.effects import Population, Sets, noisy_copies, reference_inputs, seeds_of, verify
from memloc_ext.probes.localization.ranking import rank
from memloc_ext.probes.localization.result import ALREADY_WRONG, CAPPED, EXHAUSTED, FLIPPED, Found, Localization, recall
from memloc_ext.probes.localization.settings import Settings
from memloc_ext.tasks import Classification, Tokens, logits_of, wide

_BLOCK = 256  # examples that are searched at a time


class NetworkSearch:
    """A network of a model that is searched, with checked settings."""

    def __init__(
        self,
        model: nn.Module,
        network: Network,
        settings: Settings,
        reference: tuple[Any, ...] | None,
        inputs: Sequence[Tensor],
    ) -> None:
        self.model, self.network, self.settings, self.reference = model, network, settings, reference
        self.baselines = network.baselines(inputs if reference is None else reference_inputs(network, *reference))
        self.filters = []
        if settings.changes_weights:
            self.filters = find_filters(model, network.graph, network.sites, settings.unit == "weight")
        self.population: Population | None = None

    def run(self, inputs: Sequence[Tensor], y: Tensor, progress: Callable[[int], object]) -> Localization:
        """Search in blocks of examples that fit into the memory budget; see `localize`."""
        self.ranks, self.progress = list[int](), progress
        network, found = self.network, []
        starts = self._none(1).starts
        count = min(starts[-1], self.settings.max_units) + self.settings.count(starts[-1])
        held = self._none(1).bytes_per_example(count)
        block = max(1, min(network.examples_at_once, _BLOCK, network.share // max(1, held)))
        for begin in range(0, len(y), block):
            found += self._block([t[begin : begin + block] for t in inputs], y[begin : begin + block])
        names = [site.name for site in network.sites]
        sites = {name: starts[i + 1] - starts[i] for i, name in enumerate(names)}
        dims = {site.name: site.dim for site in network.sites}
        baselines = dict(zip(names, self.baselines, strict=True))
        modules = {name: name for name in names}
        if network.how == "filter":
            modules = {site.name: producer(network.graph.recording, site).module for site in network.sites}
        about = {"sites": sites, "channel_dims": dims, "baselines": baselines, "modules": modules}
        return Localization(found, **about, recall=recall(self.ranks))

    def _none(self, examples: int) -> Sets:
        """Return the sets of so many examples of which nothing is switched off or changed."""
        if not self.filters:
            return Switched.none(self.network, self.baselines, examples)
        step_size = self.settings.step_size if self.settings.action == "step" else None
        return ChangedWeights.none(self.network, self.filters, step_size, examples)

    def _block(self, inputs: list[Tensor], y: Tensor) -> list[Found]:
        network, settings, task = self.network, self.settings, self.settings.task
        with torch.no_grad():
            values = network.graph.examples(inputs, ())
            judged = network.judge_unchanged(self.model, inputs, values, y)
            if self.reference is not None and isinstance(task, Classification | Tokens):
                classes = network.output(values).shape[-1]
                check_classes("localize: reference", task, self.reference[1], classes)
        if self.population is None and self.reference is not None and settings.population is not None:
            self.population = Population(network, self.reference, self._none(1))
        start = [] if self.population is None else [self.population.loss]
        searches = [  # without a status as long as they go on
            Found([], "" if right else ALREADY_WRONG, [loss], list(start), [] if label is None else [label])
            for loss, right, label in zip(*_listed(*judged), strict=True)
        ]
        seeds = seeds_of(inputs[: len(inputs) - network.signature.named], settings.seed)
        copies = [noisy_copies(t, settings.eot, settings.noise, seeds) for t in inputs]
        order = None
        if settings.method != "search":
            order = rank(network, self.baselines, inputs, y, settings.method, seeds)
        switched = self._none(len(y))
        self.progress(sum(bool(search.status) for search in searches))
        while active := [i for i, search in enumerate(searches) if not search.status]:
            self._step(searches, active, inputs, y, copies, switched, order)
            self.progress(sum(bool(searches[i].status) for i in active))
        return [replace(search, changes=switched.changed(i)) for i, search in enumerate(searches)]

    def _step(
        self,
        searches: list[Found],
        active: list[int],
        inputs: list[Tensor],
        labels: Tensor,
        copies: list[Tensor],
        switched: Sets,
        order: Tensor | None,
    ) -> None:
        """Switch one more unit off for the active examples of a block.

        The noisy copies are ``[block * eot, *]``, the scores of a ranking that is followed ``[block, units]``.
        """
        index = torch.tensor(active, device=labels.device)
        settings, own, done = self.settings, switched.of(index), [searches[i] for i in active]
        some, y = [t[index] for t in inputs], labels[index]
        units = own.starts[-1]
        count = settings.count(units - len(done[0].units))  # the searches of a block have come equally far
        if count == 0:
            for i in active:
                searches[i] = replace(searches[i], status=EXHAUSTED)
            return
        if order is None:
            ours = [t.unflatten(0, (-1, settings.eot))[index] for t in copies]
            candidates = self._screen(ours, some, y, own, count, settings.is_refreshed(len(done[0].units)))
        else:
            assert isinstance(own, Switched)
            candidates = own.best(order[index], None, count)
        judged = verify(self.network, candidates, own, some, y)
        losses = judged.loss
        before = torch.tensor([search.losses[-1] for search in done], device=y.device, dtype=losses.dtype)
        effects = candidates.effects
        if settings.population == "exact" and self.population is not None:
            so_far = before.new_tensor([search.population_losses[-1] for search in done])
            effects = self.population.exact(candidates, own) - so_far[:, None]
        gain = finite(losses - before[:, None] - effects)
        flips = ~judged.right & losses.isfinite()  # logits that are no numbers predict nothing
        best = torch.where(flips.any(1, keepdim=True) & ~flips, -torch.inf, gain).argmax(1, keepdim=True)
        chosen = candidates.pick(best)
        switched.add(index, chosen)
        if settings.is_exhaustive:
            self.ranks += (candidates.scores > chosen.scores).sum(1).tolist()
        taken = judged.map(lambda t: t.gather(1, best)[:, 0])
        picked, changes, *listed = _listed(chosen.units[:, 0], effects.gather(1, best)[:, 0], *taken)
        off = len(done[0].units) + 1
        ends = EXHAUSTED if off == units else CAPPED if off >= settings.max_units else ""
        for i, unit, change, loss, right, predicted in zip(active, picked, changes, *listed, strict=True):
            site = bisect.bisect_right(own.starts, unit) - 1
            _take(searches[i], (self.network.sites[site].name, unit - own.starts[site]), change, loss, predicted)
            searches[i] = replace(searches[i], status=ends if right else FLIPPED)

    def _screen(
        self,
        copies: Sequence[Tensor],
        inputs: Sequence[Tensor],
        y: Tensor,
        switched: Sets,
        count: int,
        refreshed: bool,
    ) -> Candidates:
        """Return the best units of each example, to first order, of noisy copies ``[examples, eot, *]``.

        ``refreshed``: whether the effect on the population is measured anew.
        """
        eot, task, found = self.settings.eot, self.settings.task, []
        step = 1 if refreshed else max(1, self.network.gradients_at_once // eot)
        for begin in range(0, len(y), step):
            part = slice(begin, begin + step)
            labels, effect = y[part], None if self.population is None else self.population.effect
            if self.population is not None and refreshed:
                without: list[Tensor] = []
                if self.settings.objective == "authors":  # the example itself is no part of its population
                    without = [t[begin] for t in (*inputs[: len(inputs) - self.network.signature.named], y)]
                effect = self.population.refreshed(switched.of(torch.tensor([begin], device=y.device)), without)

            def loss(output: Any, labels: Tensor = labels) -> Tensor:
                if isinstance(task, Classification):
                    mean = wide(logits_of(output)).unflatten(0, (-1, eot)).mean(1)
                    return F.cross_entropy(mean, labels, reduction="sum")
                return task.loss(output, labels.repeat_interleave(eot, 0)).sum() / eot

            rows = torch.arange(len(y), device=y.device)[part].repeat_interleave(eot)
            given = [t[part].flatten(0, 1) for t in copies]
            found.append(switched.of(rows).screen(given, loss, eot, effect, count))
        return Candidates.cat(found)


def _take(search: Found, unit: tuple[str, int], change: float, loss: float, predicted: int | None) -> None:
    """Add a unit, what the population's loss changes by and the example is worth with it."""
    search.units.append(unit)
    search.losses.append(loss)
    if predicted is not None:
        search.predicted.append(predicted)
    if search.population_losses:
        search.population_losses.append(search.population_losses[-1] + change)


def _listed(*columns: Tensor | None) -> list[Sequence[Any]]:
    """Return the numbers of tensors ``[examples]``, read from their device at once; of one that is None, Nones."""
    there = [t for t in columns if t is not None]
    read = zip(there, torch.stack([t.double() for t in there]).tolist(), strict=True)
    # whole numbers are below 2^53
    listed = [row if t.is_floating_point() else [*map(bool if t.dtype == torch.bool else int, row)] for t, row in read]
    found = iter(listed)
    return [[None] * len(there[0]) if t is None else next(found) for t in columns]
