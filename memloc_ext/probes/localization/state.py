"""Where the search of one example is."""

from __future__ import annotations

from dataclasses import dataclass, field

from memloc_ext.ablation.weight_changes import WeightChange
from memloc_ext.probes.localization.result import FLIPPED, Found


@dataclass
class Search:
    """A `Found` that is still being found.

    Attributes:
        losses: See `Found`.
        predicted: See `Found`.
        population: See ``population_losses`` of `Found`.
        units: See `Found`.
        status: See `Found`; empty as long as the search goes on.
    """

    losses: list[float]
    predicted: list[int]
    population: list[float]
    units: list[tuple[str, int]] = field(default_factory=list)
    status: str = ""

    def take(self, unit: tuple[str, int], change: float, loss: float, right: bool, predicted: int | None) -> None:
        """Add a unit, and what the population's loss changes by and the example is worth with it."""
        self.units.append(unit)
        self.losses.append(loss)
        if predicted is not None:
            self.predicted.append(predicted)
        if self.population:
            self.population.append(self.population[-1] + change)
        if not right:
            self.status = FLIPPED

    def done(self, changes: list[WeightChange]) -> Found:
        """Return what was found, with what was done to the weights."""
        return Found(self.units, self.status, self.losses, self.population, self.predicted, changes)
