"""The figures of a gradient accounting: whose gradient is large, where, when, and whether it tells who is memorized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from memloc_ext.study.accounting import Accounting
from memloc_ext.study.report.figures import COLORS, epoch_axis, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLEAN, MEMORIZED = "clean examples", "memorized examples"
_KINDS = {CLEAN: COLORS["clean"], MEMORIZED: COLORS["memorized"]}
_GROUP_NORM = "norm of the gradient, $\\|g\\|\\,/\\,\\sqrt{\\mathrm{numel}}$,\nsum over the parameters"
_EXAMPLE_NORM = "norm of an example's gradient"
_HISTOGRAMS = 4
_BINS = 40


def all_figures(accounting: Accounting) -> dict[str, Figure]:
    """Draw every figure of an accounting, by the name of its file; reads the file of each epoch once."""
    norms: dict[int, dict[str, np.ndarray]] = {}
    for epoch in accounting.epochs:
        account = accounting.epoch(epoch)
        kinds = {CLEAN: ~account.memorized, MEMORIZED: account.memorized}
        counted = account.total_norms.isfinite()
        norms[epoch] = {kind: account.total_norms[rows & counted].numpy() for kind, rows in kinds.items()}
    return {
        "gradient_norms": group_norms(accounting),
        "gradient_cosine": cosines(accounting),
        "example_norms": example_norms(norms),
        "example_norms_auc": bands_and_auc(norms, accounting),
    }


def group_norms(accounting: Accounting) -> Figure:
    """Draw the norm of each layer group's gradient over the epochs: from clean, from memorized, from all examples."""
    figure = new_figure(9, 3.6)
    panels = figure.subplots(1, 3, sharey=True)
    for axes, column, title in zip(
        panels, ("clean", "memorized", "total"), (CLEAN, MEMORIZED, "all examples"), strict=True
    ):
        for group, color in _group_colors(accounting.groups).items():
            # an axis of logarithms has no place for 0
            values = [value or np.nan for value in accounting.column(column, group)]
            axes.plot(accounting.epochs, values, color=color, label=group, marker=".", markersize=4)
        axes.set_yscale("log")
        axes.set_title(title, fontsize=10)
        epoch_axis(axes)
    panels[0].set_ylabel(_GROUP_NORM, fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside right center", frameon=False, fontsize=8, title="layer group", title_fontsize=8
    )
    return figure


def cosines(accounting: Accounting) -> Figure:
    """Draw the cosine between the gradients from clean and from memorized examples: layer group by epoch."""
    groups, epochs = accounting.groups, accounting.epochs
    figure = new_figure(9, 0.32 * len(groups) + 1.5)
    axes = figure.add_subplot()
    table = [accounting.column("cosine", group) for group in groups]
    edges = epochs[0] - 0.5, epochs[-1] + 0.5, len(groups) - 0.5, -0.5
    picture = axes.imshow(table, cmap="RdBu", vmin=-1, vmax=1, aspect="auto", extent=edges, interpolation="nearest")
    axes.set_yticks(range(len(groups)), groups)
    axes.set_ylabel("layer group")
    epoch_axis(axes)
    figure.colorbar(picture, label="cosine, mean over\nthe parameters", ticks=[-1, -0.5, 0, 0.5, 1], pad=0.01)
    return figure


def example_norms(norms: Mapping[int, Mapping[str, np.ndarray]]) -> Figure:
    """Draw how the norms of single examples' gradients are distributed at a few epochs.

    Args:
        norms: Epoch to kind of example to the norms, ``[examples]``.
    """
    epochs = _spread(list(norms), _HISTOGRAMS)
    figure = new_figure(9, 2.9)
    panels = figure.subplots(1, len(epochs), sharex=True, squeeze=False)[0]
    positive = np.concatenate([values[values > 0] for epoch in epochs for values in norms[epoch].values()])
    if not positive.size:
        positive = np.ones(1)
    # few examples lie far below all others; they count in the first bin
    low, high = np.quantile(positive, 0.005), positive.max()
    edges = np.geomspace(low / 1.01, high * 1.01, _BINS + 1)
    for axes, epoch in zip(panels, epochs, strict=True):
        for kind, values in norms[epoch].items():
            shares = np.full(len(values), 100 / max(len(values), 1))
            axes.hist(np.maximum(values, low), edges, weights=shares, color=_KINDS[kind], alpha=0.6, label=kind)
        axes.set_xscale("log")
        axes.set_title(f"epoch {epoch}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(_EXAMPLE_NORM, fontsize=10)
    panels[0].set_ylabel("share of its kind (%)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return figure


def bands_and_auc(norms: Mapping[int, Mapping[str, np.ndarray]], accounting: Accounting) -> Figure:
    """Draw the norms of single examples over the epochs, and how well they tell memorized from clean examples.

    Args:
        norms: As for `example_norms`.
        accounting: Its ``auc`` per layer group.
    """
    figure = new_figure(9, 3.6)
    left, right = figure.subplots(1, 2)
    for kind, color in _KINDS.items():
        quantiles = {epoch: _quantiles(kinds[kind]) for epoch, kinds in norms.items() if (kinds[kind] > 0).any()}
        if quantiles:
            low, middle, high = np.array(list(quantiles.values())).T
            left.fill_between(list(quantiles), low, high, color=color, alpha=0.25, linewidth=0)
            left.plot(list(quantiles), middle, color=color, label=kind, marker=".", markersize=4)
    left.set_yscale("log")
    left.set_ylabel(_EXAMPLE_NORM)
    left.set_title("median, and the middle 80 %", fontsize=10)
    if left.lines:
        left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, frameon=False, fontsize=8)
    for group, color in _group_colors(accounting.groups).items():
        right.plot(accounting.epochs, _floats(accounting.column("auc", group)), color=color, label=group, linewidth=1)
    whole = _floats(accounting.column("auc"))
    right.plot(accounting.epochs, whole, color="black", label="whole model", linewidth=2.2, marker=".")
    right.axhline(0.5, color="#999", linestyle=":", linewidth=1)
    right.set_ylabel("area under the ROC curve")
    right.set_title("“memorized” predicted from the norm", fontsize=10)
    for axes in (left, right):
        epoch_axis(axes)
    figure.legend(
        *right.get_legend_handles_labels(),
        loc="outside right center", frameon=False, fontsize=8, title="norm of the gradient of", title_fontsize=8,
    )  # fmt: skip
    return figure


def _spread(epochs: Sequence[int], number: int) -> list[int]:
    """Return at most that many epochs, from the first to the last."""
    places = np.linspace(0, len(epochs) - 1, min(number, len(epochs))).round().astype(int)
    return [epochs[place] for place in places]


def _quantiles(values: np.ndarray) -> np.ndarray:
    return np.quantile(values, [0.1, 0.5, 0.9])


def _floats(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def _group_colors(groups: Sequence[str]) -> dict[str, Any]:
    from matplotlib import colormaps

    places = np.linspace(0, 0.88, len(groups))  # the lightest end of the map is hard to see on white
    return {group: colormaps["viridis"](place) for group, place in zip(groups, places, strict=True)}
