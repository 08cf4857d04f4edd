"""The figures of a localization: how many units flip an example, where they are, and what else they do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from memloc_ext.probes.localization.dataset import DatasetLocalization
from memloc_ext.probes.localization.result import FLIPPED
from memloc_ext.study.report.figures import COLORS, NAMES, new_figure, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KINDS = {"memorized": "memorized examples", "clean": "clean examples"}
_COLUMNS = {"clean": "clean training examples", "memorized": "memorized examples", "test": "test examples"}
_WIDTH = 0.4


def all_figures(localizations: Mapping[str, DatasetLocalization]) -> dict[str, Figure]:
    """Draw every figure of the localizations of a run, model to localization, by the name of its file."""
    if not localizations:
        return {}
    figures = {
        "localization_units": units_per_example(localizations),
        "localization_sites": units_per_site(localizations),
    }
    evaluated = {
        model: found for model, found in localizations.items() if any(kind.curve for kind in found.kinds.values())
    }
    if evaluated:
        figures["localization_accuracy"] = accuracy_after_units(evaluated)
    tied = localizations.get("example_tied")
    if tied and any(kind.units for kind in tied.kinds.values()):
        figures["localization_memorization"] = memorization_share(tied)
    return figures


def units_per_example(localizations: Mapping[str, DatasetLocalization]) -> Figure:
    """Draw how many examples flip after so many units, in percent of the localized examples of their kind."""
    figure = new_figure(9, 2.9)
    panels = figure.subplots(1, len(localizations), squeeze=False, sharey=True)[0]
    for axes, (model, localization) in zip(panels, localizations.items(), strict=True):
        for place, (kind, result) in zip((-0.5, 0.5), localization.kinds.items(), strict=False):
            numbers = np.arange(len(result.histogram))
            shares = 100 * np.array(result.histogram) / result.localized
            label = f"{_KINDS[kind]}: {result.statuses[FLIPPED]} of {result.localized} flip"
            if result.mean is not None:
                label += f", mean {result.mean:.2f}"
            elif result.median is not None:
                label += f", median {result.median:g}"
            axes.bar(numbers + place * _WIDTH, shares, _WIDTH, color=COLORS[kind], label=label)
        axes.set_xlim(0.4, max([1, *(len(r.histogram) - 1 for r in localization.kinds.values())]) + 0.6)
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel("units until the prediction flips")
        _title(axes, model)
        axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.1))
    panels[0].set_ylabel("share of its kind (%)")
    return figure


def units_per_site(localizations: Mapping[str, DatasetLocalization]) -> Figure:
    """Draw the share of the units found in each site, beside the share that the site has of all units."""
    longest = max(len(localization.sites) for localization in localizations.values())
    figure = new_figure(9, 0.36 * longest + 1.5)
    panels = figure.subplots(1, len(localizations), squeeze=False)[0]
    for axes, (model, localization) in zip(panels, localizations.items(), strict=True):
        names = [site.name for site in localization.sites]
        places = np.arange(len(names))
        for shift, (kind, result) in zip((-0.5, 0.5), localization.kinds.items(), strict=False):
            shares = [100 * result.sites[name] / max(result.units, 1) for name in names]
            axes.barh(places + shift * _WIDTH, shares, _WIDTH, color=COLORS[kind], label=_KINDS[kind])
        total = sum(site.units for site in localization.sites)
        sizes = [100 * site.units / total for site in localization.sites]
        axes.plot(sizes, places, "|", color="black", markersize=14, label="share of all units")
        axes.set_yticks(places, [f"{site.name} ({site.units})" for site in localization.sites])
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_xlabel("share of the units found (%)")
        _title(axes, model)
    _shared_legend(figure, panels[0])
    return figure


def accuracy_after_units(localizations: Mapping[str, DatasetLocalization]) -> Figure:
    """Draw accuracy after each unit of an example, mean over the examples that have so many units, in percent.

    The area of a point follows their number.
    """
    figure = new_figure(9, 2.5 * len(localizations) + 0.6)
    rows = figure.subplots(len(localizations), len(_KINDS), squeeze=False, sharey=True)
    for panels, (model, localization) in zip(rows, localizations.items(), strict=True):
        for axes, kind in zip(panels, _KINDS, strict=True):
            curve = localization.kinds[kind].curve if kind in localization.kinds else []
            units = [point.units for point in curve]
            sizes = [4 + 40 * point.examples / curve[0].examples for point in curve]
            for column, label in _COLUMNS.items():
                shares = [getattr(point, column) for point in curve]
                values = [np.nan if share is None else 100 * share for share in shares]
                axes.plot(units, values, color=COLORS[column], linewidth=1)
                axes.scatter(units, values, sizes, color=COLORS[column], label=label, linewidth=0)
            axes.locator_params(axis="x", integer=True)
            axes.set_xlabel(f"units of one of the {_KINDS[kind]} off")
            _title(axes, model)
        panels[0].set_ylabel("accuracy (%)")
    _shared_legend(figure, rows[0, 0])
    return figure


def memorization_share(localization: DatasetLocalization) -> Figure:
    """Draw the share of memorization channels among the units found, among all, and among those an example keeps."""
    figure = new_figure(9, 1.9)
    axes = figure.add_subplot()
    rows = {
        f"units found for {_KINDS[kind]}": (result.memorization / result.units, COLORS[kind])
        for kind, result in localization.kinds.items()
        if result.units
    }
    rows["units that an example keeps"] = localization.kept_share, "#999"
    rows["all units"] = localization.memorization_share, "#ccc"
    shares = [share for share, _ in rows.values()]
    bars = axes.barh(list(rows), [100 * share for share in shares], 0.7, color=[color for _, color in rows.values()])
    axes.bar_label(bars, [percent(share) for share in shares], padding=3, fontsize=8, color="#444")
    axes.invert_yaxis()
    axes.set_xlim(0, 108)
    axes.set_xlabel("share of memorization channels (%)")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _title(axes: Axes, model: str) -> None:
    axes.set_title(NAMES[model], fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def _shared_legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=8)
