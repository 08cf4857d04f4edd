"""A run on disk: what was asked, what came out of it, and one function that reads it back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memloc_ext.accounting_files import Accounting, load_accounting
from memloc_ext.analysis import DatasetLocalization
from memloc_ext.files import read_json, write_json
from memloc_ext.localization_files import load_localization

CONFIG = "config.json"
METRICS = "metrics"
HISTORY = "history"
FIGURES = "figures"
REPORT = "report.html"
ACCOUNTED = "plain"
"""The model whose training is accounted, if any is."""
LOCALIZED = ("plain", "example_tied")
"""The models whose examples are localized, if any are."""
AS_TRAINED = "as trained"
"""The mode, in the table, of a model that has only one."""
_PLACE = ("data.root", "data.download", "device")
"""Settings that say where and not what: a run may go on under others."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: Its folder.
        config: The settings it was started with.
        metrics: Rows of its table: ``model``, ``mode`` and the shares of `Accuracy`.
        histories: Model to its records, one per epoch.
        accounting: Gradient accounting of the plain training; None if the run has none.
        localizations: Model to its localization, of plain training and of example-tied dropout; empty if the run has
            none.
    """

    path: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    histories: dict[str, list[dict[str, float]]]
    accounting: Accounting | None = None
    localizations: dict[str, DatasetLocalization] = field(default_factory=dict)


def load_run(path: str | Path) -> Run:
    """Read a run directory.

    Args:
        path: The folder that a ``memloc`` command wrote.

    Raises:
        FileNotFoundError: If it holds no finished run.
        ValueError: If a file in it is damaged; names the file.
    """
    path = Path(path)
    for name in (CONFIG, f"{METRICS}.json"):
        if not (path / name).is_file():
            raise FileNotFoundError(f"load_run: {path} holds no finished run, {name} is missing")
    file = path / f"{METRICS}.json"
    metrics = read_json(file)
    if not isinstance(metrics, list) or not metrics or not all(_is_row(row) for row in metrics):
        raise ValueError(f"{file}: must be the table of a run")
    histories = {row["model"]: read_json(path / row["model"] / f"{HISTORY}.json") for row in metrics}
    config = read_json(path / CONFIG)
    if not isinstance(config, dict):
        raise ValueError(f"{path / CONFIG}: must be the settings of a run")
    accounting = load_accounting(path / ACCOUNTED) if config.get("accounting") else None
    localized = [model for model in LOCALIZED if model in histories] if config.get("localization") else []
    localizations = {model: load_localization(path / model) for model in localized}
    return Run(path, config, metrics, histories, accounting, localizations)


def open_run(path: str | Path, config: Mapping[str, Any]) -> Path:
    """Create a run directory, or go back to one with the same settings.

    Args:
        path: The folder; created if missing.
        config: The settings, JSON.

    Returns:
        ``path``.

    Raises:
        ValueError: If the folder holds a run with other settings, or something else; nothing is written then.
    """
    path = Path(path)
    file = path / CONFIG
    if file.exists():
        stored, given = flat(read_json(file)), flat(config)
        for name in {**given, **stored}:
            if name not in _PLACE and stored.get(name) != given.get(name):
                raise ValueError(
                    f"{path} holds a run with {name} = {stored.get(name)}, not {given.get(name)}; "
                    "give another --output, or remove that folder"
                )
        return path
    if path.exists() and (not path.is_dir() or any(not _is_temporary(entry) for entry in path.iterdir())):
        raise ValueError(f"{path} must be a new or empty folder or one that holds a run; give another --output")
    path.mkdir(parents=True, exist_ok=True)
    write_json(file, dict(config))
    return path


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one dictionary with dotted names."""
    if not isinstance(config, Mapping):
        return {prefix.removesuffix("."): config}
    return {name: value for key, inner in config.items() for name, value in flat(inner, f"{prefix}{key}.").items()}


def _is_row(row: Any) -> bool:
    names = [row.get(key) for key in ("model", "mode")] if isinstance(row, dict) else [None]
    return all(isinstance(name, str) and re.fullmatch(r"\w[\w ]*", name) for name in names)


def _is_temporary(entry: Path) -> bool:
    return entry.name.startswith(".") and entry.name.endswith(".tmp")  # left by write_atomically when it was killed
