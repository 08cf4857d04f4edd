"""Where the search of one example is."""

from __future__ import annotations

from dataclasses import dataclass, field

from memloc_ext.ablation.weight_changes import WeightChange
from memloc_ext.probes.localization.result import FLIPPED, Found


@dataclass
class Search:
    """A `Found` that is still being found.

    Attributes:
        label: The prediction that is to be lost.
        losses: See `Found`.
        predicted: See `Found`.
        population: See ``population_losses`` of `Found`.
        units: See `Found`.
        status: See `Found`; empty as long as the search goes on.
    """

    label: int
    losses: list[float]
    predicted: list[int]
    population: list[float]
    units: list[tuple[str, int]] = field(default_factory=list)
    status: str = ""

    def take(self, unit: tuple[str, int], loss: float, predicted: int, change: float) -> None:
        """Add a unit, and what the example's loss and prediction are and the population's loss changes by with it."""
        self.units.append(unit)
        self.losses.append(loss)
        self.predicted.append(predicted)
        if self.population:
            self.population.append(self.population[-1] + change)
        if predicted != self.label:
            self.status = FLIPPED

    def done(self, changes: list[WeightChange]) -> Found:
        """Return what was found, with what was done to the weights."""
        return Found(self.units, self.status, self.losses, self.population, self.predicted, changes)
