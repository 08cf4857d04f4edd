"""A gradient accounting: whose gradient is large, where, when, and whether it tells who is memorized."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from memloc_ext.study.accounting import Accounting
from memloc_ext.study.report.figures import COLORS, legend, new_figure, titled
from memloc_ext.study.report.section import Number, Picture, Section, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLEAN, MEMORIZED = "clean examples", "memorized examples"
_KINDS = {CLEAN: COLORS["clean"], MEMORIZED: COLORS["memorized"]}
_GROUP_NORM = "norm of the gradient, $\\|g\\|\\,/\\,\\sqrt{\\mathrm{numel}}$,\nsum over the parameters"
_EXAMPLE_NORM = "norm of an example's gradient"
_HISTOGRAMS = 4
_BINS = 40


def section(accounting: Accounting) -> Section:
    """Return the section on an accounting."""
    return Section(
        name="accounting",
        title="Whose gradient is it?",
        method="The gradient of plain training is the sum of what the clean and what the memorized examples contribute "
        "to it. Both are added up over the batches of an epoch, for every parameter.",
        answers=answers(accounting),
        pictures=pictures(accounting),
        notes=cost(accounting),
    )


def answers(accounting: Accounting) -> list[str]:
    """Return what an accounting says; nothing if no example is memorized."""
    if not any(accounting.column("memorized")):
        return []
    found = _Found(accounting)
    sentences = [
        f"The memorized examples, {percent(found.memorized)} % of the data, make {percent(found.share)} % of the "
        f"gradient norm in epoch {found.epoch}, where theirs is largest. The gradients of the two kinds have a mean "
        f"cosine of {found.cosine:.2f} over all epochs."
    ]
    if found.auc is not None:
        sentences.append(
            "The norm of an example's own gradient tells memorized from clean examples: the area under the ROC curve "
            f"is {found.auc:.3f} in epoch {found.auc_epoch}, the best."
        )
    if found.against is not None:
        sentences[0] += (
            f" {percent(found.against)} % of the memorized examples are pushed against, and "
            f"{percent(found.clean_against)} % of the clean ones (means over the epochs): a step along the gradient of "
            "the clean examples raises their loss."
        )
    return sentences


def numbers(accounting: Accounting) -> list[Number]:
    """Return the numbers of these sentences."""
    if not any(accounting.column("memorized")):
        return []
    found = _Found(accounting)
    return [
        Number("share of memorized examples in the gradient norm, peak epoch", found.share, "%", "about half"),
        Number("cosine of clean and memorized gradient, mean over the epochs", found.cosine, "", "strongly negative"),
        Number("memorized examples that the clean gradient pushes against, mean over the epochs", found.against),
        Number("area under the ROC curve of the examples' gradient norms, best epoch", found.auc, ""),
    ]


def cost(accounting: Accounting) -> list[str]:
    """Return what an accounting cost, in a sentence."""
    times = accounting.cost
    return [
        f"Gradient accounting: an epoch with it takes {times['ratio']:.2f}x the time of plain training, a step "
        f"{times['step_ratio']:.2f}x ({1000 * times['accounted_step']:.1f} and {1000 * times['plain_step']:.1f} ms, "
        f"medians of {times['pairs']} pairs in turn)."
    ]


class _Found:
    def __init__(self, accounting: Accounting) -> None:
        memorized, clean, auc = (accounting.column(name) for name in ("memorized", "clean", "auc"))
        peak = memorized.index(max(memorized))
        self.epoch: int = accounting.epochs[peak]
        self.share: float = memorized[peak] / (clean[peak] + memorized[peak])
        self.memorized = accounting.epoch(self.epoch).memorized.double().mean().item()
        self.cosine = statistics.fmean(accounting.column("cosine"))
        self.against, self.clean_against = (
            _mean(accounting.column(name)) for name in ("memorized_against", "clean_against")
        )
        told = [value for value in auc if value is not None]
        self.auc: float | None = max(told, default=None)
        self.auc_epoch: int | None = accounting.epochs[auc.index(self.auc)] if told else None


def _mean(values: Sequence[float | None]) -> float | None:
    told = [value for value in values if value is not None]
    return statistics.fmean(told) if told else None


def pictures(accounting: Accounting) -> list[Picture]:
    """Draw every figure of an accounting; reads the file of each epoch once."""
    norms: dict[int, dict[str, np.ndarray]] = {}
    for epoch in accounting.epochs:
        account = accounting.epoch(epoch)
        kinds = {CLEAN: ~account.memorized, MEMORIZED: account.memorized}
        counted = account.total_norms.isfinite()
        norms[epoch] = {kind: account.total_norms[rows & counted].numpy() for kind, rows in kinds.items()}
    return [
        Picture(
            "gradient_norms",
            "Gradient norm per layer group and epoch",
            group_norms(accounting),
            "Norm of the gradient per layer group, from clean, from memorized and from all examples. The paper: "
            "10 % noisy examples have a norm comparable to the clean 90 % (ResNet-9, CIFAR-10, epochs 15 to 20).",
        ),
        Picture(
            "gradient_cosine",
            "Cosine per layer group and epoch",
            cosines(accounting),
            "Cosine between the gradient of the clean and that of the memorized examples; red: they point against "
            "each other. The paper: strongly negative throughout.",
        ),
        Picture(
            "example_cosines",
            "Cosines of single memorized examples' gradients, and the noise scale",
            example_cosines(accounting),
            "Left: cosine of a memorized example's own gradient with the sum of the clean gradients of the epoch's "
            "batches before, mean; the band is the middle half over all parameters. Middle: share of the memorized "
            "examples where it is negative: a step for the clean examples raises their loss. Right: noise scale, the "
            "batch size from which a larger one makes the gradient little more certain; "
            f"{_scale(accounting, 0)} in the first epoch, {_scale(accounting, -1)} in the last, over all parameters.",
        ),
        Picture(
            "example_norms",
            "Norms of single examples' gradients",
            example_norms(norms),
            "Norm of the gradient of every single example's own loss, taken as the example was trained on. The "
            "first bin also holds everything below it.",
        ),
        Picture(
            "example_norms_auc",
            "Norms and area under the ROC curve per epoch",
            bands_and_auc(norms, accounting),
            "Left: the same over the epochs. Right: area under the ROC curve of “memorized” predicted from the "
            "norm, 1 if it tells all of them apart, ½ (dotted) if it tells nothing.",
        ),
    ]


def group_norms(accounting: Accounting) -> Figure:
    """Draw the norm of each layer group's gradient over the epochs: from clean, from memorized, from all examples."""
    figure = new_figure(9, 3.6)
    panels = figure.subplots(1, 3, sharey=True)
    columns = {"clean": CLEAN, "memorized": MEMORIZED, "total": "all examples"}
    for axes, (column, title) in zip(panels, columns.items(), strict=True):
        for group, color in _group_colors(accounting.groups).items():
            # an axis of logarithms has no place for 0
            values = [value or np.nan for value in accounting.column(column, group)]
            axes.plot(accounting.epochs, values, color=color, label=group, marker=".", markersize=4)
        axes.set_yscale("log")
        titled(axes, title, epochs=True)
    panels[0].set_ylabel(_GROUP_NORM, fontsize=9)
    legend(figure, panels[0], right="layer group")
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
    titled(axes, epochs=True)
    figure.colorbar(picture, label="cosine, mean over\nthe parameters", ticks=[-1, -0.5, 0, 0.5, 1], pad=0.01)
    return figure


