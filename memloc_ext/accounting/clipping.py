"""Sums of clipped gradients: each example's is scaled down to a largest norm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_CLIPPING = ("flat", "per_parameter")


@dataclass(frozen=True)
class Clipping:
    """How examples' own gradients are clipped; see `GradientAccountant.backward`.

    Raises:
        ValueError: If ``max_norm`` is not positive.
        TypeError: If ``max_norm`` is no number.
    """

    max_norm: float
    clipping: str

    def __post_init__(self) -> None:
        if isinstance(self.max_norm, bool) or not isinstance(self.max_norm, int | float):
            raise TypeError(f"GradientAccountant: max_norm must be a number, got {self.max_norm!r}")
        if not self.max_norm > 0:
            raise ValueError(f"GradientAccountant: max_norm must be greater than 0, got {self.max_norm}")

    def factors(self, sqnorm: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return each parameter's factors of the examples' gradients, ``[batch]``, given their squared norms."""
        if self.clipping == "per_parameter":
            bound = self.max_norm / math.sqrt(max(1, len(sqnorm)))
            return {name: _factors(bound, norms) for name, norms in sqnorm.items()}
        if not sqnorm:
            return {}
        first = next(iter(sqnorm.values()))
        total = torch.stack([norms.to(first.device, torch.float64) for norms in sqnorm.values()]).sum(0)
        shared = _factors(self.max_norm, total)
        return {name: shared.to(norms.device) for name, norms in sqnorm.items()}


def _factors(bound: float, sqnorm: Tensor) -> Tensor:
    return (bound / sqnorm.double().sqrt()).clamp(max=1)  # infinite for a norm of 0, and NaN for one


def clipping_of(max_norm: float | None, clipping: str, weight_grads: bool) -> Clipping | None:
    """Return how to clip, checked; None if not at all."""
    if clipping not in _CLIPPING:
        raise ValueError(f"GradientAccountant: clipping must be flat or per_parameter, got {clipping!r}")
    if max_norm is None:
        if clipping != "flat":
            raise ValueError(f"GradientAccountant: clipping={clipping!r} needs max_norm, got None")
        return None
    if not weight_grads:
        raise ValueError("GradientAccountant: max_norm needs weight_grads=True, got False")
    return Clipping(max_norm, clipping)
