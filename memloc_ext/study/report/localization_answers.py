"""What a localization says, in sentences with its numbers."""

from __future__ import annotations

from collections.abc import Mapping

from memloc_ext.probes.localization.dataset import EVALUATED, DatasetLocalization, KindLocalization
from memloc_ext.probes.localization.edited_accuracy import EditedAccuracy
from memloc_ext.probes.localization.result import ALREADY_WRONG, CAPPED, EXHAUSTED, FLIPPED
from memloc_ext.study.report.figures import NAMES, percent
from memloc_ext.study.report.section import Number

KIND_NAMES = {"memorized": "memorized", "clean": "clean"}
_PAPER = {"memorized": "around 5", "clean": "more"}


def summary(localizations: Mapping[str, DatasetLocalization]) -> list[str]:
    """Return the number of units per example in a line per model, for the terminal."""
    lines = []
    for model, localization in localizations.items():
        parts = [_flips(kind, result) for kind, result in localization.kinds.items()]
        lines.append(f"Localization, {NAMES[model]}: {', '.join(parts)}; {_times(localization)}.")
    return lines


def _flips(kind: str, result: KindLocalization) -> str:
    name = KIND_NAMES[kind]
    if not result.searched:
        return f"no {name} example is fitted, {statuses(result)}"
    median = "-" if result.median is None else f"{result.median:g}"
    if result.mean is None:
        return f"of the {name} examples {statuses(result)} (median {median} units)"
    return f"{result.mean:.2f} units flip a {name} example (median {median})"


def answers(localizations: Mapping[str, DatasetLocalization]) -> list[str]:
    """Return what the localizations of a run say, in sentences."""
    sentences = []
    for model, localization in localizations.items():
        if model == "plain":
            sentences += [_counts(localization), _where(localization), *_edits(localization)]
        else:
            sentences += _pool(localization)
    return [sentence for sentence in sentences if sentence]


def numbers(model: str, localization: DatasetLocalization) -> list[Number]:
    """Return the numbers of a localization."""
    name = NAMES[model]
    found = []
    for kind, result in localization.kinds.items():
        what, paper = f"{name}: units that flip a {KIND_NAMES[kind]} example", _PAPER[kind] if model == "plain" else ""
        share = result.flipped / result.searched if result.searched else None
        found += [
            Number(f"{what}, mean", result.mean, "", paper),
            Number(f"{what}, median", result.median, ""),
            Number(f"{name}: {KIND_NAMES[kind]} examples that units flip", share),
        ]
    memorized = localization.kinds.get("memorized")
    if model != "plain" and memorized is not None and memorized.units:
        share = memorized.memorization / memorized.units
        found.append(Number(f"{name}: memorization channels among the units of memorized examples", share))
    return found


def _counts(localization: DatasetLocalization) -> str:
    parts = [
        f"{_units(result)} for {KIND_NAMES[kind]} examples ({statuses(result)})"
        for kind, result in localization.kinds.items()
    ]
    return (
        "After plain training, the number of units that are switched off, one at a time, until the prediction flips is "
        f"{' and '.join(parts)}. The paper: around 5 for noisy examples, more for clean ones."
    )


def _where(localization: DatasetLocalization) -> str:
    parts = []
    sizes = {site.name: site.units for site in localization.sites}
    for kind, result in localization.kinds.items():
        if result.units:
            site, units = max(result.sites.items(), key=lambda item: item[1])
            size = percent(sizes[site] / sum(sizes.values()))
            parts.append(
                f"{percent(units / result.units)} % of the units found for {KIND_NAMES[kind]} examples are in {site}, "
                f"which has {size} % of all units"
            )
    return f"Where they are: {'; '.join(parts)}." if parts else ""


def _edits(localization: DatasetLocalization) -> list[str]:
    sentences = []
    for kind, result in localization.kinds.items():
        if result.edited:
            before, after = result.curve[0], result.edited
            sentences.append(
                f"With the units of one {KIND_NAMES[kind]} example off, accuracy goes {_change(before, after)} "
                f"(mean over {after.examples} such examples)."
            )
    return sentences


def _change(before: EditedAccuracy, after: EditedAccuracy) -> str:
    columns = {"clean": "clean", "memorized": "memorized", "test": "test"}
    parts = [
        f"from {percent(getattr(before, column))} to {percent(getattr(after, column))} % on {name}"
        for column, name in columns.items()
        if getattr(before, column) is not None
    ]
    return f"{', '.join(parts)} examples"


def _pool(localization: DatasetLocalization) -> list[str]:
    if not any(result.units for result in localization.kinds.values()):
        return []
    parts, shares = [], {}
    for kind, result in localization.kinds.items():
        if result.units:
            shares[kind] = result.memorization / result.units
            parts.append(
                f"{percent(shares[kind])} % of the units found for {KIND_NAMES[kind]} examples "
                f"({result.units / result.searched:.2f} each)"
            )
    first = (
        "With example-tied dropout, each example searched with its own mask, memorization channels are "
        f"{' and '.join(parts)}. They are {percent(localization.memorization_share)} % of all units, and "
        f"{percent(localization.kept_share)} % of those that an example keeps."
    )
    share = shares.get("memorized")
    if share is None:
        return [first]
    if share > localization.kept_share:
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
        kinds = localization.kinds.items()
        edited = {kind: result.edited.examples for kind, result in kinds if result.edited}
        sentences.append(
            f"{NAMES[model]}: ".capitalize()
            + ", ".join(
                f"{result.localized} of {result.fitted} {KIND_NAMES[kind]} examples that it fits were searched "
                f"({statuses(result)}), accuracy measured after the units of {edited.get(kind, 0)}"
                for kind, result in kinds
            )
            + f", on at most {EVALUATED} examples of each kind. The search took {_times(localization)}."
        )
    return sentences


def statuses(result: KindLocalization) -> str:
    """Return how the searches of a kind ended, such as ``98 of 100 flipped``."""
    counts = result.statuses
    text = f"{counts[FLIPPED]} of {result.localized} flipped"
    if counts[CAPPED]:
        text += f", {counts[CAPPED]} not within the limit"
    if counts[EXHAUSTED]:
        text += f", {counts[EXHAUSTED]} not with all units off"
    if counts[ALREADY_WRONG]:
        text += f", {counts[ALREADY_WRONG]} wrong already"
    return text


def _times(localization: DatasetLocalization) -> str:
    return f"{1000 * localization.seconds:.0f} ms per example"


def _units(result: KindLocalization) -> str:
    """Return the number of units that flip an example, of which searches without a flip give a lower bound alone."""
    if result.median is None:
        return "unknown"
    median = f"{result.median:g}"
    return f"{median} in the median" if result.mean is None else f"{result.mean:.2f} on average (median {median})"
