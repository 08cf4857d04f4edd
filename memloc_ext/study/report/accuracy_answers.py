"""What the accuracies of a run say, in sentences with their numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from memloc_ext.study.report.figures import percent
from memloc_ext.study.report.section import Number
from memloc_ext.study.results import AS_TRAINED

Row = Mapping[str, Any]


def plain_answers(rows: Sequence[Row], mislabelled: bool) -> list[str]:
    """Return whether plain training memorizes examples that are mislabelled, or else atypical."""
    plain = _row(rows, "plain", AS_TRAINED)
    if plain is None or plain["memorized"] is None:
        return []
    if not mislabelled:
        return [f"Plain training fits {percent(plain['memorized'])} % of the memorized examples."]
    return [
        f"Plain training gives {percent(plain['memorized'])} % of the memorized examples the wrong label that they "
        f"came with, and {percent(plain['memorized_true'])} % their true one."
    ]


def plain_numbers(rows: Sequence[Row]) -> list[Number]:
    """Return how well plain training fits and generalizes."""
    plain = _row(rows, "plain", AS_TRAINED)
    if plain is None:
        return []
    return [
        Number("plain training: memorized examples given their label", plain["memorized"]),
        Number("plain training: test accuracy", plain["test"], "%", "79.3 % (CIFAR-10)"),
    ]


def dropout_answers(rows: Sequence[Row], mislabelled: bool) -> list[str]:
    """Return what switching the memorization channels off does to examples that are mislabelled, or else atypical."""
    own, drop = _row(rows, "example_tied", "train"), _row(rows, "example_tied", "drop")
    plain = _row(rows, "plain", AS_TRAINED)
    if own is None or drop is None or own["memorized"] is None:
        return []
    back = f"{percent(drop['memorized_true'])} % of the memorized examples get their true label, and "
    return [
        "Switching the memorization channels off takes accuracy on the memorized examples from "
        f"{percent(own['memorized'])} % to {percent(drop['memorized'])} %, and on clean training examples from "
        f"{percent(own['clean'])} % to {percent(drop['clean'])} %.",
        "Without those channels, "
        + (back if mislabelled else "")
        + f"{percent(drop['test'])} % of the test examples are right"
        + (f" ({percent(plain['test'])} % after plain training)." if plain else "."),
    ]


def dropout_numbers(rows: Sequence[Row], mislabelled: bool) -> list[Number]:
    """Return the numbers of these sentences."""
    own, drop = _row(rows, "example_tied", "train"), _row(rows, "example_tied", "drop")
    if own is None or drop is None:
        return []
    name = "example-tied dropout"
    returned = Number(f"{name}: memorized examples given their true label, dropped", drop["memorized_true"])
    return [
        Number(f"{name}: memorized examples, own mask", own["memorized"], "%", "100 % (MNIST), 99 % (CIFAR-10)"),
        Number(f"{name}: memorized examples, dropped", drop["memorized"], "%", "0.1 % (MNIST), 3 % (CIFAR-10)"),
        Number(f"{name}: clean training examples, own mask", own["clean"], "%", "99.9 % (CIFAR-10)"),
        Number(f"{name}: clean training examples, dropped", drop["clean"], "%", "90.8 % (CIFAR-10)"),
        *([returned] if mislabelled else []),
        Number(f"{name}: test accuracy, dropped", drop["test"], "%", "82.7 % (CIFAR-10)"),
    ]


def _row(rows: Sequence[Row], model: str, mode: str) -> Row | None:
    return next((row for row in rows if (row["model"], row["mode"]) == (model, mode)), None)
