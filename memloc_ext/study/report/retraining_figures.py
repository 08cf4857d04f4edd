"""The figures of a retraining: what comes back when one layer group is trained on clean examples alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from memloc_ext.probes import Retraining
from memloc_ext.study.report.figures import COLORS, accuracy_panels, new_figure, percent, share_percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LINES = {
    "clean": "clean training examples",
    "memorized": "memorized examples, given label",
    "memorized_true": "memorized examples, true label",
    "test": "test examples",
}
_BARS = {"memorized": "memorized examples, given label", "clean": "clean training examples"}


def all_figures(retraining: Retraining) -> dict[str, Figure]:
    """Draw every figure of a retraining, by the name of its file."""
    return {"retraining_accuracy": accuracy_per_group(retraining), "retraining_regained": regained(retraining)}


def accuracy_per_group(retraining: Retraining) -> Figure:
    """Draw accuracy in percent over the epochs in which a layer group is trained anew, a panel per group."""
    figure, panels = accuracy_panels(list(retraining.groups), "epochs of training the layer group on clean examples")
    for group, result in retraining.groups.items():
        axes = panels[group]
        epochs = [record.epoch for record in result.epochs]
        for column, label in _LINES.items():
            values = [share_percent(record.accuracy, column) for record in result.epochs]
            axes.plot(epochs, values, color=COLORS[column], label=label, marker=".", markersize=4)
        whole = share_percent(retraining.unchanged, "memorized")
        axes.axhline(whole, color=COLORS["memorized"], linewidth=0.8, alpha=0.35, label="memorized, before rewinding")
    first = next(iter(panels.values()))
    handles, labels = first.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure


def regained(retraining: Retraining) -> Figure:
    """Draw accuracy in percent per layer group: back at its initial weights (mark), and after its training (bar)."""
    groups = list(retraining.groups)
    figure = new_figure(9, 0.5 * len(groups) + 1.4)
    axes = figure.add_subplot()
    height = 0.8 / len(_BARS)
    for number, (column, label) in enumerate(_BARS.items()):
        places = np.arange(len(groups)) + (number - 0.5) * height
        results = retraining.groups.values()
        before = [share_percent(result.epochs[0].accuracy, column) for result in results]
        after = [share_percent(result.epochs[-1].accuracy, column) for result in results]
        bars = axes.barh(
            places, np.nan_to_num(after), height * 0.9, color=COLORS[column], label=f"{label}, after training"
        )
        texts = ["-" if np.isnan(value) else percent(value / 100) for value in after]
        axes.bar_label(bars, texts, padding=3, fontsize=8, color="#444", backgroundcolor="white", zorder=1)
        rewound = "back at its initial weights" if number == 0 else None
        axes.plot(before, places, color="black", marker="|", markersize=9, linestyle="none", label=rewound)
        whole = share_percent(retraining.unchanged, column)
        axes.axvline(whole, color=COLORS[column], linestyle=":", linewidth=1)
    axes.set_yticks(range(len(groups)), groups)
    axes.invert_yaxis()
    axes.set_xlim(0, 108)
    axes.set_xlabel("accuracy (%); dotted: the model as it is")
    axes.set_ylabel("layer group")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure
