"""The gradient accounting of a training on disk: a file per epoch, tables of all epochs, and what it cost."""

from __future__ import annotations

import io
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memloc_ext.files import open_archive, parsed, read_as, read_bytes, write_atomically
from memloc_ext.probes import EpochAccount, GroupAccount, ParameterAccount

ACCOUNTS = "accounting"
"""Folder of the epochs' files, and name of the table per epoch and layer group."""
PARAMETERS = "accounting_parameters"
"""Name of the table per epoch and parameter."""
COST = "accounting_cost.json"
COSTS = ("plain_step", "accounted_step", "step_ratio", "epoch_end", "ratio", "pairs")
"""What is in that file, see `memloc_ext.study.accounted_training.accounting_cost`."""
MODEL = "(model)"
"""The layer group, in the table, of all parameters together."""
_ARRAYS = {
    "norms": ("f4", 2),
    "memorized": ("b1", 1),
    "indices": ("i8", 1),
    "groups": ("U", 1),
    "group_table": ("f8", 2),
    "parameters": ("U", 1),
    "parameter_table": ("f8", 2),
}
"""Name, kind and number of dimensions of the arrays in an epoch's file."""


@dataclass(frozen=True)
class Accounting:
    """The gradient accounting of a finished training.

    Attributes:
        folder: Of the epochs' files.
        rows: ``epoch``, ``group`` and the numbers of a `GroupAccount`; group ``"(model)"`` is all parameters together.
        parameters: ``epoch``, ``parameter`` and the numbers of a `ParameterAccount`.
        cost: What it cost, see `memloc_ext.study.accounted_training.accounting_cost`.
    """

    folder: Path
    rows: list[dict[str, Any]]
    parameters: list[dict[str, Any]]
    cost: dict[str, float]

    @property
    def groups(self) -> list[str]:
        """The layer groups, from input to output."""
        return list(dict.fromkeys(row["group"] for row in self.rows if row["group"] != MODEL))

    @property
    def epochs(self) -> list[int]:
        """The epochs, from 1."""
        return list(dict.fromkeys(row["epoch"] for row in self.rows))

    def column(self, name: str, group: str = MODEL) -> list[Any]:
        """Return a column of the rows of a layer group, one value per epoch."""
        return [row[name] for row in self.rows if row["group"] == group]

    def epoch(self, epoch: int) -> EpochAccount:
        """Read the whole account of an epoch, single examples included.

        Raises:
            ValueError: If its file is damaged; names it.
            OSError: If it cannot be read.
        """
        return load_account(account_path(self.folder, epoch))


def account_path(folder: Path, epoch: int) -> Path:
    """Return the path of the account of an epoch."""
    return folder / f"epoch_{epoch:03d}.npz"


def save_account(path: Path, account: EpochAccount) -> None:
    """Write the account of an epoch, atomically; equal accounts give equal bytes.

    The file holds arrays without Python objects: ``norms`` ``[N, groups]`` float32, ``memorized`` and ``indices``
    ``[N]``, ``groups`` and ``parameters``, which are names, and the numbers of `GroupAccount` (``group_table``, whose
    last row is the whole model; NaN for None) and of `ParameterAccount` (``parameter_table``) in the order of their
    attributes.
    """
    buffer = io.BytesIO()
    np.savez(
        buffer,
        norms=account.example_norms.numpy(),
        memorized=account.memorized.numpy(),
        indices=account.indices.numpy(),
        groups=np.array(list(account.groups)),
        group_table=np.array([astuple(row) for row in (*account.groups.values(), account.model)], dtype=np.float64),
        parameters=np.array(list(account.parameters)),
        parameter_table=np.array([astuple(row) for row in account.parameters.values()]),
    )
    write_atomically(path, buffer.getvalue())


def load_account(path: Path) -> EpochAccount:
    """Read what `save_account` wrote.

    Raises:
        ValueError: If the file is damaged or something else; names it.
        OSError: If it cannot be read, such as FileNotFoundError.
    """
    stored = read_bytes(path)
    try:
        open_archive(stored)
        with np.load(io.BytesIO(stored), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in _ARRAYS}
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(f"{path}: cannot be loaded as the account of an epoch: {error}") from error
    num, groups, parameters = (len(arrays[name]) for name in ("indices", "groups", "parameters"))
    shapes = {
        "norms": (num, groups),
        "memorized": (num,),
        "group_table": (groups + 1, len(fields(GroupAccount))),
        "parameter_table": (parameters, len(fields(ParameterAccount))),
    }
    for name, array in arrays.items():
        kind, dimensions = _ARRAYS[name]
        whole = array.dtype.isnative and array.dtype.str[1:].startswith(kind) and array.ndim == dimensions
        if not whole or array.shape != shapes.get(name, array.shape):
            raise ValueError(f"{path}: is no account of an epoch: {name} is {array.dtype} {list(array.shape)}")
    for name in ("groups", "parameters"):
        if len(set(arrays[name].tolist())) < len(arrays[name]):
            raise ValueError(f"{path}: is no account of an epoch: {name} must differ")
    # NaN in the other table stands for None
    if np.isinf(arrays["group_table"]).any() or not np.isfinite(arrays["parameter_table"]).all():
        raise ValueError(f"{path}: is no account of an epoch: its numbers must be finite")
    rows = [GroupAccount(*_none_for_nan(row)) for row in arrays["group_table"]]
    return EpochAccount(
        model=rows[-1],
        groups={str(name): row for name, row in zip(arrays["groups"], rows, strict=False)},
        parameters={
            str(name): ParameterAccount(*row.tolist())
            for name, row in zip(arrays["parameters"], arrays["parameter_table"], strict=True)
        },
        example_norms=torch.from_numpy(arrays["norms"]),
        memorized=torch.from_numpy(arrays["memorized"]),
        indices=torch.from_numpy(arrays["indices"]),
    )


def load_accounting(folder: Path) -> Accounting:
    """Read the accounting in the folder of a model.

    Raises:
        ValueError: If a table is damaged; names the file.
        OSError: If a table cannot be read, such as FileNotFoundError.
    """
    rows = _read_table(folder / f"{ACCOUNTS}.json", "group", GroupAccount)
    parameters = _read_table(folder / f"{PARAMETERS}.json", "parameter", ParameterAccount)
    cost = read_as(folder / COST, "what the accounting cost", _cost)
    return Accounting(folder / ACCOUNTS, rows, parameters, cost)


def _read_table(path: Path, key: str, kind: type) -> list[dict[str, Any]]:
    columns = ["epoch", key, *(field.name for field in fields(kind))]
    kinds = {"epoch": int, key: str}

    def table(rows: Any) -> list[dict[str, Any]]:
        for row in rows:
            if set(row) != set(columns):
                raise ValueError(f"got the row {row!r}")
            for name in columns:
                parsed(kinds.get(name, float | None), row[name])
        epochs, names = ({row[name]: None for row in rows} for name in ("epoch", key))
        if not rows or [(row["epoch"], row[key]) for row in rows] != [(e, n) for e in epochs for n in names]:
            raise ValueError(f"every epoch must have every {key}")
        return rows

    return read_as(path, f"a table of {', '.join(columns)}", table)


def _cost(stored: Any) -> dict[str, float]:
    if set(stored) != set(COSTS):
        raise ValueError(f"got {', '.join(stored)}, not {', '.join(COSTS)}")
    return parsed(dict[str, float], stored)


def _none_for_nan(row: np.ndarray) -> list[Any]:
    return [None if np.isnan(number) else number for number in row.tolist()]
