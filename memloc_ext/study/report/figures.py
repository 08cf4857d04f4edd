"""What the figures of a run share. Each is a matplotlib figure of numbers; none touches global state."""

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
KINDS = {"memorized": "memorized examples", "clean": "clean examples"}

_ACROSS = 3
"""Panels in a row of `accuracy_panels`."""


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


def titled(axes: Axes, title: str = "", *, epochs: bool = False) -> None:
    """Give axes a title, take away the lines that bear no scale, and let the horizontal one be of whole epochs."""
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    if epochs:
        axes.set_xlabel("epoch")
        axes.locator_params(axis="x", integer=True)


def bar_axes(axes: Axes, groups: Sequence[str], xlabel: str) -> None:
    """Make axes of horizontal bars for percentages, a place per group from top to bottom."""
    axes.set_yticks(range(len(groups)), groups)
    axes.invert_yaxis()
    axes.set_xlim(0, 108)
    axes.set_xlabel(xlabel)
    titled(axes)


def legend(figure: Figure, axes: Axes, columns: int = 9, *, right: str = "") -> None:
    """Explain the lines of axes above all panels, or at the right under a title."""
    handles, labels = axes.get_legend_handles_labels()
    if right:
        place: dict[str, Any] = {"loc": "outside right center", "title": right, "title_fontsize": 8}
    else:
        place = {"loc": "outside upper center", "ncols": min(columns, max(len(labels), 1))}
    figure.legend(handles, labels, frameon=False, fontsize=8, **place)


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
        titled(axes, group)
    for axes in panels.flat[len(groups) :]:
        axes.set_axis_off()
    panels[0, 0].set_ylim(-3, 103)
    panels[0, 0].locator_params(axis="x", integer=True)
    for axes in panels.flat[max(len(groups) - _ACROSS, 0) : len(groups)]:
        axes.tick_params(labelbottom=True)
    figure.supxlabel(xlabel, fontsize=10)
    figure.supylabel("accuracy (%)", fontsize=10)
    return figure, dict(zip(groups, panels.flat, strict=False))


def encoded(figure: Figure, file_format: str = "png") -> bytes:
    """Return a figure as the bytes of a file in a format that matplotlib knows."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=file_format, dpi=150)
    return buffer.getvalue()
