"""The localization of a model on disk: a table of the examples, and a summary."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from memloc_ext.analysis.localization.dataset import (
    KINDS,
    STATUSES,
    DatasetLocalization,
    KindLocalization,
    LocalizedExample,
    LocalizedSite,
)
from memloc_ext.files import parsed, read_json, write_json, write_table

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
    write_json(folder / SUMMARY, summary)


def load_localization(folder: Path) -> DatasetLocalization:
    """Read what `save_localization` wrote.

    Raises:
        ValueError: If a file is damaged; names it.
        OSError: If one cannot be read, such as FileNotFoundError.
    """
    summary = folder / SUMMARY
    stored = read_json(summary)
    try:
        sites = [parsed(LocalizedSite, site) for site in stored["sites"]]
        kinds = {kind: parsed(KindLocalization, stored["kinds"][kind]) for kind in KINDS if kind in stored["kinds"]}
        seconds = parsed(float, stored["seconds"])
        names = {site.name for site in sites}
        if (
            not sites
            or not kinds
            or any(set(kind.statuses) != set(STATUSES) or set(kind.sites) != names for kind in kinds.values())
        ):
            raise ValueError("a part is missing")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{summary}: must be the summary of a localization: {error}") from error
    table = folder / f"{LOCALIZATION}.json"
    rows = read_json(table)
    try:
        examples = [_example(row, {site.name: site.units for site in sites}) for row in rows]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{table}: must be a table of {', '.join(_COLUMNS)}: {error}") from error
    return DatasetLocalization(examples, sites, kinds, seconds)


def _example(row: Any, sizes: dict[str, int]) -> LocalizedExample:
    if set(row) != set(_COLUMNS) or row["kind"] not in KINDS or row["status"] not in STATUSES:
        raise ValueError(f"got the row {row}")
    units = [(site, int(unit)) for site, unit in (pair.rsplit(":", 1) for pair in row["units"].split())]
    if len(units) != row["num_units"] or any(not 0 <= unit < sizes[site] for site, unit in units):
        raise ValueError(f"got the units {row['units']}")
    return LocalizedExample(parsed(int, row["example"]), row["kind"], row["status"], units, parsed(float, row["loss"]))
