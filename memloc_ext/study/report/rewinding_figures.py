"""The figures of a rewinding: what is left of accuracy with one layer group at an earlier epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from memloc_ext.probes import GroupRewinding, Rewinding
from memloc_ext.study.report.figures import COLORS, accuracy_panels, new_figure, percent, share_percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINES = {"clean": "clean training examples", "memorized": "memorized examples, given label", "test": "test examples"}


def all_figures(rewinding: Rewinding) -> dict[str, Figure]:
    """Draw every figure of a rewinding, by the name of its file."""
    figures = {"rewinding_accuracy": accuracy_per_group(rewinding)}
    if rewinding.unchanged.memorized is not None:
        figures["rewinding_memorized"] = memorized_accuracy(rewinding)
    return figures


def accuracy_per_group(rewinding: Rewinding) -> Figure:
    """Draw accuracy in percent over the epoch that a layer group is put back to, a panel per group.

    Solid: the group's batch-norm statistics are put back too; dotted: they stay. Faint: the model as it is.
    """
    figure, panels = accuracy_panels(list(rewinding.groups), "epoch that the layer group is put back to")
    for group, result in rewinding.groups.items():
        axes = panels[group]
        for column, label in _LINES.items():
            axes.axhline(share_percent(rewinding.unchanged, column), color=COLORS[column], linewidth=0.8, alpha=0.35)
            _line(axes, result, column, label)
    first = next(iter(panels.values()))
    handles, labels = first.get_legend_handles_labels()
    (dotted,) = first.plot([], [], ":", color="#444")
    (faint,) = first.plot([], [], color="#444", linewidth=0.8, alpha=0.35)
    figure.legend(
        [*handles, dotted, faint], [*labels, "batch-norm statistics not put back", "the model as it is"],
        loc="outside upper center", ncols=3, frameon=False, fontsize=8,
    )  # fmt: skip
    return figure


def memorized_accuracy(rewinding: Rewinding) -> Figure:
    """Draw accuracy on memorized examples, given label, in percent: layer group by epoch, with its statistics."""
    groups, epochs = list(rewinding.groups), rewinding.epochs
    figure = new_figure(9, 0.34 * len(groups) + 1.3)
    axes = figure.add_subplot()
    table = np.array(
        [
            [share_percent(found.with_buffers, "memorized") for found in result.epochs]
            for result in rewinding.groups.values()
        ]
    )
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


def _line(axes: Axes, result: GroupRewinding, column: str, label: str) -> None:
    epochs = [found.epoch for found in result.epochs]
    full = [share_percent(found.with_buffers, column) for found in result.epochs]
    axes.plot(epochs, full, color=COLORS[column], label=label, marker=".", markersize=4)
    if result.has_buffers:
        bare = [share_percent(found.without_buffers, column) for found in result.epochs]
        axes.plot(epochs, bare, ":", color=COLORS[column])
