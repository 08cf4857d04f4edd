"""A run on disk: what was asked, what came out of it, and one function that reads it back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from memloc_ext.analysis import DatasetLocalization, Retraining, Rewinding
from memloc_ext.files import read_json, write_json
from memloc_ext.study.accounting_files import Accounting, load_accounting
from memloc_ext.study.localization_files import load_localization
from memloc_ext.study.retraining_files import load_retraining
from memloc_ext.study.rewinding_files import load_rewinding
from memloc_ext.study.stages import PLACE, StageName, finished, flat

Variant = Literal["plain", "example_tied", "standard", "fixed"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
TRAINED: dict[Variant, StageName] = {
    "plain": "train",
    "example_tied": "dropout",
    "standard": "controls",
    "fixed": "controls",
}
"""Model to the stage that trains it."""
LOCALIZED: dict[Variant, StageName] = {"plain": "localize", "example_tied": "localize-dropout"}
"""Model to the stage that localizes it."""
CONFIG = "config.json"
METRICS = "metrics"
HISTORY = "history"
FIGURES = "figures"
REPORT = "report.html"
AS_TRAINED = "as trained"
"""The mode, in the table, of a model that has only one."""
_LOCK = ".lock"


@dataclass(frozen=True)
class Run:
    """What is finished of a run.

    Attributes:
        path: Its folder.
        config: The settings it was started with.
        metrics: Rows of its table: ``model``, ``mode`` and the shares of `Accuracy`.
        histories: Model to its records, one per epoch.
        accounting: Gradient accounting of the plain training; None if the run has none.
        localizations: Model to its localization, of plain training and of example-tied dropout; empty if the run has
            none.
        rewinding: Of the layer groups of the plain model; None if the run has none.
        retraining: Likewise.
        seconds: Finished stage to the time that it took.
    """

    path: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    histories: dict[str, list[dict[str, float]]]
    accounting: Accounting | None = None
    localizations: dict[str, DatasetLocalization] = field(default_factory=dict)
    rewinding: Rewinding | None = None
    retraining: Retraining | None = None
    seconds: dict[str, float] = field(default_factory=dict)


def load_run(path: str | Path) -> Run:
    """Read the finished stages of a run directory.

    Args:
        path: The folder that a ``memloc`` command wrote.

    Raises:
        FileNotFoundError: If it holds no trained model.
        ValueError: If a file in it is damaged; names the file.
    """
    path = Path(path)
    if not (path / CONFIG).is_file():
        raise FileNotFoundError(f"load_run: {path} holds no run, {CONFIG} is missing")
    config = read_json(path / CONFIG)
    if not isinstance(config, dict):
        raise ValueError(f"{path / CONFIG}: must be the settings of a run")
    stages = finished(path, flat(config))
    variants = [variant for variant, stage in TRAINED.items() if stage in stages]
    if not variants:
        raise FileNotFoundError(f"load_run: {path} holds no finished training")
    return Run(
        path,
        config,
        [row for variant in variants for row in _metrics(path / variant, variant)],
        {variant: read_json(path / variant / f"{HISTORY}.json") for variant in variants},
        load_accounting(path / "plain") if "account" in stages else None,
        {variant: load_localization(path / variant) for variant, stage in LOCALIZED.items() if stage in stages},
        load_rewinding(path / "plain") if "rewind" in stages else None,
        load_retraining(path / "plain") if "retrain" in stages else None,
        {name: record.seconds for name, record in stages.items()},
    )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep a run directory, which is created if missing, from other processes.

    Raises:
        ValueError: If another process writes to it.
    """
    import filelock  # torch brings it

    path.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(path / _LOCK, blocking=False):
            yield
    except filelock.Timeout:
        raise ValueError(f"{path} is in use by another run; wait for it, or give another --output") from None


def check_run(path: str | Path, config: Mapping[str, Any], *, resume: bool = False) -> None:
    """Raise a ValueError unless a run with these settings can be made or go on in a folder; nothing is written.

    Args:
        path: The folder, which may be missing.
        config: The settings, JSON.
        resume: Whether the settings may differ from those of a run that is there.
    """
    path = Path(path)
    file = path / CONFIG
    if file.exists():
        stored, given = flat(read_json(file)), flat(config)
        for name in {**given, **stored}:
            if not resume and name not in PLACE and stored.get(name) != given.get(name):
                raise ValueError(
                    f"{path} holds a run with {name} = {stored.get(name)}, not {given.get(name)}; give another "
                    "--output, or --resume to do again what depends on it"
                )
    elif path.exists() and (not path.is_dir() or any(not _is_ours(entry) for entry in path.iterdir())):
        raise ValueError(f"{path} must be a new or empty folder or one that holds a run; give another --output")


def open_run(path: str | Path, config: Mapping[str, Any], *, resume: bool = False) -> Path:
    """Create a run directory, or go back to one, whose settings become these; see `check_run`."""
    path = Path(path)
    check_run(path, config, resume=resume)
    path.mkdir(parents=True, exist_ok=True)
    if not (path / CONFIG).exists() or read_json(path / CONFIG) != config:
        write_json(path / CONFIG, dict(config))
    return path


def _metrics(folder: Path, variant: str) -> list[dict[str, Any]]:
    file = folder / f"{METRICS}.json"
    rows = read_json(file)
    if not isinstance(rows, list) or not rows or not all(_is_row(row, variant) for row in rows):
        raise ValueError(f"{file}: must be the table of a model")
    return rows


def _is_row(row: Any, variant: str) -> bool:
    return isinstance(row, dict) and row.get("model") == variant and isinstance(row.get("mode"), str)


def _is_ours(entry: Path) -> bool:
    temporary = entry.name.startswith(".") and entry.name.endswith(".tmp")  # of a write_atomically that was killed
    return temporary or entry.name == _LOCK
