"""Learning-rate schedules: the factor on the peak learning rate, as a function of how much of the training is over."""

from __future__ import annotations

import math

WARM_UP = 0.1
"""Share of the steps in which `cosine` rises."""

PEAK = 0.4
"""Share of the steps after which `triangular` is at its peak: epoch 10 of the paper's 25."""


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
