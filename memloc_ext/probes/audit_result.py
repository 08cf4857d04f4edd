"""What an audit found: scores, ranks and suggested labels, and how well they find what is known to be wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from memloc_ext.probes.account_epoch import roc_auc


@dataclass(frozen=True)
class Audit:
    """How memorized each of N training examples is; lists are ``[N]``, in ascending order of the examples' numbers.

    Attributes:
        score: The one of ``scores`` that ranks the examples.
        indices: Number of each example.
        labels: Its label; None unless the task is classification.
        suggested: The label that is suggested in its place, often the same; None likewise.
        scores: Name, ``score_*``, to the score of each example; higher is more memorized or suspect.
        memorized: Whether it is marked as memorized; None where that is not known.
        true_labels: Its label before any noise; None where that is not known.
    """

    score: str
    indices: list[int]
    labels: list[int] | None
    suggested: list[int] | None
    scores: dict[str, list[float]]
    memorized: list[bool] | None = None
    true_labels: list[int] | None = None

    def __post_init__(self) -> None:
        columns = [self.labels, self.suggested, self.memorized, self.true_labels, *self.scores.values()]
        if self.score not in self.scores or any(c is not None and len(c) != len(self.indices) for c in columns):
            raise ValueError("Audit: score must be among scores, and every list have a value for each example")

    def rows(self) -> list[dict[str, Any]]:
        """Return a row per example, in the order of their numbers.

        The keys are ``index``; ``label`` and ``suggested``, None unless the task is classification; every ``score_*``;
        and ``rank`` by the chosen score, from 1, the most suspect, to N. Of equal scores the lower number comes first.
        """
        ranks = {place: rank for rank, place in enumerate(self._order(self.score), 1)}
        labels, suggested = (column or [None] * len(self.indices) for column in (self.labels, self.suggested))
        return [
            {
                "index": index,
                "label": labels[i],
                "suggested": suggested[i],
                **{name: values[i] for name, values in self.scores.items()},
                "rank": ranks[i],
            }
            for i, index in enumerate(self.indices)
        ]

    def top(self, n: int = 50) -> list[dict[str, Any]]:
        """Return the rows of the n most suspect examples, by rank."""
        return sorted(self.rows(), key=lambda row: row["rank"])[:n]

    def quality(self) -> list[dict[str, Any]]:
        """Return how well each score finds the marked examples, a row per score; none if no example is marked.

        The keys are ``score``; ``auc``: area under the ROC curve; ``precision``: share of marked ones among the n most
        suspect, n being the number of marked ones; ``restored``: share of the marked examples with a wrong label that
        are among these n and whose suggested label is the true one, None where true labels are not known or not
        different.
        """
        marks = self.memorized or []
        n, wrong, back, rows = sum(marks), 0, set(), []
        if self.labels is not None and self.suggested is not None and self.true_labels is not None:
            columns = enumerate(zip(marks, self.labels, self.suggested, self.true_labels, strict=False))
            told = {i: suggested == true for i, (mark, label, suggested, true) in columns if mark and label != true}
            wrong, back = len(told), {i for i, right in told.items() if right}
        for name, values in self.scores.items() if n else ():
            top = self._order(name)[:n]
            restored = len(back.intersection(top)) / wrong if wrong else None
            auc = roc_auc(torch.tensor(values, dtype=torch.float64), torch.tensor(marks))
            precision = sum(marks[i] for i in top) / n
            rows.append({"score": name, "auc": auc, "precision": precision, "restored": restored})
        return rows

    def _order(self, score: str) -> list[int]:
        """Return the places of the examples, the most suspect first."""
        values = self.scores[score]
        return sorted(range(len(values)), key=lambda i: -values[i])