def example_cosines(accounting: Accounting) -> Figure:
    """Draw cosines of memorized examples with the clean gradient, the share pushed against, and the noise scale."""
    figure = new_figure(9, 3.6)
    panels = figure.subplots(1, 3)
    columns = {
        "memorized_cosine": "cosine, memorized examples",
        "memorized_against": "pushed against (%)",
        "noise_scale": "noise scale (examples)",
    }
    colors = {**_group_colors(accounting.groups), None: "black"}
    for axes, (column, title) in zip(panels, columns.items(), strict=True):
        for group, color in colors.items():
            values = _values(accounting, column, group) * (100 if column == "memorized_against" else 1)
            axes.plot(accounting.epochs, values, color=color, label=group or "whole model", marker=".", markersize=4)
        titled(axes, title, epochs=True)
    low, high = (_values(accounting, f"memorized_cosine_q{q}") for q in (25, 75))
    panels[0].fill_between(accounting.epochs, low, high, color="black", alpha=0.12, linewidth=0)
    panels[0].axhline(0, color="#999", linestyle=":", linewidth=1)
    clean = 100 * _values(accounting, "clean_against")
    panels[1].plot(accounting.epochs, clean, color=COLORS["clean"], linestyle="--", label="whole model, clean examples")
    panels[1].set_ylim(-3, 103)
    panels[2].set_yscale("log", nonpositive="mask")
    legend(figure, panels[1], right="layer group")
    return figure


def _values(accounting: Accounting, column: str, group: str | None = None) -> np.ndarray:
    return np.array(accounting.column(column, group), float)  # NaN where there is none


def _scale(accounting: Accounting, place: int) -> str:
    value = accounting.column("noise_scale")[place]
    return "unknown" if value is None else f"{value:.3g}"


def example_norms(norms: Mapping[int, Mapping[str, np.ndarray]]) -> Figure:
    """Draw how the norms of single examples' gradients are distributed at a few epochs.

    Args:
        norms: Epoch to kind of example to the norms, ``[examples]``.
    """
    places = np.linspace(0, len(norms) - 1, min(_HISTOGRAMS, len(norms))).round().astype(int)
    epochs = [list(norms)[place] for place in places]
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
        titled(axes, f"epoch {epoch}")
    figure.supxlabel(_EXAMPLE_NORM, fontsize=10)
    panels[0].set_ylabel("share of its kind (%)")
    legend(figure, panels[0])
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
        found = {epoch: kinds[kind] for epoch, kinds in norms.items() if (kinds[kind] > 0).any()}
        if found:
            low, middle, high = np.array([np.quantile(values, [0.1, 0.5, 0.9]) for values in found.values()]).T
            left.fill_between(list(found), low, high, color=color, alpha=0.25, linewidth=0)
            left.plot(list(found), middle, color=color, label=kind, marker=".", markersize=4)
    left.set_yscale("log")
    left.set_ylabel(_EXAMPLE_NORM)
    titled(left, "median, and the middle 80 %", epochs=True)
    if left.lines:
        left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, frameon=False, fontsize=8)
    for group, color in _group_colors(accounting.groups).items():
        right.plot(accounting.epochs, _values(accounting, "auc", group), color=color, label=group, linewidth=1)
    auc = _values(accounting, "auc")
    right.plot(accounting.epochs, auc, color="black", label="whole model", linewidth=2.2, marker=".")
    right.axhline(0.5, color="#999", linestyle=":", linewidth=1)
    right.set_ylabel("area under the ROC curve")
    titled(right, "“memorized” predicted from the norm", epochs=True)
    legend(figure, right, right="norm of the gradient of")
    return figure


def _group_colors(groups: Sequence[str]) -> dict[str, Any]:
    from matplotlib import colormaps

    places = np.linspace(0, 0.88, len(groups))  # the lightest end of the map is hard to see on white
    return {group: colormaps["viridis"](place) for group, place in zip(groups, places, strict=True)}
