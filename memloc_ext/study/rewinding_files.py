"""A rewinding on disk: one table, as CSV and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memloc_ext.files import parsed, read_as, write_table
from memloc_ext.probes import Accuracy, GroupRewinding, Rewinding, RewoundAccuracy
from memloc_ext.probes.evaluation import PARTS

REWINDING = "rewinding"
"""Name of the table."""
UNCHANGED = "(unchanged)"
"""The layer group, in the table, of the model as it is."""
SHARES = PARTS
"""The columns of an `Accuracy`."""
_COLUMNS = ("group", "epoch", "buffers", *SHARES)


def save_rewinding(folder: Path, rewinding: Rewinding) -> None:
    """Write a rewinding into the folder of a model.

    The table has a row for the model as it is, whose group is ``"(unchanged)"`` and which has no epoch, then two per
    layer group and epoch: with ``buffers`` true, the group's batch-norm statistics are put back too. A group without
    such has one row per epoch and None there. The other columns are those of `Accuracy`, in ``[0, 1]``.
    """
    rows: list[dict[str, Any]] = [_row(UNCHANGED, None, None, rewinding.unchanged)]
    for group, result in rewinding.groups.items():
        for found in result.epochs:
            if result.has_buffers:
                rows.append(_row(group, found.epoch, False, found.without_buffers))
                rows.append(_row(group, found.epoch, True, found.with_buffers))
            else:
                rows.append(_row(group, found.epoch, None, found.with_buffers))
    write_table(folder, REWINDING, rows)


def load_rewinding(folder: Path) -> Rewinding:
    """Read what `save_rewinding` wrote.

    Raises:
        ValueError: If the file is damaged; names it.
        OSError: If it cannot be read, such as FileNotFoundError.
    """
    return read_as(folder / f"{REWINDING}.json", f"a table of {', '.join(_COLUMNS)}", _rewinding)


def parsed_accuracy(row: Mapping[str, Any]) -> Accuracy:
    """Return the shares in a row of a table; ValueError if one is no share."""
    return Accuracy(*(parsed(float | None, row[name]) for name in SHARES))


def split_rows(rows: Any, columns: tuple[str, ...]) -> tuple[Accuracy, dict[str, list[Mapping[str, Any]]]]:
    """Return the accuracy of the model as it is and the rows of each layer group.

    Raises:
        ValueError: If a row has other columns, the first is not of the model as it is, or a group's are not together.
    """
    if not isinstance(rows, list) or any(not isinstance(row, dict) or set(row) != set(columns) for row in rows):
        raise ValueError("a row has other columns")
    if not rows or rows[0]["group"] != UNCHANGED or rows[0]["epoch"] is not None:
        raise ValueError(f"the first row must be {UNCHANGED}")
    groups: dict[str, list[Mapping[str, Any]]] = {}
    last = UNCHANGED
    for row in rows[1:]:
        group = row["group"]
        if not isinstance(group, str) or group == UNCHANGED or (group in groups and group != last):
            raise ValueError(f"got the group {group!r} there")
        groups.setdefault(group, []).append(row)
        last = group
    return parsed_accuracy(rows[0]), groups


def _rewinding(rows: Any) -> Rewinding:
    unchanged, groups = split_rows(rows, _COLUMNS)
    result = Rewinding(unchanged, {group: _group(found) for group, found in groups.items()})
    for group, found in result.groups.items():
        epochs = [cell.epoch for cell in found.epochs]
        if epochs != sorted(set(epochs)) or epochs != result.epochs:
            raise ValueError(f"got the epochs {epochs} for {group}")
    return result


def _group(rows: list[Mapping[str, Any]]) -> GroupRewinding:
    kinds = [row["buffers"] for row in rows]
    has_buffers = kinds[0] is not None
    step = 2 if has_buffers else 1
    expected = [False, True] if has_buffers else [None]
    if len(rows) % step or any(kind is not expected[i % step] for i, kind in enumerate(kinds)):
        raise ValueError(f"got {kinds} for buffers")
    cells = []
    for first, second in zip(rows[::step], rows[step - 1 :: step], strict=True):
        if first["epoch"] != second["epoch"]:
            raise ValueError(f"got epoch {second['epoch']} beside {first['epoch']}")
        without = parsed_accuracy(first)
        cells.append(RewoundAccuracy(parsed(int, first["epoch"]), parsed_accuracy(second), without))
    return GroupRewinding(has_buffers, cells)


def _row(group: str, epoch: int | None, buffers: bool | None, found: Accuracy) -> dict[str, Any]:
    return {"group": group, "epoch": epoch, "buffers": buffers, **found.shares()}
