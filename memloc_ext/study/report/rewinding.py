"""A rewinding: what is left of accuracy with one layer group at an earlier epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from memloc_ext.probes import Rewinding
from memloc_ext.study.report.figures import COLORS, COLUMNS, accuracy_panels, legend, new_figure, share_percent
from memloc_ext.study.report.section import Number, Picture, Section, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "The paper: most layer groups can be rewound a long way without losing the memorized examples."
HALF, MOST = 0.5, 0.9
"""Shares of the accuracy on memorized examples that count as kept."""


def section(rewinding: Rewinding) -> Section:
    """Return the section on a rewinding."""
    return Section(
        name="rewinding",
        title="Which layers can be turned back?",
        method="The trained network with a single layer group put back to what it was after an earlier epoch. If the "
        "memorized examples are lost, what the group learned since then is needed for them.",
        answers=answers(rewinding),
        pictures=pictures(rewinding),
    )


def answers(rewinding: Rewinding) -> list[str]:
    """Return what becomes of the memorized examples, in sentences; none if there are none that the model fits."""
    if not rewinding.unchanged.memorized or not rewinding.groups:
        return []
    first, last, number, whole = rewinding.epochs[0], rewinding.epochs[-1], len(rewinding.groups), rewinding.unchanged
    half, most = keeping(rewinding, first, HALF), keeping(rewinding, first, MOST)
    names = f" ({', '.join(most)})" if most else ""
    worst = min(rewinding.groups, key=lambda group: _memorized(rewinding, group, first))
    found = rewinding.groups[worst].at(first).with_buffers
    sentences = [
        f"With one layer group put back to {_when(first)}, batch-norm statistics included, {len(half)} of {number} "
        f"groups keep at least half of the accuracy on memorized examples, which is {percent(whole.memorized)} % in "
        f"the model as it is; {len(most)} of {number} keep at least 90 % of it{names}.",
        f"Most is lost with {worst}: accuracy falls from {percent(whole.memorized)} to {percent(found.memorized)} % on "
        f"memorized, from {percent(whole.clean)} to {percent(found.clean)} % on clean examples.",
    ]
    if any(result.has_buffers for result in rewinding.groups.values()):
        most = keeping(rewinding, first, MOST, buffers=False)
        sentences.append(
            f"If the batch-norm statistics stay as they are, {len(most)} of {number} groups can be put back to "
            f"{_when(first)} with at least 90 % of it kept."
        )
    return [*sentences, f"{PAPER} {_verdict(rewinding, first, last)}"]


def numbers(rewinding: Rewinding) -> list[Number]:
    """Return in how many groups the memorized examples survive being put back to the first and to the last epoch."""
    if not rewinding.unchanged.memorized or not rewinding.groups:
        return []
    return [
        Number(
            f"rewinding to {_when(epoch)}: layer groups that keep 90 % of the memorized accuracy",
            len(keeping(rewinding, epoch, MOST)) / len(rewinding.groups),
            "%",
            "most, a long way",
        )
        for epoch in dict.fromkeys((rewinding.epochs[0], rewinding.epochs[-1]))
    ]


def keeping(rewinding: Rewinding, epoch: int, share: float, *, buffers: bool = True) -> list[str]:
    """Name the layer groups that can be put back to an epoch with a share of the memorized accuracy kept.

    Args:
        rewinding: With memorized examples.
        epoch: One of its epochs.
        share: Of the accuracy, given label, of the model as it is, in ``[0, 1]``.
        buffers: Whether batch-norm statistics are put back too.
    """
    least = share * (rewinding.unchanged.memorized or 0.0)
    return [group for group in rewinding.groups if _memorized(rewinding, group, epoch, buffers) >= least]


def _verdict(rewinding: Rewinding, first: int, last: int) -> str:
    number, kept = len(rewinding.groups), {e: len(keeping(rewinding, e, MOST)) for e in rewinding.epochs}
    if 2 * kept[first] > number:
        return f"So it is here, as far back as {_when(first)}."
    if 2 * kept[last] > number:
        failing = max(index for index, epoch in enumerate(rewinding.epochs) if 2 * kept[epoch] <= number)
        return (
            f"Here that holds as far back as epoch {rewinding.epochs[failing + 1]}, for most groups and 90 % of the "
            f"accuracy, but not for {_when(first)}."
        )
    return (
        f"This differs here: even at epoch {last}, the last one tried, only {kept[last]} of {number} groups keep 90 "
        "% of the accuracy on memorized examples."
    )


def _memorized(rewinding: Rewinding, group: str, epoch: int, buffers: bool = True) -> float:
    found = rewinding.groups[group].at(epoch)
    return (found.with_buffers if buffers else found.without_buffers).memorized or 0.0


def _when(epoch: int) -> str:
    return "its initialisation" if epoch == 0 else f"epoch {epoch}"


def pictures(rewinding: Rewinding) -> list[Picture]:
    """Draw every figure of a rewinding."""
    drawn = [
        Picture(
            "rewinding_accuracy",
            "Accuracy per layer group and epoch",
            accuracy_per_group(rewinding),
            "Accuracy with one layer group put back to its weights after an epoch. Solid: its batch-norm statistics "
            "too; dotted: without them. Faint: the model as it is. The paper: most groups can be rewound a long way "
            "without losing the memorized examples.",
        )
    ]
    if rewinding.unchanged.memorized is not None:
        drawn.append(
            Picture(
                "rewinding_memorized",
                "Accuracy on memorized examples",
                memorized_accuracy(rewinding),
                "The same as numbers: accuracy on the memorized examples in percent, statistics put back too.",
            )
        )
    return drawn


def accuracy_per_group(rewinding: Rewinding) -> Figure:
    """Draw accuracy in percent over the epoch that a layer group is put back to, a panel per group.

    Solid: the group's batch-norm statistics are put back too; dotted: they stay. Faint: the model as it is.
    """
    figure, panels = accuracy_panels(list(rewinding.groups), "epoch that the layer group is put back to")
    for group, result in rewinding.groups.items():
        axes, epochs = panels[group], [found.epoch for found in result.epochs]
        for column in ("clean", "memorized", "test"):
            color, whole = COLORS[column], share_percent(rewinding.unchanged, column)
            axes.axhline(whole, color=color, linewidth=0.8, alpha=0.35)
            full = [share_percent(found.with_buffers, column) for found in result.epochs]
            axes.plot(epochs, full, color=color, label=COLUMNS[column], marker=".", markersize=4)
            if result.has_buffers:
                bare = [share_percent(found.without_buffers, column) for found in result.epochs]
                axes.plot(epochs, bare, ":", color=color)
    first = next(iter(panels.values()))
    first.plot([], [], ":", color="#444", label="batch-norm statistics not put back")
    first.plot([], [], color="#444", linewidth=0.8, alpha=0.35, label="the model as it is")
    legend(figure, first, 3)
    return figure


def memorized_accuracy(rewinding: Rewinding) -> Figure:
    """Draw accuracy on memorized examples, given label, in percent: layer group by epoch, with its statistics."""
    groups, epochs = list(rewinding.groups), rewinding.epochs
    figure = new_figure(9, 0.34 * len(groups) + 1.3)
    axes = figure.add_subplot()
    results = rewinding.groups.values()
    table = np.array([[share_percent(cell.with_buffers, "memorized") for cell in one.epochs] for one in results])
    picture = axes.imshow(table, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        text = "-" if np.isnan(value) else percent(value / 100)
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color="black" if value > 60 else "white")
    axes.set_xticks(range(len(epochs)), [str(epoch) for epoch in epochs])
    axes.set_yticks(range(len(groups)), groups)
    axes.set_xlabel("epoch that the layer group is put back to")
    axes.set_ylabel("layer group")
    title = f"memorized examples, given label; the model as it is: {percent(rewinding.unchanged.memorized)} %"
    axes.set_title(title, fontsize=10)
    figure.colorbar(picture, label="accuracy (%)", pad=0.01)
    return figure
