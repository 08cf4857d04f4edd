"""The greedy search for the few units that flip an example, for many examples at a time."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memloc_ext.ablation.by_model import searchable
from memloc_ext.ablation.candidates import Candidates, finite
from memloc_ext.ablation.filters import find_filters
from memloc_ext.ablation.losses import check_classes, check_logits, judge, wide
from memloc_ext.ablation.network import given
from memloc_ext.ablation.sites import producer
from memloc_ext.ablation.switched import Switched
from memloc_ext.ablation.weights import ChangedWeights
from memloc_ext.probes.localization.effects import Population, Sets, reference_inputs, verify
from memloc_ext.probes.localization.noise import noisy_copies, seeds_of
from memloc_ext.probes.localization.ranking import rank
from memloc_ext.probes.localization.result import ALREADY_WRONG, CAPPED, EXHAUSTED, Found, Localization, recall
from memloc_ext.probes.localization.settings import Settings
from memloc_ext.probes.localization.state import Search

_BLOCK = 256  # examples that are searched at a time


def localize(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    reference: tuple[Tensor, ...] | None = None,
    sites: Sequence[str] | None = None,
    how: str = "zero",
    unit: str = "channel",
    action: str = "zero",
    step_size: float = 0.1,
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
    r"""Find the few units that must be switched off, or changed, until each example is not predicted as its label.

    Per step and example: one forward and backward pass over ``eot`` noisy copies gives, to first order, what switching
    off each unit does to the example's loss; less what it does to the population's, this ranks all units. The
    ``verify`` best are then switched off exactly, one at a time, in the example itself: if some flip the prediction,
    the best of these is chosen, else the one that raises the example's loss most over the population's. Chosen units
    stay off. The search ends with a flip, after ``max_units``, or when no unit is left.

    The model runs in evaluation mode and is left as it was. Examples do not depend on each other: the results are
    those of one example at a time. A model that cannot be recorded, because it has recurrent layers or reads
    activations into Python, takes a forward pass per verified unit and example, with a warning.

    Args:
        model: Returns logits as for `ablation_losses`. Examples must not meet in evaluation mode.
        x: ``[batch, *]``, on the model's device.
        y: The labels that are to be lost, ``[batch]``, int64: those that the model was trained on.
        reference: Examples and labels that stand for the population, ``([*, *], [*])``; inside of `example_ids` also
            their ids, ``[*]``. None only where nothing needs them: ``population=None`` and ``how`` other than ``mean``.
        sites: See `ablation_losses`.
        how: See `ablation_losses`; the mean is that over ``reference``.
        unit: ``channel``, or ``weight``: the single weights of the convolution or linear layer that alone computes a
            site, numbered as in its flattened weight.
        action: What is done to a unit. ``zero``: it is switched off. ``step``: its weights, the whole filter of a
            channel or the one weight, take one gradient step that raises the example's loss and lowers the
            population's, with the example's gradient at that moment and the population's from the reference; first
            units are then those with the largest squared norm of that gradient. A unit takes one step at most.
        step_size: Of that step: the weights change by so much times the gradient of the example's loss less that of
            the population's mean loss.
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
        noise: Norm of the Gaussian noise over that of the example; with 0 one copy is enough. It is 0 for an ``x``
            that is not floating.
        seed: Of the noise and of ``random``, together with the example itself; the global generators are not touched.
        memory_budget: See `ablation_losses`.
        progress: Called with the number of examples whose search has ended.

    Returns:
        A `Found` per example.

    Raises:
        TypeError: If a label is not int64, or a count or the seed no integer.
        ValueError: If an argument breaks the above, or the unchanged network's logits are not finite.
        UnsupportedError: If the model's examples meet.

    Source: Maini et al., "Can Neural Network Memorization Be Localized?", ICML 2023: the neurons that flip an example.
    """
    choices = (how, unit, action, step_size, max_units, verify, objective, population, refresh, method)
    settings = Settings(*choices, eot, noise, seed)
    settings.check(x, y, reference)
    return Searches(model, x, settings, reference, sites, memory_budget).run(x, y, progress)


class Searches:
    """What calls of `localize` for the same model, reference and settings have in common, done once.

    Args:
        model: See `localize`.
        x: Some examples; the first is recorded, inside of `example_ids` with its id. Which one it is changes no result.
        settings: Checked.
        reference: See `localize`.
        sites: See `localize`.
        memory_budget: See `localize`.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        settings: Settings,
        reference: tuple[Tensor, ...] | None,
        sites: Sequence[str] | None = None,
        memory_budget: int = 1 << 30,
    ) -> None:
        network = searchable(model, x, sites, settings.how, memory_budget, settings.changes_weights)
        self.model, self.network, self.settings, self.progress = model, network, settings, _nothing
        self.inputs, self.y = given(x), torch.empty(0)
        self.baselines = network.baselines(self.inputs if reference is None else reference_inputs(network, reference))
        self.filters = []
        if settings.changes_weights:
            self.filters = find_filters(model, network.graph, network.sites, settings.unit == "weight")
        self.ranks: list[int] = []
        self.reference, self.population = reference, None

    def run(self, x: Tensor, y: Tensor, progress: Callable[[int], object] | None = None) -> Localization:
        """Search in blocks of examples that fit into the memory budget; the arguments are those of `localize`."""
        self.inputs, self.y, self.ranks, self.progress = given(x), y, [], progress or _nothing
        network, found = self.network, []
        units = self._none(1).starts[-1]
        held = self._none(1).bytes_per_example(min(units, self.settings.max_units) + self.settings.count(units))
        block = max(1, min(network.examples_at_once, _BLOCK, network.share // max(1, held)))
        for begin in range(0, len(self.y), block):
            found += self._block(begin, min(len(self.y), begin + block))
        names, starts = [site.name for site in network.sites], self._none(1).starts
        sites = {name: starts[i + 1] - starts[i] for i, name in enumerate(names)}
        dims = {site.name: site.dim for site in network.sites}
        baselines = dict(zip(names, self.baselines, strict=True))
        modules = {site.name: site.name for site in network.sites}
        if network.how == "filter":
            modules = {site.name: producer(network.graph.recording, site).module for site in network.sites}
        return Localization(found, sites, dims, baselines, modules, recall(self.ranks))

    def _none(self, examples: int) -> Sets:
        """Return the sets of so many examples of which nothing is switched off or changed."""
        if not self.filters:
            return Switched.none(self.network, self.baselines, examples)
        step_size = self.settings.step_size if self.settings.action == "step" else None
        return ChangedWeights.none(self.network, self.filters, step_size, examples)

    def _block(self, begin: int, end: int) -> list[Found]:
        inputs, y = [t[begin:end] for t in self.inputs], self.y[begin:end]
        with torch.no_grad():
            logits = check_logits(self.network.graph.examples(inputs, ())[self.network.output][:, 0], y)
            self.network.check_agreement(self.model, inputs, logits)
            if self.reference is not None:
                check_classes("localize: reference", self.reference[1], logits)
        if self.population is None and self.reference is not None and self.settings.population is not None:
            self.population = Population(self.network, self.reference, self._none(1))
        losses, predicted = judge(logits, y)
        start = [] if self.population is None else [self.population.loss]
        searches = [
            Search(*values, list(start))
            for values in zip(
                y.tolist(), ([v] for v in losses.tolist()), ([v] for v in predicted.tolist()), strict=True
            )
        ]
        for search in searches:
            search.status = "" if search.predicted[0] == search.label else ALREADY_WRONG
        settings, seeds = self.settings, seeds_of(inputs[0], self.settings.seed)
        copies = noisy_copies(inputs[0], settings.eot, settings.noise, seeds)
        order = None
        if settings.method != "search":
            order = rank(self.network, self.baselines, inputs, y, settings.method, seeds)
        switched = self._none(end - begin)
        self.progress(sum(bool(search.status) for search in searches))
        while active := [i for i, search in enumerate(searches) if not search.status]:
            index = torch.tensor(active, device=y.device)
            self._step([searches[i] for i in active], index, inputs, copies, switched, order)
            self.progress(sum(bool(searches[i].status) for i in active))
        return [search.done(switched.changed(i)) for i, search in enumerate(searches)]

    def _step(
        self,
        searches: list[Search],
        index: Tensor,
        inputs: list[Tensor],
        copies: Tensor,
        switched: Sets,
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
        units = own.starts[-1]
        count = settings.count(units - len(searches[0].units))  # the searches of a block have come equally far
        if count == 0:
            for search in searches:
                search.status = EXHAUSTED
            return
        if order is None:
            candidates = self._screen(copies, index, y, own, some, count, settings.is_refreshed(len(searches[0].units)))
        else:
            assert isinstance(own, Switched)
            candidates = own.best(order[index], None, count)
        losses, predicted = verify(self.network, candidates, own, some, y)
        before = torch.tensor([search.losses[-1] for search in searches], device=y.device, dtype=losses.dtype)
        effects = candidates.effects
        if settings.population == "exact" and self.population is not None:
            so_far = torch.tensor([search.population[-1] for search in searches], device=y.device, dtype=losses.dtype)
            effects = self.population.exact(candidates, own) - so_far[:, None]
        gain = finite(losses - before[:, None] - effects)
        flips = (predicted != y[:, None]) & losses.isfinite()  # logits that are no numbers predict nothing
        best = torch.where(flips.any(1, keepdim=True) & ~flips, -torch.inf, gain).argmax(1, keepdim=True)
        chosen = candidates.pick(best)
        switched.add(index, chosen)
        if settings.is_exhaustive:
            self.ranks += (candidates.scores > chosen.scores).sum(1).tolist()
        columns = (chosen.units, *(t.gather(1, best) for t in (losses, predicted, effects)))
        for search, (unit, loss, label, change) in zip(
            searches, zip(*(c[:, 0].tolist() for c in columns), strict=True), strict=True
        ):
            site = bisect.bisect_right(own.starts, unit) - 1
            search.take((self.network.sites[site].name, unit - own.starts[site]), loss, label, change)
            if not search.status and len(search.units) == units:
                search.status = EXHAUSTED
            elif not search.status and len(search.units) >= settings.max_units:
                search.status = CAPPED

    def _screen(
        self,
        copies: Tensor,
        index: Tensor,
        y: Tensor,
        switched: Sets,
        inputs: list[Tensor],
        count: int,
        refreshed: bool,
    ) -> Candidates:
        """Return the best units of each example, to first order."""
        eot, found = self.settings.eot, []
        copies = copies.unflatten(0, (-1, eot))[index]
        step = 1 if refreshed else max(1, self.network.gradients_at_once // eot)
        for begin in range(0, len(index), step):
            part = slice(begin, begin + step)
            rows = torch.arange(len(index), device=index.device)[part].repeat_interleave(eot)
            labels, effect = y[part], None if self.population is None else self.population.effect
            if self.population is not None and refreshed:
                leave_out = self.settings.objective == "authors"  # the example itself is no part of its population
                without = (inputs[0][begin], y[begin]) if leave_out else None
                effect = self.population.refreshed(switched.of(index.new_tensor([begin])), without)

            def loss(logits: Tensor, labels: Tensor = labels) -> Tensor:
                mean = wide(logits).unflatten(0, (-1, eot)).mean(1)
                return F.cross_entropy(mean, labels, reduction="sum")

            given = [copies[part].flatten(0, 1), *(t[rows] for t in inputs[1:])]
            found.append(switched.of(rows).screen(given, loss, eot, effect, count))
        return Candidates.cat(found)


def _nothing(_: int) -> None:
    pass
