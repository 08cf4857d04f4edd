"""The settings of a training, and its learning-rate schedules: the factor on the peak learning rate over the steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

Schedule = Literal["cosine", "triangular"]
Precision = Literal["float32", "bfloat16", "float16"]
WARM_UP = 0.1
"""Share of the steps in which `cosine` rises."""
PEAK = 0.4
"""Share of the steps after which `triangular` is at its peak: epoch 10 of the paper's 25."""
_KINDS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,)}


@dataclass(frozen=True)
class TrainConfig:
    """How to train; the defaults are the paper's for its layer-level probes.

    Attributes:
        epochs: Number of epochs, at least 1.
        batch_size: Batch size, at least 1. With batch norm, a last batch of one example is joined to the one before.
        learning_rate: Peak learning rate, positive.
        momentum: Momentum of SGD, in [0, 1).
        weight_decay: Weight decay of SGD, on every parameter, at least 0.
        schedule: Learning-rate schedule per step, see `cosine` and `triangular`.
        precision: Data type of the forward pass under autocast. Weights stay float32; float16 scales the loss.
        compile: Run the forward pass with torch.compile.
        seed: Seed of the order of examples, standard dropout and, in a study, of all else random, in [0, 2**63).

    Raises:
        ValueError: If a value breaks the above.
        TypeError: If it is not a plain Python number, boolean or string, as the attribute asks.

    Source: Maini et al., "Can Neural Network Memorization Be Localized?", ICML 2023, training for the layer probes.
    """

    epochs: int = 50
    batch_size: int = 512
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Schedule = "cosine"
    precision: Precision = "float32"
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        check_rules(
            self,
            epochs=(self.epochs >= 1, "at least 1"),
            batch_size=(self.batch_size >= 1, "at least 1"),
            learning_rate=(0 < self.learning_rate < math.inf, "positive and finite"),
            momentum=(0 <= self.momentum < 1, "in [0, 1)"),
            weight_decay=(0 <= self.weight_decay < math.inf, "at least 0 and finite"),
            schedule=(self.schedule in get_args(Schedule), f"one of {', '.join(get_args(Schedule))}"),
            precision=(self.precision in get_args(Precision), f"one of {', '.join(get_args(Precision))}"),
            seed=(0 <= self.seed < 2**63, "in [0, 2**63)"),
        )


def check_types(config: Any) -> None:
    """Raise a TypeError unless every setting is the plain Python value, or tuple of such, that its annotation says.

    What is in a tuple must differ, else it is a ValueError.
    """
    for field in fields(config):
        value, kind = getattr(config, field.name), str(field.type)
        name = f"{type(config).__name__}: {field.name} must be"
        if kind.startswith("tuple"):
            inner = int if "int" in kind else str
            if type(value) is not tuple or any(type(item) is not inner for item in value):
                raise TypeError(f"{name} a tuple of {inner.__name__}, got {value!r}")
            if len(set(value)) != len(value):
                raise ValueError(f"{name} different, got {value}")
        elif type(value) not in _KINDS.get(kind, (str,)):  # neither a bool as a number, nor numpy's, which is no JSON
            raise TypeError(f"{name} {_KINDS.get(kind, (str,))[-1].__name__}, got {type(value).__name__}")


def check_rules(config: object, **rules: tuple[bool, str]) -> None:
    """Raise a ValueError for a setting whose rule does not hold: whether it does, and what it must be."""
    for name, (holds, rule) in rules.items():
        if not holds:
            raise ValueError(f"{type(config).__name__}: {name} must be {rule}, got {getattr(config, name)!r}")


def cosine(step: float, total_steps: int) -> float:
    """Rise linearly from 0 to 1 over a tenth of the steps, then fall to 0 along half a cosine.

    Args:
        step: Where in the training, in ``[0, total_steps]``.
        total_steps: Steps of the whole training, at least 1.

    Returns:
        Factor on the peak learning rate, in ``[0, 1]``.

    Raises:
        ValueError: If an argument breaks the above.

    Source: Maini et al., "Can Neural Network Memorization Be Localized?", ICML 2023, training for the layer probes.
    """
    progress = _progress("cosine", step, total_steps)
    if progress < WARM_UP:
        return progress / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))


def triangular(step: float, total_steps: int) -> float:
    """Rise linearly from 0 to 1 over two fifths of the steps, then fall linearly to 0.

    Arguments, result and errors are those of `cosine`.

    Source: Maini et al., "Can Neural Network Memorization Be Localized?", ICML 2023, layer retraining.
    """
    progress = _progress("triangular", step, total_steps)
    return min(progress / PEAK, (1 - progress) / (1 - PEAK))


SCHEDULES = {"cosine": cosine, "triangular": triangular}


def _progress(function: str, step: float, total_steps: int) -> float:
    if total_steps < 1:
        raise ValueError(f"{function}: total_steps must be at least 1, got {total_steps}")
    if not 0 <= step <= total_steps:
        raise ValueError(f"{function}: step must be in [0, {total_steps}], got {step}")
    return step / total_steps
