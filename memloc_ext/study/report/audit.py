"""The audits: which training examples are suspect, and how well each score finds those that are known to be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memloc_ext.probes import Audit
from memloc_ext.study.audited import AuditedExamples
from memloc_ext.study.report.figures import NAMES
from memloc_ext.study.report.section import Number, Section, Table, percent

_FEW = 5
"""Most suspect examples in a terminal."""
_QUALITY = {"auc": "area under ROC", "precision": "precision at n", "restored": "true labels restored"}


def section(audits: Mapping[str, AuditedExamples]) -> Section:
    """Return the section on the audits, one per model."""
    return Section(
        name="audit",
        title="Which examples are suspect?",
        method="Every training example is scored by what the training left behind: gradient norms, losses and margins "
        "of all epochs, and what the memorization channels of example-tied dropout do to its loss. A higher score is "
        "more suspect. The suggested label is what the network predicts without memorization channels, or else what it "
        "predicted before it memorized.",
        answers=answers(audits),
        pictures=[],
        tables=[table for model, audited in audits.items() for table in tables(NAMES[model], audited)],
        notes=["audit.csv has all training examples; memloc audit --score NAME ranks them by another score."],
    )


def answers(audits: Mapping[str, AuditedExamples]) -> list[str]:
    """Return how well the ranking of each audit finds the memorized examples; nothing if none is known."""
    sentences = []
    for model, row in _chosen(audits).items():
        restored = f"; {percent(row['restored'])} % of the true labels are suggested there"
        sentences.append(
            f"{NAMES[model].capitalize()}: of the examples that rank highest by {row['score']}, as many as there are "
            f"memorized ones, {percent(row['precision'])} % are memorized"
            + ("." if row["restored"] is None else f"{restored}.")
        )
    return sentences


def numbers(audits: Mapping[str, AuditedExamples]) -> list[Number]:
    """Return the numbers of these sentences, and the areas under the ROC curves."""
    found = []
    for model, row in _chosen(audits).items():
        name = f"audit of {NAMES[model]}, {row['score']}"
        found.append(Number(f"{name}: area under the ROC curve of the memorized examples", row["auc"], ""))
        found.append(Number(f"{name}: memorized ones among the highest, as many as there are", row["precision"]))
        found += [] if row["restored"] is None else [Number(f"{name}: true labels restored there", row["restored"])]
    return found


def tables(name: str, audited: AuditedExamples) -> list[Table]:
    """Return how well each score does, if that is known, and the most suspect examples."""
    found, quality = audited.found, _quality(name, audited.found)
    scores = [score.removeprefix("score_") for score in found.scores]
    rows = [
        [shown, str(row["rank"]), str(row["index"]), *_labels(row), *(f"{row[score]:.3g}" for score in found.scores)]
        for row, shown in zip(found.top(len(audited.shown)), audited.shown, strict=True)
    ]
    title = f"Most suspect examples, {name}, by {found.score}"
    return [*quality, Table(title, ["", "rank", "index", "label", "suggested", *scores], rows)]


def summary(audits: Mapping[str, AuditedExamples]) -> list[str]:
    """Return the few most suspect examples of each audit, and how well each score does, as text."""
    lines = []
    for model, audited in audits.items():
        found, name = audited.found, NAMES[model]
        rows = [[str(row["index"]), *_labels(row), f"{row[found.score]:.3g}"] for row in found.top(_FEW)]
        heads = ["index", "label", "suggested", found.score]
        top = Table(f"Most suspect examples, {name}; all are in {audited.table}", heads, rows)
        lines += [f"\n{table.text()}" for table in (*_quality(name, found), top)]
    return lines


def _quality(name: str, found: Audit) -> list[Table]:
    quality = found.quality()
    heads = {column: head for column, head in _QUALITY.items() if any(row[column] is not None for row in quality)}
    rows = [[row["score"], *(f"{row[column]:.4f}" for column in heads)] for row in quality]
    title = f"What each score finds of n memorized examples, {name}"
    return [Table(title, ["share", *heads.values()], rows)] if rows else []


def _labels(row: Mapping[str, object]) -> list[str]:
    return ["-" if row[name] is None else str(row[name]) for name in ("label", "suggested")]


def _chosen(audits: Mapping[str, AuditedExamples]) -> dict[str, Mapping[str, Any]]:
    """Return the quality of the score that ranks, where it is known."""
    pairs = [(model, row) for model, audited in audits.items() for row in audited.found.quality()]
    return {model: row for model, row in pairs if row["score"] == audits[model].found.score}
