"""The settings of a localization."""

from __future__ import annotations

from dataclasses import dataclass, fields


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
