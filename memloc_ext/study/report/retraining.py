"""A retraining: what comes back when one layer group is trained on clean examples alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from memloc_ext.probes import Retraining
from memloc_ext.probes.retraining import FITTED
from memloc_ext.study.report.figures import (
    COLORS,
    COLUMNS,
    accuracy_panels,
    bar_axes,
    legend,
    new_figure,
    share_percent,
)
from memloc_ext.study.report.section import Number, Picture, Section, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = (
    "The paper: for most layer groups, accuracy on memorized examples comes back, so that these groups are redundant "
    "for memorization; the others are in general not the last."
)
MOST = 0.9
"""Share of the accuracy on memorized examples that counts as come back."""


def section(retraining: Retraining) -> Section:
    """Return the section on a retraining."""
    return Section(
        name="retraining",
        title="Which layers does memorization need?",
        method="A single layer group is put back to its initial weights and trained again, alone, on the clean "
        "examples only; everything else stays as it is. If the memorized labels come back, though none "
        "of them was seen, the rest of the network holds them.",
        answers=answers(retraining),
        pictures=pictures(retraining),
    )


def answers(retraining: Retraining) -> list[str]:
    """Return what comes back of the memorized examples, in sentences; none if there are none that the model fits."""
    whole, number = retraining.unchanged.memorized, len(retraining.groups)
    if not whole or not number:
        return []
    back = regaining(retraining)
    names = f" ({', '.join(back)})" if back else ""
    never = len([group for group in back if _memorized(retraining, group, 0) >= MOST * whole])
    kept = f"; {never} of these had not lost it at their initial weights" if never else ""
    least = min(retraining.groups, key=lambda group: _memorized(retraining, group))
    first, last = (retraining.groups[least].epochs[i].accuracy for i in (0, -1))
    fitted = sum(result.stopped == FITTED for result in retraining.groups.values())
    epochs = [len(result.epochs) - 1 for result in retraining.groups.values()]
    others = "" if fitted == number else ", the others after all their epochs"
    if len(back) == number:
        verdict = "So it is here, for every group."
    else:
        agrees = (
            "So it is here" if 2 * len(back) > number else f"This differs here: it does for {len(back)} of {number}"
        )
        place = "none of those" if list(retraining.groups)[-1] in back else "among those"
        verdict = f"{agrees}; the last group is {place} for which it does not."
    return [
        "With one layer group at its initial weights and trained anew, alone and on clean examples only, at least 90 % "
        f"of the accuracy on memorized examples ({percent(whole)} % before) is there again for {len(back)} of {number} "
        f"groups{names}, though no memorized example was seen{kept}.",
        f"Least is there with {least}: {percent(last.memorized)} % on memorized examples "
        f"({percent(first.memorized)} % before its training), {percent(last.clean)} % on clean ones.",
        f"{fitted} of {number} trainings ended because every clean example was fitted{others}; they took "
        f"{min(epochs)} to {max(epochs)} epochs.",
        f"{PAPER} {verdict}",
    ]


def numbers(retraining: Retraining) -> list[Number]:
    """Return in how many groups the memorized examples come back."""
    if not retraining.unchanged.memorized or not retraining.groups:
        return []
    share = len(regaining(retraining)) / len(retraining.groups)
    return [Number("retraining: layer groups that end with 90 % of the memorized accuracy", share, "%", "most")]


def regaining(retraining: Retraining) -> list[str]:
    """Name the layer groups after whose training at least 90 % of the memorized accuracy is there."""
    enough = MOST * (retraining.unchanged.memorized or 0.0)
    return [group for group in retraining.groups if _memorized(retraining, group) >= enough]


def _memorized(retraining: Retraining, group: str, epoch: int = -1) -> float:
    return retraining.groups[group].epochs[epoch].accuracy.memorized or 0.0


def pictures(retraining: Retraining) -> list[Picture]:
    """Draw every figure of a retraining."""
    return [
        Picture(
            "retraining_accuracy",
            "Accuracy per layer group and epoch",
            accuracy_per_group(retraining),
            "Accuracy while one layer group is trained again; epoch 0: at its initial weights. The paper: for most "
            "groups memorized accuracy comes back.",
        ),
        Picture(
            "retraining_regained",
            "Accuracy before and after",
            regained(retraining),
            "Accuracy with the group at its initial weights, and after its training.",
        ),
    ]


def accuracy_per_group(retraining: Retraining) -> Figure:
    """Draw accuracy in percent over the epochs in which a layer group is trained anew, a panel per group."""
    figure, panels = accuracy_panels(list(retraining.groups), "epochs of training the layer group on clean examples")
    for group, result in retraining.groups.items():
        axes = panels[group]
        epochs = [record.epoch for record in result.epochs]
        for column, label in COLUMNS.items():
            values = [share_percent(record.accuracy, column) for record in result.epochs]
            axes.plot(epochs, values, color=COLORS[column], label=label, marker=".", markersize=4)
        whole = share_percent(retraining.unchanged, "memorized")
        axes.axhline(whole, color=COLORS["memorized"], linewidth=0.8, alpha=0.35, label="memorized, before rewinding")
    legend(figure, next(iter(panels.values())), 3)
    return figure


def regained(retraining: Retraining) -> Figure:
    """Draw accuracy in percent per layer group: back at its initial weights (mark), and after its training (bar)."""
    groups, results = list(retraining.groups), retraining.groups.values()
    figure = new_figure(9, 0.5 * len(groups) + 1.4)
    axes = figure.add_subplot()
    for number, column in enumerate(("memorized", "clean")):
        places, color = np.arange(len(groups)) + (number - 0.5) * 0.4, COLORS[column]
        before = [share_percent(result.epochs[0].accuracy, column) for result in results]
        after = [share_percent(result.epochs[-1].accuracy, column) for result in results]
        bars = axes.barh(places, np.nan_to_num(after), 0.36, color=color, label=f"{COLUMNS[column]}, after training")
        texts = ["-" if np.isnan(value) else percent(value / 100) for value in after]
        axes.bar_label(bars, texts, padding=3, fontsize=8, color="#444", backgroundcolor="white", zorder=1)
        rewound = "back at its initial weights" if number == 0 else None
        axes.plot(before, places, color="black", marker="|", markersize=9, linestyle="none", label=rewound)
        axes.axvline(share_percent(retraining.unchanged, column), color=color, linestyle=":", linewidth=1)
    bar_axes(axes, groups, "accuracy (%); dotted: the model as it is")
    axes.set_ylabel("layer group")
    legend(figure, axes, 3)
    return figure
