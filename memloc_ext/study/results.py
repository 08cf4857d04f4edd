"""What a stage found, in the files of its folder: JSON that is read back, and the same as a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from memloc_ext.files import write_csv, write_json
from memloc_ext.probes import Accuracy, Audit, DatasetLocalization, Retraining, Rewinding
from memloc_ext.probes.localization.dataset import KINDS, STATUSES
from memloc_ext.probes.retraining import STOPPED
from memloc_ext.study.accounting import AccountedEpoch
from memloc_ext.study.audited import AuditedExamples
from memloc_ext.study.shipped import Shipped
from memloc_ext.study.store import Result

HISTORY, METRICS = "history", "metrics"
ACCOUNTING, PARAMETERS, COST = "accounting", "accounting_parameters", "accounting_cost"
REWINDING, RETRAINING, LOCALIZATION = "rewinding", "retraining", "localization"
AUDIT, AUDIT_EXAMPLES = "audit", "audit_examples"
SHIPPED = "shipped"
COSTS = {"plain_step", "accounted_step", "step_ratio", "epoch_end", "ratio", "pairs"}
MODEL = "(model)"
"""The layer group, in a table, of all parameters together."""
AS_TRAINED = "as trained"
"""The mode, in a table, of a model that has only one."""
TOKENS = {part: f"{part}_tokens" for part in ("clean", "memorized", "test")}
"""Part to the column, in a table, of the share of right ones among its labelled tokens."""


def save(folder: Path, name: str, result: Any, rows: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write a result as ``<name>.json``, and as the table ``<name>.csv`` if there are rows."""
    if rows:
        write_csv(folder / f"{name}.csv", rows)
    write_json(folder / f"{name}.json", result, sort_keys=False)


def metrics_rows(model: str, modes: Mapping[str, Accuracy]) -> list[dict[str, Any]]:
    """Return a row per mode of a model: shares of right examples, and of right tokens if there are tokens."""
    rows = []
    for mode, found in modes.items():
        tokens = {name: found.tokens[part] for part, name in TOKENS.items() if part in found.tokens}
        rows.append({"model": model, "mode": mode, **found.shares(), **tokens})
    return rows


def accounting_rows(table: Sequence[AccountedEpoch]) -> list[dict[str, Any]]:
    """Return a row per epoch and layer group; group ``"(model)"`` is all parameters together."""
    rows = [(row.epoch, group, found) for row in table for group, found in {**row.groups, MODEL: row.model}.items()]
    return [{"epoch": epoch, "group": group, **asdict(found)} for epoch, group, found in rows]


def parameter_rows(table: Sequence[AccountedEpoch]) -> list[dict[str, Any]]:
    """Return a row per epoch and parameter."""
    return [
        {"epoch": row.epoch, "parameter": name, **asdict(found)}
        for row in table
        for name, found in row.parameters.items()
    ]


def localization_rows(localization: DatasetLocalization) -> list[dict[str, Any]]:
    """Return a row per example: those of the library, the numbers of the units in their sites, and the last loss."""
    numbers = [" ".join(str(unit) for _, unit in example.units) for example in localization.examples]
    pairs = zip(localization.rows(), numbers, localization.examples, strict=True)
    return [{**row, "unit_numbers": units, "loss": example.loss} for row, units, example in pairs]


TABLES: dict[type, tuple[str, Callable[[Any], Sequence[Mapping[str, Any]]]]] = {
    Rewinding: (REWINDING, Rewinding.rows),
    Retraining: (RETRAINING, Retraining.rows),
    DatasetLocalization: (LOCALIZATION, localization_rows),
    Audit: (AUDIT, Audit.rows),
}
"""What a probe finds to the name of its file, and to the rows of its table."""


