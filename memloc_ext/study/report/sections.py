"""What a run says: the sections of its report, its numbers, and the text for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from memloc_ext.study.report import accounting, accuracies, figures, localization, retraining, rewinding
from memloc_ext.study.report.section import Number, Section, percent
from memloc_ext.study.run import Run

_COLUMNS = {"clean": "clean", "memorized": "memorized", "memorized_true": "memorized -> true", "test": "test"}


def _probed(run: Run) -> list[tuple[Any, Any]]:
    """Return the modules of this package that tell of a probe, each with what the probe found."""
    found = {accounting: run.accounting, rewinding: run.rewinding, retraining: run.retraining}
    return [(module, result) for module, result in {**found, localization: run.localizations}.items() if result]


def sections(run: Run) -> list[Section]:
    """Return a section for everything that is finished of a run, in the order of the paper."""
    probed = [module.section(result) for module, result in _probed(run)]
    found = [accuracies.memorization(run), *probed, accuracies.dropout(run)]
    return [section for section in found if section is not None]


def numbers(run: Run) -> list[Number]:
    """Return every number of a run that a report compares with the paper's."""
    probed = [number for module, result in _probed(run) for number in module.numbers(result)]
    dropped = accuracies.dropout_numbers(run.metrics, run.mislabelled)
    return [*accuracies.plain_numbers(run.metrics), *probed, *dropped]


def text_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of a run as text: a row per model and mode, accuracy in percent."""
    cells = [["accuracy (%)", *_COLUMNS.values()]]
    cells += [[figures.row_name(row), *(percent(row[column]) for column in _COLUMNS)] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def summary(run: Run) -> list[str]:
    """Return what a run says besides its table, in a few lines."""
    return [*(accounting.cost(run.accounting) if run.accounting else []), *localization.summary(run.localizations)]
