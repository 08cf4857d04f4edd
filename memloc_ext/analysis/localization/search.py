"""The greedy search for the few units that flip an example, for many examples at a time."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memloc_ext.analysis.localization.ranking import METHODS, rank
from memloc_ext.analysis.localization.result import ALREADY_WRONG, CAPPED, EXHAUSTED, FLIPPED, Found, Localization
from memloc_ext.nn.ablation.losses import check_examples, check_logits, judge, wide
from memloc_ext.nn.ablation.network import HOWS, Network, given
from memloc_ext.nn.ablation.switched import Switched, first_order

POPULATIONS = ("first_order", "exact", None)
OBJECTIVES = ("exact", "first_order", "authors")
_RECALL_AT = (1, 8, 32, 128)
_BLOCK = 256  # examples that are searched at a time
_HUGE = 1e30  # in the place of infinite scores, above those of units that are off


@dataclass
class _Settings:
    """Of `localize`."""

    max_units: int
    verify: int | None  # None: all
    eot: int
    noise: float
    seed: int
    objective: str
    population: str | None
    refresh: int
    method: str


@dataclass
class _Search:
    """Where the search of one example is."""

    label: int
    losses: list[float]
    predicted: list[int]
    population: list[float]
    units: list[tuple[str, int]] = field(default_factory=list)
    status: str = ""

    def done(self) -> Found:
        return Found(self.units, self.status, self.losses, self.population, self.predicted)


def localize(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    reference: tuple[Tensor, Tensor] | None = None,
    sites: Sequence[str] | None = None,
    how: str = "zero",
    max_units: int = 50,
    verify: int | str = 32,
    objective: str = "exact",
    population: str | None = "first_order",
    refresh: int = 0,
    method: str = "search",
    eot: int = 5,
    noise: float = 0.01,
    seed: int = 0,
    memory_budget: int = 1 << 30,
    progress: Callable[[int], object] | None = None,
) -> Localization:
    r"""Find the few units that must be switched off until each example is no longer predicted as its label.

    Per step and example: one forward and backward pass over ``eot`` noisy copies gives, to first order, what switching
    off each unit does to the example's loss; less what it does to the population's, this ranks all units. The
    ``verify`` best are then switched off exactly, one at a time, in the example itself: if some flip the prediction,
    the best of these is chosen, else the one that raises the example's loss most over the population's. Chosen units
    stay off. The search ends with a flip, after ``max_units``, or when no unit is left.

    The model runs in evaluation mode and is left as it was. Examples do not depend on each other: the results are
    those of one example at a time.

    Args:
        model: Returns logits ``[batch, classes]``. Examples must not meet in evaluation mode, and no activation may be
            read into Python.
        x: ``[batch, *]``, on the model's device.
        y: The labels that are to be lost, ``[batch]``, int64: those that the model was trained on.
        reference: Examples and labels that stand for the population, ``([*, *], [*])``. None only where nothing needs
            them: ``population=None`` and ``how`` other than ``mean``.
        sites: See `ablation_losses`.
        how: See `ablation_losses`; the mean is that over ``reference``.
        max_units: Largest number of units per example.
        verify: How many of the first-order screen's best units are switched off exactly in each step, or ``"all"``:
            the exhaustive scan, of which `Localization.recall` then tells how often the screen would have done.
        objective: ``exact``, as above; ``first_order``: the best unit of the screen is taken unseen; ``authors``: the
            score of the paper's code, the sum of weight times gradient over the filter of a unit of the loss of the
            population (the reference examples, with the same units switched off, an example that is among them
            left out) less that of the example, which takes ``how="filter"`` and a pass over the reference per step
            and example, and verifies nothing.
        population: How the population's loss is followed. ``first_order``: to first order, by one pass over the
            reference examples, shared by all examples; with ``refresh=n`` again after every n-th unit, per example,
            with its units switched off: a forward and backward pass over the reference for each. ``exact``: each
            verified unit is also switched off in every reference example: ``verify * len(reference)`` partial forward
            passes per step and example. None: not at all.
        refresh: See ``population``; 0 is never.
        method: ``search``, as above, or a ranking of the units that is made once and then followed, to compare with:
            ``activation``, ``gradient_activation``, ``integrated_gradients`` (see `rank`) or ``random``.
        eot: Noisy copies of an example, whose logits are averaged; at least 1.
        noise: Norm of the Gaussian noise over that of the example; with 0 one copy is enough.
        seed: Of the noise and of ``random``; the global generators are not touched.
        memory_budget: See `ablation_losses`.
        progress: Called with the number of examples whose search has ended.

    Returns:
        A `Found` per example.

    Raises:
        TypeError: If a label is not int64.
        ValueError: If an argument breaks the above, or the unchanged network's logits are not finite.
        UnsupportedError: If the model reads an activation into Python or its examples meet.

    Source: Maini et al., "Can Neural Network Memorization Be Localized?", ICML 2023: the neurons that flip an example.
    """
    settings = _Settings(
        max_units, None if verify == "all" else _count(verify), eot, noise, seed, objective, population, refresh, method
    )
    how = _check(settings, x, y, reference, how)
    network = Network(model, x, sites, how, memory_budget, edited=True)
    return _Searches(model, network, settings, x, y, reference, progress or (lambda _: None)).run()


class _Searches:
    def __init__(
        self,
        model: nn.Module,
        network: Network,
        settings: _Settings,
        x: Tensor,
        y: Tensor,
        reference: tuple[Tensor, Tensor] | None,
        progress: Callable[[int], object],
    ) -> None:
        self.model, self.network, self.settings, self.progress = model, network, settings, progress
        self.inputs, self.y, self.reference = given(x), y, reference
        self.baselines = network.baselines(x if reference is None else reference[0])
        self.starts = [0]
        for site in network.sites:
            self.starts.append(self.starts[-1] + site.units)
        self.ranks: list[int] = []
        self.population, self.population_loss = None, 0.0
        if reference is not None and settings.population is not None:
            empty = Switched.none(network, self.baselines, 1)
            self.population, self.population_loss = self._population(empty, reference[0].new_ones(len(reference[1])))

    def run(self) -> Localization:
        """Search in blocks of examples that fit into the memory budget."""
        network, found = self.network, []
        block = min(network.examples_at_once, _BLOCK)
        for begin in range(0, len(self.y), block):
            found += self._block(begin, min(len(self.y), begin + block))
        sites = {site.name: site.units for site in network.sites}
        dims = {site.name: site.dim for site in network.sites}
        baselines = dict(zip(sites, self.baselines, strict=True)) if network.how != "filter" else {}
        return Localization(found, sites, dims, baselines, self._recall())

    def _block(self, begin: int, end: int) -> list[Found]:
        inputs, y = [t[begin:end] for t in self.inputs], self.y[begin:end]
        with torch.no_grad():
            logits = check_logits(self.network.graph.examples(inputs, ())[self.network.output][:, 0], y)
            self.network.check_agreement(self.model, inputs, logits)
        losses, predicted = judge(logits, y)
        start = [] if self.settings.population is None else [self.population_loss]
        searches = [
            _Search(*values, list(start))
            for values in zip(
                y.tolist(), ([v] for v in losses.tolist()), ([v] for v in predicted.tolist()), strict=True
            )
        ]
        for search in searches:
            search.status = "" if search.predicted[0] == search.label else ALREADY_WRONG
        copies = torch.cat([self._noisy(inputs[0][i], begin + i) for i in range(end - begin)])
        order = self._order(inputs, y, begin) if self.settings.method != "search" else None
        switched = Switched.none(self.network, self.baselines, end - begin)
        self.progress(sum(bool(search.status) for search in searches))
        while active := [i for i, search in enumerate(searches) if not search.status]:
            index = torch.tensor(active, device=y.device)
            self._step([searches[i] for i in active], index, inputs, copies, switched, order)
            self.progress(sum(bool(searches[i].status) for i in active))
        return [search.done() for search in searches]

    def _step(
        self,
        searches: list[_Search],
        index: Tensor,
        inputs: list[Tensor],
        copies: Tensor,
        switched: Switched,
        order: Tensor | None,
    ) -> None:
        """Switch one more unit off for each of some examples of a block.

        Args:
            searches: Of these examples.
            index: Of them in the block.
            inputs: Of the block.
            copies: Noisy, ``[block * eot, *]``.
            switched: Units of the block's examples; the chosen ones are added.
            order: Scores of a ranking that is followed, ``[block, units]``.
        """
        settings, own = self.settings, switched.of(index)
        y = torch.tensor([search.label for search in searches], device=index.device)
        some = [t[index] for t in inputs]
        population = None if self.population is None else self.population.expand(len(index), -1)
        if self._is_refreshed(searches[0]):
            population = torch.stack([self._refreshed(own, i, some[0][i], y[i]) for i in range(len(index))])
        if order is None:
            scores = self._own_change(copies, index, y, own, some)
            scores = scores if population is None else scores - population
        else:
            scores = order[index]
        scores = scores.nan_to_num(nan=-_HUGE, posinf=_HUGE, neginf=-_HUGE)
        scores = scores.masked_fill(torch.cat(own.masks, 1), -torch.inf)
        units = scores.shape[1]
        left = units - len(searches[0].units)  # the searches of a block have come equally far
        count = left if settings.verify is None else min(left, settings.verify)
        if order is not None or settings.objective != "exact":
            count = min(left, 1)
        if count == 0:
            for search in searches:
                search.status = EXHAUSTED
            return
        candidates = scores.topk(count, 1).indices
        losses, predicted = self._switch_off(candidates, own, some, y)
        before = torch.tensor([search.losses[-1] for search in searches], device=y.device, dtype=losses.dtype)
        gain = losses - before[:, None]
        effect = None if population is None else population.gather(1, candidates)
        if settings.population == "exact":
            effect = self._population_effect(candidates, own, searches)
        if effect is not None:
            gain = gain - effect
        gain = gain.nan_to_num(nan=-_HUGE, posinf=_HUGE, neginf=-_HUGE)
        best = torch.where((predicted != y[:, None]).any(1, keepdim=True) & (predicted == y[:, None]), -torch.inf, gain)
        best = best.argmax(1, keepdim=True)
        chosen = candidates.gather(1, best)
        if settings.verify is None:
            self.ranks += (scores > scores.gather(1, chosen)).sum(1).tolist()
        columns = [chosen, losses.gather(1, best), predicted.gather(1, best)]
        columns.append(torch.zeros_like(columns[1]) if effect is None else effect.gather(1, best))
        for search, i, (unit, loss, label, change) in zip(
            searches, index.tolist(), zip(*(c[:, 0].tolist() for c in columns), strict=True), strict=True
        ):
            site = bisect.bisect_right(self.starts, unit) - 1
            switched.masks[site][i, unit - self.starts[site]] = True
            search.units.append((self.network.sites[site].name, unit - self.starts[site]))
            search.losses.append(loss)
            search.predicted.append(label)
            if search.population:
                search.population.append(search.population[-1] + change)
            if label != search.label:
                search.status = FLIPPED
            elif len(search.units) == units:
                search.status = EXHAUSTED
            elif len(search.units) >= settings.max_units:
                search.status = CAPPED

    def _own_change(self, copies: Tensor, index: Tensor, y: Tensor, switched: Switched, inputs: list[Tensor]) -> Tensor:
        """Return the first-order change of each example's loss, ``[examples, units]``."""
        eot, changes = self.settings.eot, []
        copies = copies.unflatten(0, (-1, eot))[index]
        step = max(1, self.network.gradients_at_once // eot)
        for begin in range(0, len(index), step):
            part = slice(begin, begin + step)
            rows = torch.arange(len(index), device=index.device)[part].repeat_interleave(eot)
            labels = y[part]

            def loss(logits: Tensor, labels: Tensor = labels) -> Tensor:
                mean = wide(logits).unflatten(0, (-1, eot)).mean(1)
                return F.cross_entropy(mean, labels, reduction="sum")

            given = [copies[part].flatten(0, 1), *(t[rows] for t in inputs[1:])]
            change = torch.cat(first_order(given, switched.of(rows), loss), 1)
            changes.append(change.unflatten(0, (-1, eot)).sum(1))
        return torch.cat(changes)

    def _switch_off(
        self, candidates: Tensor, switched: Switched, inputs: list[Tensor], y: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return loss and prediction with each candidate off too, ``[examples, candidates]``."""
        network, edits = self.network, switched.edits()
        losses = torch.empty(candidates.shape, dtype=torch.float64, device=y.device)
        predicted = torch.empty_like(candidates)
        with torch.no_grad():
            unchanged = network.graph.examples(inputs, network.needed, edits)
            for s, suffix in enumerate(network.suffixes):
                here = (candidates >= self.starts[s]) & (candidates < self.starts[s + 1])
                rows, columns = here.nonzero(as_tuple=True)
                for begin in range(0, len(rows), network.rows_at_once[s]):
                    part = slice(begin, begin + network.rows_at_once[s])
                    row, column = rows[part], columns[part]
                    slab = network.slab(s, candidates[row, column] - self.starts[s], self.baselines[s])
                    logits = suffix.run(unchanged, row, slab, edits)[:, 0]
                    loss, label = judge(logits, y[row])
                    losses[row, column], predicted[row, column] = loss.double(), label
        return losses, predicted

    def _population(self, switched: Switched, weights: Tensor) -> tuple[Tensor, float]:
        """Return the first-order change of the population's loss per unit, ``[units]``, and that loss.

        Args:
            switched: Units of one example, that are switched off in all of the reference examples.
            weights: Of the reference examples in the sum over them, that is divided by their number.
        """
        assert self.reference is not None
        (x, y), total, value = self.reference, 0.0, 0.0
        for begin in range(0, len(y), self.network.gradients_at_once):
            part = slice(begin, begin + self.network.gradients_at_once)
            rows, labels, weight = torch.zeros_like(y[part]), y[part], weights[part] / len(y)

            def loss(logits: Tensor, labels: Tensor = labels, weight: Tensor = weight) -> Tensor:
                nonlocal value
                result = (F.cross_entropy(wide(logits), labels, reduction="none") * weight).sum()
                value += float(result.detach())
                return result

            total = total + torch.cat(first_order([x[part]], switched.of(rows), loss), 1).sum(0)
        assert isinstance(total, Tensor)
        return total, value

    def _is_refreshed(self, search: _Search) -> bool:
        settings = self.settings
        if settings.objective == "authors":
            return True
        done = len(search.units)
        return settings.refresh > 0 and done > 0 and done % settings.refresh == 0 and self.population is not None

    def _refreshed(self, switched: Switched, i: int, x: Tensor, y: Tensor) -> Tensor:
        assert self.reference is not None
        others, weights = self.reference[0], torch.ones(len(self.reference[1]), device=y.device)
        if self.settings.objective == "authors":  # the example itself is no part of its population
            same = (others == x).flatten(1).all(1) & (self.reference[1] == y)
            weights = weights.masked_fill(same, 0)
        return self._population(switched.of(torch.tensor([i], device=y.device)), weights)[0]

    def _population_effect(self, candidates: Tensor, switched: Switched, searches: list[_Search]) -> Tensor:
        """Return the exact change of the population's mean loss, ``[examples, candidates]``."""
        assert self.reference is not None
        x, y = self.reference
        effects, step = [], self.network.examples_at_once
        for i, search in enumerate(searches):
            total = torch.zeros(candidates.shape[1], dtype=torch.float64, device=y.device)
            for begin in range(0, len(y), step):
                some, labels = [x[begin : begin + step]], y[begin : begin + step]
                own = switched.of(torch.full((len(labels),), i, device=y.device))
                losses, _ = self._switch_off(candidates[i].expand(len(labels), -1), own, some, labels)
                total += losses.sum(0)
            effects.append(total / len(y) - search.population[-1])
        return torch.stack(effects)

    def _noisy(self, x: Tensor, index: int) -> Tensor:
        """Return noisy copies of an example, ``[eot, *]``: the same for each position in the batch and seed."""
        eot, noise = self.settings.eot, self.settings.noise
        generator = torch.Generator().manual_seed((self.settings.seed * 1_000_003 + index) % (1 << 63))
        draws = torch.randn(eot, *x.shape, generator=generator).to(x)
        norms = draws.flatten(1).norm(dim=1).clamp_min(torch.finfo(draws.dtype).tiny)
        return x + draws * (noise * x.norm() / norms).reshape(-1, *[1] * x.dim())

    def _order(self, inputs: list[Tensor], y: Tensor, begin: int) -> Tensor:
        step, parts = self.network.gradients_at_once, []
        for first in range(0, len(y), step):
            some = [t[first : first + step] for t in inputs]
            seeds = [self.settings.seed * 1_000_003 + begin + first + i for i in range(len(some[0]))]
            parts.append(rank(self.network, self.baselines, some, y[first : first + step], self.settings.method, seeds))
        return torch.cat(parts)

    def _recall(self) -> dict[int, float]:
        if not self.ranks:
            return {}
        return {k: sum(r < k for r in self.ranks) / len(self.ranks) for k in _RECALL_AT}


def _count(verify: Any) -> int:
    if not isinstance(verify, int) or isinstance(verify, bool) or verify < 1:
        raise ValueError(f"localize: verify must be a positive number or 'all', got {verify!r}")
    return verify


def _check(settings: _Settings, x: Tensor, y: Tensor, reference: tuple[Tensor, Tensor] | None, how: str) -> str:
    """Raise unless the arguments are right, and return how units are switched off."""
    for name, rule in (("max_units", 1), ("eot", 1), ("refresh", 0), ("noise", 0)):
        value = getattr(settings, name)
        if not value >= rule:
            raise ValueError(f"localize: {name} must be at least {rule}, got {value}")
    for name, known in (("objective", OBJECTIVES), ("population", POPULATIONS), ("method", METHODS), ("how", HOWS)):
        value = how if name == "how" else getattr(settings, name)
        if value not in known:
            raise ValueError(f"localize: {name} must be one of {', '.join(map(str, known))}, got {value!r}")
    check_examples("localize", x, y)
    if settings.objective == "authors":
        if how == "mean":
            raise ValueError("localize: objective='authors' switches filters off, got how='mean'")
        how, settings.population = "filter", "first_order"
    if settings.method != "search":
        settings.population = None
    if reference is None and (settings.population is not None or how == "mean"):
        raise ValueError("localize: reference must be given for a population or how='mean', got None")
    if reference is not None:
        check_examples("localize: reference", *reference)
    return how
