"""What a search for the units that flip examples found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

from torch import Tensor

FLIPPED, CAPPED, EXHAUSTED, ALREADY_WRONG = "flipped", "capped", "exhausted", "already_wrong"


@dataclass(frozen=True)
class Found:
    """What the search found for one example.

    Attributes:
        units: ``(site, unit)`` in the order in which they were switched off; each stays off.
        status: ``flipped``: the last unit changed the prediction away from the label; ``capped``: ``max_units`` are
            off and the prediction still is the label; ``exhausted``: no unit is left; ``already_wrong``: the
            unchanged network does not predict the label, nothing was searched.
        losses: Cross-entropy of the example: of the unchanged network, then after each unit.
        population_losses: Mean cross-entropy of the reference examples, likewise: exact for ``population="exact"``,
            the first-order estimate for ``"first_order"``, empty for None.
        predicted: Class with the largest logit, likewise.
    """

    units: list[tuple[str, int]]
    status: str
    losses: list[float]
    population_losses: list[float]
    predicted: list[int]


class Localization(Sequence[Found]):
    """The results of `localize`, one `Found` per example, in their order.

    Attributes:
        sites: Site name to its number of units, in the order in which the network computes them.
        channel_dims: Site name to the dimension of its units, for `apply_ablation`.
        baselines: Site name to what its units are replaced by, ``[units]``; empty for ``how="filter"``.
        recall: With ``verify="all"``: the share of steps in which the best unit of all was among so many of the
            first-order screen's best; ``{1: ..., 8: ..., 32: ..., 128: ...}``. Else empty.
    """

    def __init__(
        self,
        found: Sequence[Found],
        sites: dict[str, int],
        channel_dims: dict[str, int],
        baselines: dict[str, Tensor],
        recall: dict[int, float],
    ) -> None:
        self._found = list(found)
        self.sites, self.channel_dims, self.baselines, self.recall = sites, channel_dims, baselines, recall

    @overload
    def __getitem__(self, index: int) -> Found: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Found]: ...

    def __getitem__(self, index: int | slice) -> Found | Sequence[Found]:
        """Return what was found for an example, or for several."""
        return self._found[index]

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._found)
