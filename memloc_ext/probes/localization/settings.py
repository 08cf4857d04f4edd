"""What `localize` was asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from memloc_ext.ablation.network import HOWS
from memloc_ext.ablation.signature import check_examples
from memloc_ext.batches import tensors_of
from memloc_ext.probes.localization.ranking import METHODS
from memloc_ext.tasks import Classification, Task

_CHOICES = (
    ("how", HOWS),
    ("unit", ("channel", "weight")),
    ("action", ("zero", "step")),
    ("objective", ("exact", "first_order", "authors")),
    ("population", ("first_order", "exact", None)),
    ("method", METHODS),
)


@dataclass
class Settings:
    """The arguments of `localize` of the same names, with the same defaults."""

    how: str = "zero"
    unit: str = "channel"
    action: str = "zero"
    step_size: float = 0.1
    max_units: int = 50
    verify: int | str = 32
    objective: str = "exact"
    population: str | None = "first_order"
    refresh: int = 0
    method: str = "search"
    eot: int = 5
    noise: float = 0.01
    seed: int = 0
    task: Task = field(default_factory=Classification)

    @property
    def changes_weights(self) -> bool:
        """Whether weights are changed, and not channels replaced."""
        return self.unit == "weight" or self.action == "step"

    @property
    def is_exhaustive(self) -> bool:
        """Whether every step verifies all units."""
        return self._verifies and self.verify == "all"

    @property
    def _verifies(self) -> bool:
        return self.method == "search" and self.objective == "exact"

    def count(self, left: int) -> int:
        """Return how many of so many units are verified."""
        if not self._verifies:
            return min(left, 1)
        return left if isinstance(self.verify, str) else min(left, self.verify)

    def is_refreshed(self, done: int) -> bool:
        """Return whether the population's first-order effect is measured anew after so many units."""
        return self.objective == "authors" or (self.refresh > 0 and done > 0 and done % self.refresh == 0)

    def check(self, x: Any, y: Tensor, reference: tuple[Any, ...] | None) -> None:
        """Raise unless the arguments are right; settle what some of them say of others."""
        for name in ("max_units", "eot", "refresh", "seed"):
            if not isinstance(getattr(self, name), int):
                raise TypeError(f"localize: {name} must be an integer, got {getattr(self, name)!r}")
        count = isinstance(self.verify, int) and not isinstance(self.verify, bool) and self.verify >= 1
        for name, right, rule in (
            *((name, getattr(self, name) >= 1, "at least 1") for name in ("max_units", "eot")),
            *((name, getattr(self, name) >= 0, "at least 0") for name in ("refresh", "noise")),
            ("step_size", 0 < self.step_size < float("inf"), "positive and finite"),
            ("verify", count or self.verify == "all", "a positive number or 'all'"),
            *((name, getattr(self, name) in known, f"one of {', '.join(map(str, known))}") for name, known in _CHOICES),
        ):
            if not right:
                raise ValueError(f"localize: {name} must be {rule}, got {getattr(self, name)!r}")
        check_examples("localize", self.task, x, y)
        dtypes = [t.dtype for t in tensors_of(x)]
        if self.noise == float("inf") or (self.noise > 0 and not any(dtype.is_floating_point for dtype in dtypes)):
            raise ValueError(
                f"localize: noise must be finite, and 0 unless x is floating, got {self.noise} for "
                f"{', '.join(map(str, dtypes))}"
            )
        if self.changes_weights:
            for name, only in (("method", "search"), ("how", "zero")):
                if getattr(self, name) != only:
                    raise ValueError(
                        f"localize: {name} must be {only!r} for unit='weight' and action='step', "
                        f"got {getattr(self, name)!r}"
                    )
            if self.objective == "authors":
                raise ValueError("localize: objective='authors' zeroes whole filters, not weights, and takes no steps")
            self.how = "filter"
        if self.objective == "authors":
            if self.how == "mean":
                raise ValueError("localize: objective='authors' switches filters off, got how='mean'")
            self.how, self.population = "filter", "first_order"
        if self.method != "search":
            self.population = None
        if reference is None and (self.population is not None or self.how == "mean"):
            raise ValueError("localize: reference must be given for a population or how='mean', got None")
        if reference is not None:
            if len(reference) not in (2, 3):
                raise ValueError(f"localize: reference must be examples and labels, got {len(reference)} tensors")
            check_examples("localize: reference", self.task, *reference[:2])
