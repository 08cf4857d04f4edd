"""The figures of a run. Each function takes numbers and returns a matplotlib figure; none touches global state."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from memloc_ext.probes import Accuracy

NAMES: dict[str, str] = {
    "plain": "plain training",
    "example_tied": "example-tied dropout",
    "standard": "standard dropout",
    "fixed": "fixed mask",
}
MODES = {
    "train": "own mask",
    "test": "test (memorization x p_mem)",
    "drop": "drop (memorization off)",
    "drop_gen": "drop_gen (generalization off)",
}
COLUMNS = {
    "clean": "clean training examples",
    "memorized": "memorized examples, given label",
    "memorized_true": "memorized examples, true label",
    "test": "test examples",
}
COLORS = {"clean": "#4c78a8", "memorized": "#e45756", "memorized_true": "#f2a541", "test": "#54a24b"}

_ACROSS = 3
"""Panels in a row of `accuracy_panels`."""


def percent(value: float | None) -> str:
    """Return a share as a percentage, or a dash where there is none."""
    return "-" if value is None else f"{100 * value:.1f}"


def row_name(row: Mapping[str, Any]) -> str:
    """Name a row of the table for a reader."""
    name = str(NAMES.get(row["model"], row["model"]))
    mode = MODES.get(row["mode"])
    return f"{name}, {mode}" if mode else name


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of that size in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib; run: pip install 'memloc_ext[study]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def epoch_axis(axes: Axes) -> None:
    """Name the horizontal axis, whose values are whole epochs, and take away the lines that bear no scale."""
    axes.set_xlabel("epoch")
    axes.locator_params(axis="x", integer=True)
    axes.spines[["top", "right"]].set_visible(False)


def share_percent(accuracy: Accuracy, column: str) -> float:
    """Return a share of an accuracy in percent, NaN where there is none."""
    share = getattr(accuracy, column)
    return float("nan") if share is None else 100 * share


def accuracy_panels(groups: Sequence[str], xlabel: str) -> tuple[Figure, dict[str, Axes]]:
    """Return a figure with a panel per layer group, for accuracy in percent over epochs, in order of the groups."""
    down = math.ceil(len(groups) / _ACROSS)
    figure = new_figure(9, 1.7 * down + 0.9)
    panels = figure.subplots(down, _ACROSS, squeeze=False, sharex=True, sharey=True)
    for axes, group in zip(panels.flat, groups, strict=False):
        axes.set_title(group, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels.flat[len(groups) :]:
        axes.set_axis_off()
    panels[0, 0].set_ylim(-3, 103)
    panels[0, 0].locator_params(axis="x", integer=True)
    for axes in panels.flat[max(len(groups) - _ACROSS, 0) : len(groups)]:
        axes.tick_params(labelbottom=True)
    figure.supxlabel(xlabel, fontsize=10)
    figure.supylabel("accuracy (%)", fontsize=10)
    return figure, dict(zip(groups, panels.flat, strict=False))


def accuracy_bars(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the table as bars: a group per model and mode, a bar per kind of example, accuracy in percent."""
    figure = new_figure(9, 0.62 * len(rows) + 1.4)
    axes = figure.add_subplot()
    height = 0.8 / len(COLUMNS)
    for number, (column, label) in enumerate(COLUMNS.items()):
        places = [i + (number - 1.5) * height for i in range(len(rows))]
        values = [100 * (row[column] or 0) for row in rows]
        bars = axes.barh(places, values, height * 0.92, label=label, color=COLORS[column])
        axes.bar_label(bars, [percent(row[column]) for row in rows], padding=3, fontsize=7, color="#444")
    axes.set_yticks(range(len(rows)), [row_name(row).replace(", ", "\n", 1) for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 108)
    axes.set_xlabel("accuracy (%)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    return figure


def accuracy_curves(histories: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Draw accuracy on memorized and on clean training examples over the epochs, one line per model, in percent."""
    figure = new_figure(9, 3.4)
    panels = figure.subplots(1, 2, sharey=True)
    colors = dict(zip(NAMES, ("#777777", "#e45756", "#4c78a8", "#54a24b"), strict=True))
    for axes, column, title in zip(
        panels, ("memorized", "clean"), ("memorized examples", "clean examples"), strict=True
    ):
        for model, history in histories.items():
            name, color = NAMES.get(model, model), colors.get(model)
            epochs = [record["epoch"] for record in history]
            axes.plot(epochs, [100 * record.get(column, float("nan")) for record in history], color=color, label=name)
            dropped = f"drop_{column}"
            if any(dropped in record for record in history):
                values = [100 * record.get(dropped, float("nan")) for record in history]
                axes.plot(epochs, values, "--", color=color, label=f"{name}, after drop")
        epoch_axis(axes)
        axes.set_title(f"{title}, given label", fontsize=10)
        axes.set_ylim(-3, 103)
    panels[0].set_ylabel("accuracy (%)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(5, len(labels)), frameon=False, fontsize=8)
    return figure


def encoded(figure: Figure, file_format: str = "png") -> bytes:
    """Return a figure as the bytes of a file in a format that matplotlib knows."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=file_format, dpi=150)
    return buffer.getvalue()
