"""What a gradient accounting says, in sentences with its numbers."""

from __future__ import annotations

import statistics

from memloc_ext.study.accounting import Accounting
from memloc_ext.study.report.figures import percent
from memloc_ext.study.report.section import Number


def answers(accounting: Accounting) -> list[str]:
    """Return what an accounting says; nothing if no example is memorized."""
    found = _Found.of(accounting)
    if found is None:
        return []
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
    return sentences


def numbers(accounting: Accounting) -> list[Number]:
    """Return the numbers of these sentences."""
    found = _Found.of(accounting)
    if found is None:
        return []
    return [
        Number("share of memorized examples in the gradient norm, peak epoch", found.share, "%", "about half"),
        Number("cosine of clean and memorized gradient, mean over the epochs", found.cosine, "", "strongly negative"),
        Number("area under the ROC curve of the examples' gradient norms, best epoch", found.auc, ""),
    ]


def cost(accounting: Accounting | None) -> list[str]:
    """Return what an accounting cost, in a sentence; none without one."""
    if accounting is None:
        return []
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
        told = [value for value in auc if value is not None]
        self.auc: float | None = max(told, default=None)
        self.auc_epoch: int | None = accounting.epochs[auc.index(self.auc)] if told else None

    @classmethod
    def of(cls, accounting: Accounting) -> _Found | None:
        """Return the numbers of an accounting; None if no example is memorized."""
        return cls(accounting) if any(accounting.column("memorized")) else None
