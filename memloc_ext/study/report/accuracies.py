"""The accuracies of a run: whether plain training memorizes, and what becomes of it with example-tied dropout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from memloc_ext.study.report import shipped
from memloc_ext.study.report.figures import (
    COLORS,
    COLUMNS,
    KINDS,
    NAMES,
    bar_axes,
    legend,
    new_figure,
    row_name,
    titled,
)
from memloc_ext.study.report.section import Number, Picture, Section, percent
from memloc_ext.study.results import AS_TRAINED, TOKENS
from memloc_ext.study.run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]


def memorization(run: Run) -> Section | None:
    """Return the section on plain training; None without one."""
    if "plain" not in run.histories:
        return None
    curves = accuracy_curves({"plain": run.histories["plain"]})
    return Section(
        name="memorization",
        title="Does it memorize?",
        method="Plain training, without dropout. A network that fits examples with wrong labels, or atypical ones, has "
        "memorized them; what it predicts for the others, it may have learned from all of them.",
        answers=plain_answers(run.metrics, run.mislabelled),
        pictures=[
            Picture("plain_curves", "Accuracy over the epochs", curves, "Accuracy on the labels that were given."),
        ],
    )


def dropout(run: Run) -> Section | None:
    """Return the section on example-tied dropout and its controls; None without any."""
    if set(run.histories) <= {"plain"}:
        return None
    return Section(
        name="dropout",
        title="Can memorization be put where one wants it?",
        method="Example-tied dropout ties some channels to single examples during training, so that memorization "
        "settles there. If it does, switching those channels off takes the memorized labels with it and leaves the "
        "rest. The controls: standard dropout, and one fixed mask for all examples, which is a narrower network.",
        answers=[
            *dropout_answers(run.metrics, run.mislabelled),
            *(shipped.answers(run.shipped) if run.shipped else []),
        ],
        tables=[shipped.table(run.shipped)] if run.shipped else [],
        pictures=[
            Picture(
                "accuracy",
                "Accuracy per model and mode",
                accuracy_bars(run.metrics),
                "Each model and each way to evaluate it. A test example has no mask of its own, hence the dash.",
            ),
            Picture(
                "curves",
                "Accuracy over the epochs",
                accuracy_curves(run.histories),
                "Accuracy after each epoch on the labels that were given; dashed: memorization channels switched off.",
            ),
        ],
    )


def plain_answers(rows: Sequence[Row], mislabelled: bool) -> list[str]:
    """Return whether plain training memorizes examples that are mislabelled, or else atypical."""
    plain = _row(rows, "plain", AS_TRAINED)
    if plain is None or plain["memorized"] is None:
        return []
    sentences = [f"Plain training fits {percent(plain['memorized'])} % of the memorized examples."]
    if mislabelled:
        sentences = [
            f"Plain training gives {percent(plain['memorized'])} % of the memorized examples the wrong label that they "
            f"came with, and {percent(plain['memorized_true'])} % their true one."
        ]
    tokens = [f"{percent(plain[name])} % in {part} examples" for part, name in TOKENS.items() if name in plain]
    return [*sentences, *([f"Of the labelled tokens it predicts {', '.join(tokens)}."] if tokens else [])]


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


def accuracy_bars(rows: Sequence[Row]) -> Figure:
    """Draw the table as bars: a group per model and mode, a bar per kind of example, accuracy in percent."""
    figure = new_figure(9, 0.62 * len(rows) + 1.4)
    axes = figure.add_subplot()
    height = 0.8 / len(COLUMNS)
    for number, (column, label) in enumerate(COLUMNS.items()):
        places = [i + (number - 1.5) * height for i in range(len(rows))]
        values = [100 * (row[column] or 0) for row in rows]
        bars = axes.barh(places, values, height * 0.92, label=label, color=COLORS[column])
        axes.bar_label(bars, [percent(row[column]) for row in rows], padding=3, fontsize=7, color="#444")
    bar_axes(axes, [row_name(row).replace(", ", "\n", 1) for row in rows], "accuracy (%)")
    legend(figure, axes)
    return figure


def accuracy_curves(histories: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Draw accuracy on memorized and on clean training examples over the epochs, one line per model, in percent."""
    figure = new_figure(9, 3.4)
    panels = figure.subplots(1, 2, sharey=True)
    colors = dict(zip(NAMES, ("#777777", "#e45756", "#4c78a8", "#54a24b"), strict=True))
    for axes, (column, title) in zip(panels, KINDS.items(), strict=True):
        for model, history in histories.items():
            epochs = [record["epoch"] for record in history]
            for name, style, ending in ((column, "-", ""), (f"drop_{column}", "--", ", after drop")):
                if not ending or any(name in record for record in history):
                    values = [100 * record.get(name, float("nan")) for record in history]
                    axes.plot(epochs, values, style, color=colors.get(model), label=NAMES.get(model, model) + ending)
        titled(axes, f"{title}, given label", epochs=True)
        axes.set_ylim(-3, 103)
    panels[0].set_ylabel("accuracy (%)")
    legend(figure, panels[0], 5)
    return figure


def _row(rows: Sequence[Row], model: str, mode: str) -> Row | None:
    return next((row for row in rows if (row["model"], row["mode"]) == (model, mode)), None)
