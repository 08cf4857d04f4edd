"""What a run says, as text for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from memloc_ext.study.report import (
    accounting_answers,
    accuracy_answers,
    figures,
    localization_answers,
    retraining_answers,
    rewinding_answers,
)
from memloc_ext.study.report.figures import percent
from memloc_ext.study.report.section import Number
from memloc_ext.study.run import Run

_COLUMNS = {"clean": "clean", "memorized": "memorized", "memorized_true": "memorized -> true", "test": "test"}


def text_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of a run as text: a row per model and mode, accuracy in percent."""
    cells = [["accuracy (%)", *_COLUMNS.values()]]
    cells += [[figures.row_name(row), *(percent(row[column]) for column in _COLUMNS)] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def summary(run: Run) -> list[str]:
    """Return what a run says besides its table, in a few lines."""
    return [*accounting_answers.cost(run.accounting), *localization_answers.summary(run.localizations)]


def is_mislabelled(run: Run) -> bool:
    """Return whether the memorized examples of a run have wrong labels; if not they are atypical."""
    return run.config.data.memorized is None


def numbers(run: Run) -> list[Number]:
    """Return every number of a run that a report compares with the paper's."""
    found = accuracy_answers.plain_numbers(run.metrics)
    if run.accounting:
        found += accounting_answers.numbers(run.accounting)
    if run.rewinding:
        found += rewinding_answers.numbers(run.rewinding)
    if run.retraining:
        found += retraining_answers.numbers(run.retraining)
    for model, localization in run.localizations.items():
        found += localization_answers.numbers(model, localization)
    return found + accuracy_answers.dropout_numbers(run.metrics, is_mislabelled(run))
