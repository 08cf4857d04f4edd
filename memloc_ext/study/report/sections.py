"""What a run says: the sections of its report, its numbers, and the text for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from memloc_ext.study.report import accounting, accuracies, audit, figures, localization, retraining, rewinding, shipped
from memloc_ext.study.report.section import Number, Section, Table, percent
from memloc_ext.study.run import Run

_COLUMNS = {"clean": "clean", "memorized": "memorized", "memorized_true": "memorized -> true", "test": "test"}


def _probed(run: Run) -> list[tuple[Any, Any]]:
    """Return the modules of this package that tell of a probe, each with what the probe found."""
    found = {accounting: run.accounting, rewinding: run.rewinding, retraining: run.retraining}
    return [(module, result) for module, result in {**found, localization: run.localizations}.items() if result]


def sections(run: Run) -> list[Section]:
    """Return a section for everything that is finished of a run, in the order of the paper."""
    probed = [module.section(result) for module, result in _probed(run)]
    audited = audit.section(run.audits) if run.audits else None
    found = [accuracies.memorization(run), *probed, accuracies.dropout(run), audited]
    return [section for section in found if section is not None]


def numbers(run: Run) -> list[Number]:
    """Return every number of a run that a report compares with the paper's."""
    probed = [number for module, result in _probed(run) for number in module.numbers(result)]
    dropped = accuracies.dropout_numbers(run.metrics, run.mislabelled)
    costs = shipped.numbers(run.shipped) if run.shipped else []
    return [*accuracies.plain_numbers(run.metrics), *probed, *dropped, *costs, *audit.numbers(run.audits)]


def text_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of a run as text: a row per model and mode, accuracy in percent."""
    cells = [[figures.row_name(row), *(percent(row[column]) for column in _COLUMNS)] for row in rows]
    return Table("", ["accuracy (%)", *_COLUMNS.values()], cells).text()


def summary(run: Run) -> list[str]:
    """Return what a run says besides its table, in a few lines."""
    return [
        *(accounting.cost(run.accounting) if run.accounting else []),
        *(shipped.answers(run.shipped) if run.shipped else []),
        *localization.summary(run.localizations),
        *audit.summary(run.audits),
    ]
