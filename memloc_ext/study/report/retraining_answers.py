"""What a retraining says, in sentences with its numbers."""

from __future__ import annotations

from memloc_ext.probes import Retraining
from memloc_ext.probes.retraining import FITTED
from memloc_ext.study.report.figures import percent
from memloc_ext.study.report.section import Number

PAPER = (
    "The paper: for most layer groups, accuracy on memorized examples comes back, so that these groups are redundant "
    "for memorization; the others are in general not the last."
)
MOST = 0.9
"""Share of the accuracy on memorized examples that counts as come back."""


def answers(retraining: Retraining) -> list[str]:
    """Return what comes back of the memorized examples, in sentences; none if there are none that the model fits."""
    if not retraining.unchanged.memorized or not retraining.groups:
        return []
    return [_regained(retraining), _least(retraining), _fitted(retraining), _paper(retraining)]


def numbers(retraining: Retraining) -> list[Number]:
    """Return in how many groups the memorized examples come back."""
    if not retraining.unchanged.memorized or not retraining.groups:
        return []
    share = len(regaining(retraining)) / len(retraining.groups)
    return [Number("retraining: layer groups that end with 90 % of the memorized accuracy", share, "%", "most")]


def regaining(retraining: Retraining) -> list[str]:
    """Name the layer groups after whose training at least 90 % of the memorized accuracy is there."""
    return [group for group in retraining.groups if _memorized(retraining, group) >= _enough(retraining)]


def _regained(retraining: Retraining) -> str:
    groups = regaining(retraining)
    never = [group for group in groups if _memorized(retraining, group, 0) >= _enough(retraining)]
    names = f" ({', '.join(groups)})" if groups else ""
    kept = f"; {len(never)} of these had not lost it at their initial weights" if never else ""
    return (
        "With one layer group at its initial weights and trained anew, alone and on clean examples only, at least 90 % "
        f"of the accuracy on memorized examples ({percent(retraining.unchanged.memorized)} % before) is there again "
        f"for {len(groups)} of {len(retraining.groups)} groups{names}, though no memorized example was seen{kept}."
    )


def _least(retraining: Retraining) -> str:
    least = _lowest(retraining)
    first, last = (retraining.groups[least].epochs[i].accuracy for i in (0, -1))
    return (
        f"Least is there with {least}: {percent(last.memorized)} % on memorized examples "
        f"({percent(first.memorized)} % before its training), {percent(last.clean)} % on clean ones."
    )


def _fitted(retraining: Retraining) -> str:
    fitted = sum(result.stopped == FITTED for result in retraining.groups.values())
    epochs = [len(result.epochs) - 1 for result in retraining.groups.values()]
    others = "" if fitted == len(epochs) else ", the others after all their epochs"
    return (
        f"{fitted} of {len(epochs)} trainings ended because every clean example was fitted{others}; they took "
        f"{min(epochs)} to {max(epochs)} epochs."
    )


def _paper(retraining: Retraining) -> str:
    number, back = len(retraining.groups), len(regaining(retraining))
    *_, last = retraining.groups
    agrees = "So it is here" if 2 * back > number else f"This differs here: it does for {back} of {number}"
    if back == number:
        return f"{PAPER} So it is here, for every group."
    place = "the last group is among those" if last not in regaining(retraining) else "the last group is none of those"
    return f"{PAPER} {agrees}; {place} for which it does not."


def _lowest(retraining: Retraining) -> str:
    return min(retraining.groups, key=lambda group: _memorized(retraining, group))


def _enough(retraining: Retraining) -> float:
    return MOST * (retraining.unchanged.memorized or 0.0)


def _memorized(retraining: Retraining, group: str, epoch: int = -1) -> float:
    return retraining.groups[group].epochs[epoch].accuracy.memorized or 0.0
