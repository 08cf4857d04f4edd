"""What a rewinding says, in sentences with its numbers."""

from __future__ import annotations

from memloc_ext.probes import Rewinding
from memloc_ext.study.report.figures import percent
from memloc_ext.study.report.section import Number

PAPER = "The paper: most layer groups can be rewound a long way without losing the memorized examples."
HALF, MOST = 0.5, 0.9
"""Shares of the accuracy on memorized examples that count as kept."""


def answers(rewinding: Rewinding) -> list[str]:
    """Return what becomes of the memorized examples, in sentences; none if there are none that the model fits."""
    if not rewinding.unchanged.memorized or not rewinding.groups:
        return []
    first, last = rewinding.epochs[0], rewinding.epochs[-1]
    sentences = [_kept(rewinding, first), _worst(rewinding, first), _paper(rewinding, first, last)]
    if any(result.has_buffers for result in rewinding.groups.values()):
        sentences.insert(2, _without_buffers(rewinding, first))
    return sentences


def numbers(rewinding: Rewinding) -> list[Number]:
    """Return in how many groups the memorized examples survive being put back to the first and to the last epoch."""
    if not rewinding.unchanged.memorized or not rewinding.groups:
        return []
    return [
        Number(
            f"rewinding to {_when(epoch)}: layer groups that keep 90 % of the memorized accuracy",
            len(keeping(rewinding, epoch, MOST)) / len(rewinding.groups),
            "%",
            "most, a long way",
        )
        for epoch in dict.fromkeys((rewinding.epochs[0], rewinding.epochs[-1]))
    ]


def keeping(rewinding: Rewinding, epoch: int, share: float, *, buffers: bool = True) -> list[str]:
    """Name the layer groups that can be put back to an epoch with a share of the memorized accuracy kept.

    Args:
        rewinding: With memorized examples.
        epoch: One of its epochs.
        share: Of the accuracy, given label, of the model as it is, in ``[0, 1]``.
        buffers: Whether batch-norm statistics are put back too.
    """
    least = share * (rewinding.unchanged.memorized or 0.0)
    return [group for group in rewinding.groups if _memorized(rewinding, group, epoch, buffers) >= least]


def _kept(rewinding: Rewinding, epoch: int) -> str:
    half, most, number = keeping(rewinding, epoch, HALF), keeping(rewinding, epoch, MOST), len(rewinding.groups)
    names = f" ({', '.join(most)})" if most else ""
    return (
        f"With one layer group put back to {_when(epoch)}, batch-norm statistics included, {len(half)} of {number} "
        f"groups keep at least half of the accuracy on memorized examples, which is {_percent(rewinding)} % in the "
        f"model as it is; {len(most)} of {number} keep at least 90 % of it{names}."
    )


def _worst(rewinding: Rewinding, epoch: int) -> str:
    worst = min(rewinding.groups, key=lambda group: _memorized(rewinding, group, epoch))
    found = rewinding.groups[worst].at(epoch).with_buffers
    return (
        f"Most is lost with {worst}: accuracy falls from {_percent(rewinding)} to {percent(found.memorized)} % on "
        f"memorized, from {percent(rewinding.unchanged.clean)} to {percent(found.clean)} % on clean examples."
    )


def _without_buffers(rewinding: Rewinding, epoch: int) -> str:
    most = keeping(rewinding, epoch, MOST, buffers=False)
    return (
        f"If the batch-norm statistics stay as they are, {len(most)} of {len(rewinding.groups)} groups can be put back "
        f"to {_when(epoch)} with at least 90 % of it kept."
    )


def _paper(rewinding: Rewinding, first: int, last: int) -> str:
    number = len(rewinding.groups)
    early, late = len(keeping(rewinding, first, MOST)), len(keeping(rewinding, last, MOST))
    if 2 * early > number:
        return f"{PAPER} So it is here, as far back as {_when(first)}."
    if 2 * late > number:
        return (
            f"{PAPER} Here that holds as far back as epoch {_earliest(rewinding)}, for most groups and 90 % of the "
            f"accuracy, but not for {_when(first)}."
        )
    return (
        f"{PAPER} This differs here: even at epoch {last}, the last one tried, only {late} of {number} groups keep 90 "
        "% of the accuracy on memorized examples."
    )


def _earliest(rewinding: Rewinding) -> int:
    """Return the epoch from which on most groups keep nearly all."""
    found = rewinding.epochs[-1]
    for epoch in reversed(rewinding.epochs):
        if 2 * len(keeping(rewinding, epoch, MOST)) <= len(rewinding.groups):
            break
        found = epoch
    return found


def _memorized(rewinding: Rewinding, group: str, epoch: int, buffers: bool = True) -> float:
    found = rewinding.groups[group].at(epoch)
    return (found.with_buffers if buffers else found.without_buffers).memorized or 0.0


def _percent(rewinding: Rewinding) -> str:
    return percent(rewinding.unchanged.memorized)


def _when(epoch: int) -> str:
    return "its initialisation" if epoch == 0 else f"epoch {epoch}"
