"""The greedy search for the few units that flip an example, for many examples at a time."""

from __future__ import annotations

import bisect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memloc_ext.ablation.candidates import Candidates, finite
from memloc_ext.ablation.filters import find_filters
from memloc_ext.ablation.kept import ask
from memloc_ext.ablation.model_runs import ModelNetwork, check_how
from memloc_ext.ablation.network import Network, Question
from memloc_ext.ablation.recording import UnsupportedError
from memloc_ext.ablation.signature import Judged, check_classes, check_output, given
from memloc_ext.ablation.sites import producer
from memloc_ext.ablation.switched import Switched
from memloc_ext.ablation.weights import ChangedWeights
from memloc_ext.probes.localization.effects import Population, Sets, reference_inputs, verify
from memloc_ext.probes.localization.noise import noisy_copies, seeds_of
from memloc_ext.probes.localization.ranking import rank
from memloc_ext.probes.localization.result import ALREADY_WRONG, CAPPED, EXHAUSTED, Found, Localization, recall
from memloc_ext.probes.localization.settings import Settings
from memloc_ext.probes.localization.state import Search
from memloc_ext.tasks import Classification, Task, TaskName, Tokens, logits_of, task_of, wide

_BLOCK = 256  # examples that are searched at a time


def localize(
    model: nn.Module,
    x: Any,
    y: Tensor,
    *,
    task: TaskName | Task = "classification",
    reference: tuple[Any, ...] | None = None,
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
        x: See `ablation_losses`.
        y: The labels that are to be lost: those that the model was trained on; see `ablation_losses`.
        task: See `ablation_losses`. An example flips when it is no longer right.
        reference: Examples and labels that stand for the population, ``(x, y)`` of the forms of the
            two; inside of `example_ids` also
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
        eot: Noisy copies of an example, whose logits, or for other tasks than classification losses, are averaged; at
            least 1.
        noise: Norm of the Gaussian noise over that of the example, for each floating tensor of ``x``; with 0 one copy
            is enough. It must be 0 if none is floating.
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
    settings = Settings(*choices, eot, noise, seed, task_of(task))
    settings.check(x, y, reference)
    return Searches(model, settings, reference, sites, memory_budget).run(x, y, progress)


class Searches:
    """What calls of `localize` for the same model, reference and settings have in common.

    Args:
        model: See `localize`.
        settings: Checked.
        reference: See `localize`.
        sites: See `localize`.
        memory_budget: See `localize`.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        reference: tuple[Any, ...] | None,
        sites: Sequence[str] | None = None,
        memory_budget: int = 1 << 30,
    ) -> None:
        self.model, self.settings, self.reference = model, settings, reference
        self.question = Question(settings.task, sites, settings.how, memory_budget, True, settings.changes_weights)
        self._search: _Search | None = None

    def run(self, x: Any, y: Tensor, progress: Callable[[int], object] | None = None) -> Localization:
        """Search in blocks of examples that fit into the memory budget; the arguments are those of `localize`."""
        tensors, signature = given(x)

        def search(network: Network) -> Localization:
            if self._search is None or self._search.network is not network:
                self._search = _Search(self.model, network, self.settings, self.reference, tensors)
            return self._search.run(tensors, y, progress or _nothing)

        if self._search is not None and isinstance(self._search.network, ModelNetwork):
            return search(self._search.network)
        try:
            return ask(self.model, tensors, signature, self.question, search)
        except UnsupportedError as error:
            if self._search is not None:  # the search raises it: examples meet
                raise
            check_how(self.settings.how, error)
            message = f"localize: {error}; running the model once per unit and example instead"
            warnings.warn(message, UserWarning, stacklevel=3)
        return search(ModelNetwork(self.model, tensors, signature, self.question))


class _Search:
    """A network that is searched.

    Args:
        model: Whose network it is.
        network: Of it.
        settings: Checked.
        reference: See `localize`.
        inputs: Tensors of some examples.
    """

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
        return Localization(found, sites, dims, baselines, modules, recall(self.ranks))

    def _none(self, examples: int) -> Sets:
        """Return the sets of so many examples of which nothing is switched off or changed."""
        if not self.filters:
            return Switched.none(self.network, self.baselines, examples)
        step_size = self.settings.step_size if self.settings.action == "step" else None
        return ChangedWeights.none(self.network, self.filters, step_size, examples)

    def _block(self, inputs: list[Tensor], y: Tensor) -> list[Found]:
        network, settings, task = self.network, self.settings, self.settings.task
        with torch.no_grad():
            outputs = network.graph.examples(inputs, ())
            outputs = [outputs[value] for value in network.graph.recording.outputs]
            judged = check_output(task, network.output(outputs), y)
            network.check_agreement(self.model, inputs, outputs)
            if self.reference is not None and isinstance(task, Classification | Tokens):
                check_classes("localize: reference", task, self.reference[1], outputs[0].shape[-1])
        if self.population is None and self.reference is not None and settings.population is not None:
            self.population = Population(network, self.reference, self._none(1))
        start = [] if self.population is None else [self.population.loss]
        searches = [
            Search([loss], [] if label is None else [label], list(start), status="" if right else ALREADY_WRONG)
            for loss, right, label in zip(*_listed(judged), strict=True)
        ]
        seeds = seeds_of(inputs[: len(inputs) - network.signature.named], settings.seed)
        copies = [noisy_copies(t, settings.eot, settings.noise, seeds) for t in inputs]
        order = None
        if settings.method != "search":
            order = rank(network, self.baselines, inputs, y, settings.method, seeds)
        switched = self._none(len(y))
        self.progress(sum(bool(search.status) for search in searches))
        while active := [i for i, search in enumerate(searches) if not search.status]:
            index = torch.tensor(active, device=y.device)
            self._step([searches[i] for i in active], index, inputs, y, copies, switched, order)
            self.progress(sum(bool(searches[i].status) for i in active))
        return [search.done(switched.changed(i)) for i, search in enumerate(searches)]

    def _step(
        self,
        searches: list[Search],
        index: Tensor,
        inputs: list[Tensor],
        labels: Tensor,
        copies: list[Tensor],
        switched: Sets,
        order: Tensor | None,
    ) -> None:
        """Switch one more unit off for each of some examples of a block.

        Args:
            searches: Of these examples.
            index: Of them in the block.
            inputs: Of the block.
            labels: Of the block.
            copies: Noisy ones of the inputs, ``[block * eot, *]``.
            switched: Units of the block's examples; the chosen ones are added.
            order: Scores of a ranking that is followed, ``[block, units]``.
        """
        settings, own = self.settings, switched.of(index)
        some, y = [t[index] for t in inputs], labels[index]
        units = own.starts[-1]
        count = settings.count(units - len(searches[0].units))  # the searches of a block have come equally far
        if count == 0:
            for search in searches:
                search.status = EXHAUSTED
            return
        if order is None:
            ours = [t.unflatten(0, (-1, settings.eot))[index] for t in copies]
            candidates = self._screen(ours, some, y, own, count, settings.is_refreshed(len(searches[0].units)))
        else:
            assert isinstance(own, Switched)
            candidates = own.best(order[index], None, count)
        judged = verify(self.network, candidates, own, some, y)
        losses = judged.loss
        before = torch.tensor([search.losses[-1] for search in searches], device=y.device, dtype=losses.dtype)
        effects = candidates.effects
        if settings.population == "exact" and self.population is not None:
            so_far = torch.tensor([search.population[-1] for search in searches], device=y.device, dtype=losses.dtype)
            effects = self.population.exact(candidates, own) - so_far[:, None]
        gain = finite(losses - before[:, None] - effects)
        flips = ~judged.right & losses.isfinite()  # logits that are no numbers predict nothing
        best = torch.where(flips.any(1, keepdim=True) & ~flips, -torch.inf, gain).argmax(1, keepdim=True)
        chosen = candidates.pick(best)
        switched.add(index, chosen)
        if settings.is_exhaustive:
            self.ranks += (candidates.scores > chosen.scores).sum(1).tolist()
        changes = effects.gather(1, best)[:, 0].tolist()
        taken = _listed(judged.map(lambda t: t.gather(1, best)[:, 0]))
        for search, unit, change, *worth in zip(searches, chosen.units[:, 0].tolist(), changes, *taken, strict=True):
            site = bisect.bisect_right(own.starts, unit) - 1
            search.take((self.network.sites[site].name, unit - own.starts[site]), change, *worth)
            if not search.status and len(search.units) == units:
                search.status = EXHAUSTED
            elif not search.status and len(search.units) >= settings.max_units:
                search.status = CAPPED

    def _screen(
        self,
        copies: Sequence[Tensor],
        inputs: Sequence[Tensor],
        y: Tensor,
        switched: Sets,
        count: int,
        refreshed: bool,
    ) -> Candidates:
        """Return the best units of each example, to first order.

        Args:
            copies: Noisy ones of the inputs, ``[examples, eot, *]``.
            inputs: Of the examples.
            y: Their labels.
            switched: Their units.
            count: Of units.
            refreshed: Whether the effect on the population is measured anew.
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


def _listed(judged: Judged) -> tuple[Sequence[float], Sequence[bool], Sequence[int | None]]:
    loss, right, predicted = judged
    return loss.tolist(), right.tolist(), [None] * len(loss) if predicted is None else predicted.tolist()


def _nothing(_: int) -> None:
    pass
