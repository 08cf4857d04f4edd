"""The settings of the probes in a study."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class RewindConfig:
    """Which layer groups are rewound, and how far.

    Attributes:
        rewind_epochs: Epochs whose weights the groups get back, each at least 0; none for the paper's, see `rewind`.
        rewind_groups: Names of layer groups; none for all of the model's.

    Raises:
        ValueError: If an epoch is negative, or anything is there twice.
        TypeError: If a value is no tuple of such.
    """

    rewind_epochs: tuple[int, ...] = ()
    rewind_groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, kind in (("rewind_epochs", int), ("rewind_groups", str)):
            values = getattr(self, name)
            if type(values) is not tuple or any(type(value) is not kind for value in values):
                raise TypeError(f"RewindConfig: {name} must be a tuple of {kind.__name__}, got {values!r}")
            if len(set(values)) != len(values):
                raise ValueError(f"RewindConfig: {name} must be different, got {values}")
        if any(epoch < 0 for epoch in self.rewind_epochs):
            raise ValueError(f"RewindConfig: rewind_epochs must be at least 0, got {self.rewind_epochs}")


@dataclass(frozen=True)
class RetrainConfig:
    """Which layer groups are trained anew, and how; the defaults are the paper's but for the batch size.

    The schedule is triangular; momentum and weight decay are those of `memloc_ext.training.TrainConfig`.

    Attributes:
        retrain_epochs: Largest number of passes over the clean examples, at least 1.
        retrain_learning_rate: Peak of the schedule, positive.
        retrain_batch_size: Examples in a batch, at least 1.
        patience: Epochs in a row with every clean example fitted after which the training stops, at least 1.
        retrain_groups: Names of layer groups; none for all of the model's.

    Raises:
        ValueError: If a value breaks the above.
        TypeError: If it is not a plain Python number, or tuple of names, as the attribute asks.

    Source: Maini et al., "Can Neural Network Memorization Be Localized?", ICML 2023, section on layer retraining.
    """

    retrain_epochs: int = 20
    retrain_learning_rate: float = 0.01
    retrain_batch_size: int = 64
    patience: int = 3
    retrain_groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("retrain_epochs", "retrain_batch_size", "patience"):
            value = getattr(self, name)
            if type(value) is not int:
                raise TypeError(f"RetrainConfig: {name} must be int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"RetrainConfig: {name} must be at least 1, got {value}")
        rate, groups = self.retrain_learning_rate, self.retrain_groups
        if type(rate) not in (int, float):
            raise TypeError(f"RetrainConfig: retrain_learning_rate must be float, got {type(rate).__name__}")
        if not 0 < rate < math.inf:
            raise ValueError(f"RetrainConfig: retrain_learning_rate must be positive and finite, got {rate}")
        if type(groups) is not tuple or any(type(group) is not str for group in groups):
            raise TypeError(f"RetrainConfig: retrain_groups must be a tuple of str, got {groups!r}")
        if len(set(groups)) != len(groups):
            raise ValueError(f"RetrainConfig: retrain_groups must be different, got {groups}")

    def as_arguments(self) -> dict[str, Any]:
        """Return the same as arguments of `memloc_ext.retrain`."""
        return {
            "groups": self.retrain_groups or None,
            "epochs": self.retrain_epochs,
            "learning_rate": self.retrain_learning_rate,
            "train_batch_size": self.retrain_batch_size,
            "patience": self.patience,
        }


@dataclass(frozen=True)
class LocalizationConfig:
    """How many examples are localized, and how far.

    Attributes:
        localized: Training examples whose units are searched for, at least 1: so many memorized and so many clean ones.
        max_units: Largest number of units that are switched off for an example, at least 1.
        edited: Of these examples, how many of each kind have accuracy measured after each of their units, at least 0.

    Raises:
        ValueError: If a value breaks the above.
        TypeError: If it is not an int.
    """

    localized: int = 100
    max_units: int = 50
    edited: int = 20

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "edited" else 1
            if type(value) is not int:
                raise TypeError(f"LocalizationConfig: {field.name} must be int, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"LocalizationConfig: {field.name} must be at least {least}, got {value}")