def load_history(result: Result, folder: str = "") -> list[dict[str, float]]:
    """Read the records of a training; as all here, ValueError names a damaged file."""
    name = f"{folder}{HISTORY}.json"
    records = result.read(name, list[dict[str, int | float]])
    if not records or [record.get("epoch") for record in records] != list(range(len(records))):
        raise ValueError(f"{result.path / name}: must hold a record per epoch, numbered from 0 on")
    return records


def load_metrics(result: Result, folder: str = "") -> dict[str, Accuracy]:
    """Read the accuracy of a model in every mode."""
    modes = result.read(f"{folder}{METRICS}.json", dict[str, Accuracy])
    if not modes:
        raise ValueError(f"{result.path / folder / METRICS}.json: must hold at least one mode, got none")
    return modes


def load_shipped(result: Result) -> Shipped | None:
    """Read what the model costs that is shipped; None if the stage could not make one, or is from before it did."""
    return result.read(f"{SHIPPED}.json", Shipped) if result.has(f"{SHIPPED}.json") else None


def load_accounting(result: Result) -> tuple[list[AccountedEpoch], dict[str, float]]:
    """Read the accounts of the epochs, and what they cost."""
    table = result.read(f"{ACCOUNTING}.json", list[AccountedEpoch])
    if not table or any((row.epoch, list(row.groups)) != (i, list(table[0].groups)) for i, row in enumerate(table, 1)):
        raise ValueError(f"{result.path / ACCOUNTING}.json: every epoch must have every layer group")
    cost = result.read(f"{COST}.json", dict[str, int | float])
    if set(cost) != COSTS:
        raise ValueError(f"{result.path / COST}.json: must hold {', '.join(sorted(COSTS))}, got {', '.join(cost)}")
    return table, cost


def load_rewinding(result: Result) -> Rewinding:
    """Read the rewinding."""
    found = result.read(f"{REWINDING}.json", Rewinding)
    for group, cells in found.groups.items():
        epochs = [cell.epoch for cell in cells.epochs]
        if not epochs or epochs != sorted(set(epochs)) or epochs != found.epochs:
            raise ValueError(f"{result.path / REWINDING}.json: every group must have the same epochs, got {group}")
    return found


def load_retraining(result: Result) -> Retraining:
    """Read the retraining."""
    found = result.read(f"{RETRAINING}.json", Retraining)
    for group, cells in found.groups.items():
        epochs = [record.epoch for record in cells.epochs]
        if not epochs or epochs != list(range(len(epochs))) or cells.stopped not in STOPPED:
            raise ValueError(f"{result.path / RETRAINING}.json: must hold the epochs of {group} and why they ended")
    return found


def load_localization(result: Result) -> DatasetLocalization:
    """Read the localization."""
    found = result.read(f"{LOCALIZATION}.json", DatasetLocalization)
    sizes, kinds = {site.name: site.units for site in found.sites}, found.kinds
    whole = (
        bool(sizes and kinds)
        and all(set(kind.statuses) == set(STATUSES) and set(kind.sites) == set(sizes) for kind in kinds.values())
        and set(kinds) <= set(KINDS)
        and all(row.kind in kinds and row.status in STATUSES for row in found.examples)
        and all(unit < sizes.get(site, 0) for row in found.examples for site, unit in row.units)
        and all(kinds[k].localized == sum(row.kind == k for row in found.examples) for k in kinds)
    )
    if not whole:
        raise ValueError(f"{result.path / LOCALIZATION}.json: its examples, sites and counts do not belong together")
    return found


def load_audit(result: Result) -> AuditedExamples:
    """Read an audit, and what is shown of the most suspect examples."""
    found, shown = result.read(f"{AUDIT}.json", Audit), result.read(f"{AUDIT_EXAMPLES}.json", list[str])
    if not 0 < len(shown) <= len(found.indices):
        raise ValueError(f"{result.path / AUDIT_EXAMPLES}.json: must hold some of {len(found.indices)} examples")
    return AuditedExamples(found, shown, result.path / f"{AUDIT}.csv")
