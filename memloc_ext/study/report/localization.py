"""A localization: how many units flip an example, where they are, and what else they do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from memloc_ext.probes.localization.dataset import EVALUATED, DatasetLocalization, KindLocalization
from memloc_ext.probes.localization.result import ALREADY_WRONG, CAPPED, EXHAUSTED, FLIPPED
from memloc_ext.study.report.figures import COLORS, KINDS, NAMES, bar_axes, legend, new_figure, titled
from memloc_ext.study.report.section import Number, Picture, Section, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PAPER = {"memorized": "around 5", "clean": "more"}
_COLUMNS = {"clean": "clean training examples", "memorized": "memorized examples", "test": "test examples"}
_ENDS = {CAPPED: "not within the limit", EXHAUSTED: "not with all units off", ALREADY_WRONG: "wrong already"}
_WIDTH = 0.4


def section(localizations: Mapping[str, DatasetLocalization]) -> Section:
    """Return the section on the localizations of a run, model to localization, of which there is at least one."""
    return Section(
        name="localization",
        title="Which units flip an example?",
        method="For single training examples, the channel or neuron whose removal raises the example's loss most, and "
        "that of other examples least, is switched off, and again, until the prediction is no longer the label the "
        "model was trained on.",
        answers=answers(localizations),
        pictures=pictures(localizations),
        notes=notes(localizations),
    )


def summary(localizations: Mapping[str, DatasetLocalization]) -> list[str]:
    """Return the number of units per example in a line per model, for the terminal."""
    return [
        f"Units that flip an example, {NAMES[model]}: {_counts(found)}; {1000 * found.seconds:.0f} ms per example."
        for model, found in localizations.items()
    ]


def answers(localizations: Mapping[str, DatasetLocalization]) -> list[str]:
    """Return what the localizations of a run say, in sentences."""
    sentences = []
    for model, found in localizations.items():
        if model != "plain":
            sentences += _pool(found)
            continue
        sentences += [
            "After plain training, the number of units that are switched off, one at a time, until the prediction "
            f"flips is {_counts(found)}. The paper: around 5 for noisy examples, more for clean ones.",
            *_where(found),
            *_edits(found),
        ]
    return sentences


def numbers(localizations: Mapping[str, DatasetLocalization]) -> list[Number]:
    """Return the numbers of the localizations of a run."""
    found = []
    for model, localization in localizations.items():
        name = NAMES[model]
        for kind, result in localization.kinds.items():
            what, paper = f"{name}: units that flip a {kind} example", _PAPER[kind] if model == "plain" else ""
            share = result.flipped / result.searched if result.searched else None
            found += [
                Number(f"{what}, mean", result.mean, "", paper),
                Number(f"{what}, median", result.median, ""),
                Number(f"{name}: {kind} examples that units flip", share),
            ]
        memorized = localization.kinds.get("memorized")
        if model != "plain" and memorized is not None and memorized.units:
            share = memorized.memorization / memorized.units
            found.append(Number(f"{name}: memorization channels among the units of memorized examples", share))
    return found


def _counts(localization: DatasetLocalization) -> str:
    kinds = localization.kinds.items()
    return " and ".join(f"{_units(result)} for {kind} examples ({statuses(result)})" for kind, result in kinds)


def _where(localization: DatasetLocalization) -> list[str]:
    parts = []
    sizes = {site.name: site.units for site in localization.sites}
    for kind, result in localization.kinds.items():
        if result.units:
            site, units = max(result.sites.items(), key=lambda item: item[1])
            size = percent(sizes[site] / sum(sizes.values()))
            parts.append(
                f"{percent(units / result.units)} % of the units found for {kind} examples are in {site}, "
                f"which has {size} % of all units"
            )
    return [f"Where they are: {'; '.join(parts)}."] if parts else []


def _edits(localization: DatasetLocalization) -> list[str]:
    sentences = []
    for kind, result in localization.kinds.items():
        if result.edited:
            before, after = vars(result.curve[0]), vars(result.edited)
            changes = [
                f"from {percent(before[column])} to {percent(after[column])} % on {column}"
                for column in _COLUMNS
                if before[column] is not None
            ]
            sentences.append(
                f"With the units of one {kind} example off, accuracy goes {', '.join(changes)} examples "
                f"(mean over {result.edited.examples} such examples)."
            )
    return sentences


def _pool(localization: DatasetLocalization) -> list[str]:
    found = {kind: result for kind, result in localization.kinds.items() if result.units}
    if not found:
        return []
    shares = {kind: result.memorization / result.units for kind, result in found.items()}
    parts = [
        f"{percent(shares[kind])} % of the units found for {kind} examples ({result.units / result.searched:.2f} each)"
        for kind, result in found.items()
    ]
    first = (
        "With example-tied dropout, each example searched with its own mask, memorization channels are "
        f"{' and '.join(parts)}. They are {percent(localization.memorization_share)} % of all units, and "
        f"{percent(localization.kept_share)} % of those that an example keeps."
    )
    if "memorized" not in shares:
        return [first]
    if shares["memorized"] > localization.kept_share:
        return [f"{first} So the search finds them for memorized examples more often than chance would."]
    return [
        f"{first} So the search does not point to them: the shortest way to another prediction leads through "
        "generalization channels, which others need as well. Whether memorized labels need the memorization channels, "
        "the accuracy with all of these off says."
    ]


def notes(localizations: Mapping[str, DatasetLocalization]) -> list[str]:
    """Return what was searched and evaluated, in a sentence per model."""
    sentences = []
    for model, localization in localizations.items():
        parts = [
            f"{result.localized} of {result.fitted} {kind} examples that it fits were searched ({statuses(result)}), "
            f"accuracy measured after the units of {result.edited.examples if result.edited else 0}"
            for kind, result in localization.kinds.items()
        ]
        sentences.append(
            f"{NAMES[model].capitalize()}: {', '.join(parts)}, on at most {EVALUATED} examples of each kind. "
            f"The search took {1000 * localization.seconds:.0f} ms per example."
        )
    return sentences


def statuses(result: KindLocalization) -> str:
    """Return how the searches of a kind ended, such as ``98 of 100 flipped``."""
    counts = result.statuses
    others = [f", {counts[status]} {end}" for status, end in _ENDS.items() if counts[status]]
    return "".join([f"{counts[FLIPPED]} of {result.localized} flipped", *others])


def _units(result: KindLocalization) -> str:
    """Return the number of units that flip an example, of which searches without a flip give a lower bound alone."""
    if result.median is None:
        return "unknown"
    median = f"{result.median:g}"
    return f"{median} in the median" if result.mean is None else f"{result.mean:.2f} on average (median {median})"


def pictures(localizations: Mapping[str, DatasetLocalization]) -> list[Picture]:
    """Draw every figure of the localizations of a run, model to localization, of which there is at least one."""
    drawn = [
        Picture(
            "localization_units",
            "Units per example",
            units_per_example(localizations),
            "Number of units until the prediction flips. The paper: around 5 for noisy examples, more for clean ones.",
        ),
        Picture(
            "localization_sites",
            "Units per site",
            units_per_site(localizations),
            "Where these units are, from input to output. The mark is where a bar would end if units were found at "
            "random; in brackets: how many units there are.",
        ),
    ]
    evaluated = {
        model: found for model, found in localizations.items() if any(kind.curve for kind in found.kinds.values())
    }
    if evaluated:
        drawn.append(
            Picture(
                "localization_accuracy",
                "Accuracy after each unit",
                accuracy_after_units(evaluated),
                "Accuracy while the units of one example are switched off, one after another: mean over the examples "
                "that have so many; the fewer they are, the smaller the point. With example-tied dropout each training "
                "example keeps its own mask; test examples have none.",
            )
        )
    tied = localizations.get("example_tied")
    if tied and any(kind.units for kind in tied.kinds.values()):
        drawn.append(
            Picture(
                "localization_memorization",
                "Share of memorization channels",
                memorization_share(tied),
                "Example-tied dropout: are the units that flip an example its memorization channels? By chance a unit "
                "among those that the example keeps would be one as often as the third bar says.",
            )
        )
    return drawn


def units_per_example(localizations: Mapping[str, DatasetLocalization]) -> Figure:
    """Draw how many examples flip after so many units, in percent of the localized examples of their kind."""
    figure = new_figure(9, 2.9)
    panels = figure.subplots(1, len(localizations), squeeze=False, sharey=True)[0]
    for axes, (model, localization) in zip(panels, localizations.items(), strict=True):
        for place, (kind, result) in zip((-0.5, 0.5), localization.kinds.items(), strict=False):
            places = np.arange(len(result.histogram)) + place * _WIDTH
            shares = 100 * np.array(result.histogram) / result.localized
            middle = f", median {result.median:g}" if result.median is not None else ""
            middle = middle if result.mean is None else f", mean {result.mean:.2f}"
            label = f"{KINDS[kind]}: {result.flipped} of {result.localized} flip{middle}"
            axes.bar(places, shares, _WIDTH, color=COLORS[kind], label=label)
        axes.set_xlim(0.4, max([1, *(len(r.histogram) - 1 for r in localization.kinds.values())]) + 0.6)
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel("units until the prediction flips")
        titled(axes, NAMES[model])
        axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.1))
    panels[0].set_ylabel("share of its kind (%)")
    return figure


def units_per_site(localizations: Mapping[str, DatasetLocalization]) -> Figure:
    """Draw the share of the units found in each site, beside the share that the site has of all units."""
    longest = max(len(localization.sites) for localization in localizations.values())
    figure = new_figure(9, 0.36 * longest + 1.5)
    panels = figure.subplots(1, len(localizations), squeeze=False)[0]
    for axes, (model, localization) in zip(panels, localizations.items(), strict=True):
        places = np.arange(len(localization.sites))
        for shift, (kind, result) in zip((-0.5, 0.5), localization.kinds.items(), strict=False):
            shares = [100 * result.sites[site.name] / max(result.units, 1) for site in localization.sites]
            axes.barh(places + shift * _WIDTH, shares, _WIDTH, color=COLORS[kind], label=KINDS[kind])
        total = sum(site.units for site in localization.sites)
        sizes = [100 * site.units / total for site in localization.sites]
        axes.plot(sizes, places, "|", color="black", markersize=14, label="share of all units")
        axes.set_yticks(places, [f"{site.name} ({site.units})" for site in localization.sites])
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_xlabel("share of the units found (%)")
        titled(axes, NAMES[model])
    legend(figure, panels[0])
    return figure


def accuracy_after_units(localizations: Mapping[str, DatasetLocalization]) -> Figure:
    """Draw accuracy after each unit of an example, mean over the examples that have so many units, in percent.

    The area of a point follows their number.
    """
    figure = new_figure(9, 2.5 * len(localizations) + 0.6)
    rows = figure.subplots(len(localizations), len(KINDS), squeeze=False, sharey=True)
    for panels, (model, localization) in zip(rows, localizations.items(), strict=True):
        for axes, kind in zip(panels, KINDS, strict=True):
            curve = localization.kinds[kind].curve if kind in localization.kinds else []
            units = [point.units for point in curve]
            sizes = [4 + 40 * point.examples / curve[0].examples for point in curve]
            for column, label in _COLUMNS.items():
                values = 100 * np.array([getattr(point, column) for point in curve], float)  # NaN where there is none
                axes.plot(units, values, color=COLORS[column], linewidth=1)
                axes.scatter(units, values, sizes, color=COLORS[column], label=label, linewidth=0)
            axes.locator_params(axis="x", integer=True)
            axes.set_xlabel(f"units of one of the {KINDS[kind]} off")
            titled(axes, NAMES[model])
        panels[0].set_ylabel("accuracy (%)")
    legend(figure, rows[0, 0])
    return figure


def memorization_share(localization: DatasetLocalization) -> Figure:
    """Draw the share of memorization channels among the units found, among all, and among those an example keeps."""
    figure = new_figure(9, 1.9)
    axes = figure.add_subplot()
    rows = {
        f"units found for {KINDS[kind]}": (result.memorization / result.units, COLORS[kind])
        for kind, result in localization.kinds.items()
        if result.units
    }
    rows["units that an example keeps"] = localization.kept_share, "#999"
    rows["all units"] = localization.memorization_share, "#ccc"
    shares, colors = zip(*rows.values(), strict=True)
    bars = axes.barh(range(len(rows)), [100 * share for share in shares], 0.7, color=colors)
    axes.bar_label(bars, [percent(share) for share in shares], padding=3, fontsize=8, color="#444")
    bar_axes(axes, list(rows), "share of memorization channels (%)")
    return figure
