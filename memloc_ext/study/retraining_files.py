"""A retraining on disk: one table, as CSV and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memloc_ext.files import parsed, read_as, write_table
from memloc_ext.probes import GroupRetraining, RetrainedEpoch, Retraining
from memloc_ext.probes.retraining import STOPPED
from memloc_ext.study.rewinding_files import SHARES, UNCHANGED, parsed_accuracy, split_rows

RETRAINING = "retraining"
"""Name of the table."""
_COLUMNS = ("group", "epoch", "loss", *SHARES, "stopped")


def save_retraining(folder: Path, retraining: Retraining) -> None:
    """Write a retraining into the folder of a model.

    The table has a row for the model as it is, whose group is ``"(unchanged)"`` and which has no epoch, then one per
    layer group and epoch, from 0 on: ``loss`` (None in epoch 0), the columns of `Accuracy` in ``[0, 1]``, and in the
    last row of each group in ``stopped`` why that was the last.
    """
    nothing = {"epoch": None, "loss": None}
    rows = [{"group": UNCHANGED, **nothing, **retraining.unchanged.shares(), "stopped": None}]
    for group, result in retraining.groups.items():
        for record in result.epochs:
            numbers = {"epoch": record.epoch, "loss": record.loss, **record.accuracy.shares()}
            stopped = result.stopped if record is result.epochs[-1] else None
            rows.append({"group": group, **numbers, "stopped": stopped})
    write_table(folder, RETRAINING, rows)


def load_retraining(folder: Path) -> Retraining:
    """Read what `save_retraining` wrote.

    Raises:
        ValueError: If the file is damaged; names it.
        OSError: If it cannot be read, such as FileNotFoundError.
    """
    return read_as(folder / f"{RETRAINING}.json", f"a table of {', '.join(_COLUMNS)}", _retraining)


def _retraining(rows: Any) -> Retraining:
    unchanged, groups = split_rows(rows, _COLUMNS)
    return Retraining(unchanged, {group: _group(found) for group, found in groups.items()})


def _group(rows: list[Mapping[str, Any]]) -> GroupRetraining:
    *before, stopped = (row["stopped"] for row in rows)
    if stopped not in STOPPED or any(value is not None for value in before):
        raise ValueError(f"got {[*before, stopped]} for stopped")
    epochs = [RetrainedEpoch(parsed(int, row["epoch"]), _loss(row), parsed_accuracy(row)) for row in rows]
    if [record.epoch for record in epochs] != list(range(len(rows))):
        raise ValueError(f"got the epochs {[record.epoch for record in epochs]}")
    return GroupRetraining(epochs, stopped)


def _loss(row: Mapping[str, Any]) -> float | None:
    loss = row["loss"]
    if (loss is None) != (row["epoch"] == 0):
        raise ValueError(f"got the loss {loss!r} in epoch {row['epoch']}")
    return parsed(float | None, loss)
