"""The localization of a model on disk: a table of the examples, and a summary."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from memloc_ext.files import parsed, read_as, write_json, write_table
from memloc_ext.probes.localization.dataset import (
    KINDS,
    STATUSES,
    DatasetLocalization,
    KindLocalization,
    LocalizedExample,
    LocalizedSite,
)

LOCALIZATION = "localization"
"""Name of the table of the examples."""
SUMMARY = "localization_summary.json"
_COLUMNS = ("example", "kind", "status", "num_units", "units", "loss")


def save_localization(folder: Path, localization: DatasetLocalization) -> None:
    """Write a localization into the folder of a model, the summary last: where it is, all of it is.

    The table has a row per example: ``example``, ``kind``, ``status``, ``num_units``, ``units``, which are
    ``site:unit`` joined by spaces in the order in which they were switched off, and ``loss`` after that. The summary
    holds the other attributes of `DatasetLocalization`.
    """
    rows = [
        {
            "example": row.example,
            "kind": row.kind,
            "status": row.status,
            "num_units": len(row.units),
            "units": " ".join(f"{site}:{unit}" for site, unit in row.units),
            "loss": row.loss,
        }
        for row in localization.examples
    ]
    write_table(folder, LOCALIZATION, rows)
    summary = asdict(localization)
    del summary["examples"]
    write_json(folder / SUMMARY, summary, sealed=True)


def load_localization(folder: Path) -> DatasetLocalization:
    """Read what `save_localization` wrote.

    Raises:
        ValueError: If a file is damaged; names it.
        OSError: If one cannot be read, such as FileNotFoundError.
    """
    summary = read_as(folder / SUMMARY, "the summary of a localization", _summary)
    sizes = {site.name: site.units for site in summary.sites}

    def table(rows: Any) -> list[LocalizedExample]:
        examples = [_example(row, sizes) for row in rows]
        counts = Counter(row.kind for row in examples)
        if counts != {name: kind.localized for name, kind in summary.kinds.items() if kind.localized}:
            raise ValueError(f"{SUMMARY} counts other examples")
        return examples

    return replace(
        summary, examples=read_as(folder / f"{LOCALIZATION}.json", f"a table of {', '.join(_COLUMNS)}", table)
    )


def _summary(stored: Any) -> DatasetLocalization:
    sites = parsed(list[LocalizedSite], stored["sites"])
    kinds = {kind: parsed(KindLocalization, stored["kinds"][kind]) for kind in KINDS if kind in stored["kinds"]}
    names = {site.name for site in sites}
    if (
        not sites
        or not kinds
        or any(set(kind.statuses) != set(STATUSES) or set(kind.sites) != names for kind in kinds.values())
    ):
        raise ValueError("a part is missing")
    return DatasetLocalization([], sites, kinds, parsed(float, stored["seconds"]))


def _example(row: Any, sizes: dict[str, int]) -> LocalizedExample:
    if set(row) != set(_COLUMNS) or row["kind"] not in KINDS or row["status"] not in STATUSES:
        raise ValueError(f"got the row {row}")
    units = [(site, int(unit)) for site, unit in (pair.rsplit(":", 1) for pair in row["units"].split())]
    if len(units) != row["num_units"] or any(not 0 <= unit < sizes[site] for site, unit in units):
        raise ValueError(f"got the units {row['units']!r}")
    return LocalizedExample(parsed(int, row["example"]), row["kind"], row["status"], units, parsed(float, row["loss"]))
