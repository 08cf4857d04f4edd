"""`localize`: the few units that flip an example, for many examples at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from memloc_ext.ablation.model_runs import ModelNetwork, check_how
from memloc_ext.ablation.network import Network, Query
from memloc_ext.ablation.recording import UnsupportedError
from memloc_ext.ablation.recording_cache import with_network
from memloc_ext.ablation.signature import given
from memloc_ext.probes.localization.greedy import NetworkSearch
from memloc_ext.probes.localization.result import Localization
from memloc_ext.probes.localization.settings import Settings
from memloc_ext.tasks import Task, TaskName, task_of


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
    memory_budget: int | None = None,
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


@dataclass
class Searches:
    """What calls of `localize` for the same model, checked settings, reference and sites have in common."""

    model: nn.Module
    settings: Settings
    reference: tuple[Any, ...] | None
    sites: Sequence[str] | None = None
    memory_budget: int | None = None
    _search: NetworkSearch | None = field(default=None, init=False)

    def run(self, x: Any, y: Tensor, progress: Callable[[int], object] | None = None) -> Localization:
        """Search in blocks of examples that fit into the memory budget; the arguments are those of `localize`."""
        settings, (tensors, signature) = self.settings, given(x)
        query = Query(settings.task, self.sites, settings.how, self.memory_budget, True, settings.changes_weights)

        def search(network: Network) -> Localization:
            if self._search is None or self._search.network is not network:
                self._search = NetworkSearch(self.model, network, settings, self.reference, tensors)
            return self._search.run(tensors, y, progress or (lambda _: None))

        if self._search is not None and isinstance(self._search.network, ModelNetwork):
            return search(self._search.network)
        try:
            return with_network(self.model, tensors, signature, query, search)
        except UnsupportedError as error:
            if self._search is not None:  # the search raises it: examples meet
                raise
            check_how(settings.how, error)
            message = f"localize: {error}; running the model once per unit and example instead"
            warnings.warn(message, UserWarning, stacklevel=3)
        return search(ModelNetwork(self.model, tensors, signature, query))
