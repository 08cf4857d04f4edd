"""What a search for the units that flip examples found, or is still finding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from typing_extensions import Self

from memloc_ext.ablation.edits import AppliedAblation, apply_ablation
from memloc_ext.ablation.weights import AppliedChanges, WeightChange

_RECALL_AT = (1, 8, 32, 128)
FLIPPED, CAPPED, EXHAUSTED, ALREADY_WRONG = "flipped", "capped", "exhausted", "already_wrong"
STATUSES = (FLIPPED, CAPPED, EXHAUSTED, ALREADY_WRONG)


@dataclass(frozen=True)
class Found:
    """What the search found for one example.

    Attributes:
        units: ``(site, unit)`` in the order in which they were switched off or changed; each stays so. A unit is a
            channel or head, or for ``unit="weight"`` an index into the flattened weight of the site's layer.
        status: ``flipped``: with the last unit off the example is no longer right: its label is no longer predicted;
            ``capped``: ``max_units`` are off and it still is; ``exhausted``: no unit is left; ``already_wrong``: it is
            not right in the unchanged network, nothing was searched.
        losses: Loss of the example: of the unchanged network, then after each unit.
        population_losses: Mean loss of the reference examples, likewise: exact for ``population="exact"``,
            the first-order estimate for ``"first_order"``, empty for None.
        predicted: Class with the largest logit, likewise; empty for other tasks than classification.
        changes: What was done to the weights, per unit, for ``unit="weight"`` and ``action="step"``; else empty.
    """

    units: list[tuple[str, int]]
    status: str
    losses: list[float]
    population_losses: list[float]
    predicted: list[int]
    changes: list[WeightChange] = field(default_factory=list)


class Localization(tuple[Found, ...]):
    """The results of `localize`, one `Found` per example, in their order.

    Attributes:
        sites: Site name to its number of units, in the order in which the network computes them.
        channel_dims: Site name to the dimension of its units, for `apply_ablation`.
        baselines: Site name to what its units are replaced by, ``[channels]``.
        modules: Site name to the module whose output they are replaced in: that of the site, or for ``how="filter"``
            the convolution or linear layer that computes it.
        recall: With ``verify="all"``: the share of steps in which the best unit of all was among so many of the
            first-order screen's best; ``{1: ..., 8: ..., 32: ..., 128: ...}``. Else empty.
    """

    sites: dict[str, int]
    channel_dims: dict[str, int]
    baselines: dict[str, Tensor]
    modules: dict[str, str]
    recall: dict[int, float]

    def __new__(cls, found: Iterable[Found], **about: Any) -> Self:
        """Hold what was found; the attributes follow by name."""
        result = super().__new__(cls, found)
        vars(result).update(about)
        return result

    def edited(self, model: nn.Module, example: int) -> AppliedAblation | AppliedChanges:
        """Do to a model what was found for an example, for as long as a ``with`` lasts or in a copy for good.

        ```python
        with found.edited(model, i):
            ...
        edited = found.edited(model, i).copy()
        ```

        Args:
            model: That was searched.
            example: Index of the example.
        """
        found = self[example]
        if found.changes:
            return AppliedChanges(model, found.changes)
        units = [(self.modules[site], unit) for site, unit in found.units]
        baselines = {self.modules[site]: baseline for site, baseline in self.baselines.items()}
        same = {site: dim for site, dim in self.channel_dims.items() if self.modules[site] == site}
        return apply_ablation(model, units, baselines=baselines, channel_dims=same)


def recall(ranks: Sequence[int]) -> dict[int, float]:
    """Return `Localization.recall`.

    Args:
        ranks: Of the chosen units in the screen, from 0; none where not all units were verified.
    """
    return {k: sum(r < k for r in ranks) / len(ranks) for k in _RECALL_AT} if ranks else {}
