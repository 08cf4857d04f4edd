"""A run on disk: what was asked, what came out of it, and one function that reads it back."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from memloc_ext.files import parsed, read_as, remove_temporaries, write_json
from memloc_ext.probes import DatasetLocalization, Retraining, Rewinding
from memloc_ext.study.accounting_files import Accounting, load_accounting
from memloc_ext.study.config import StudyConfig
from memloc_ext.study.localization_files import load_localization
from memloc_ext.study.retraining_files import load_retraining
from memloc_ext.study.rewinding_files import SHARES, load_rewinding, parsed_accuracy
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
_KINDS = {bool: bool, int: int, float: (int, float), str: str, list: list}
"""Kind of a default setting to what the setting of a run may be."""


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
        ValueError: If a file in it is damaged, or a link leads out of it; names the file.
    """
    path = Path(path)
    if not (path / CONFIG).exists():
        raise FileNotFoundError(f"load_run: {path} holds no run, {CONFIG} is missing")
    check_inside(path)
    config = read_as(path / CONFIG, "the settings of a run", _whole)
    stages = finished(path, flat(config))
    variants = [variant for variant, stage in TRAINED.items() if stage in stages]
    if not variants:
        raise FileNotFoundError(f"load_run: {path} holds no finished training")
    return Run(
        path,
        config,
        [row for variant in variants for row in _metrics(path / variant, variant)],
        {variant: read_as(path / variant / f"{HISTORY}.json", "records of epochs", _history) for variant in variants},
        load_accounting(path / "plain") if "account" in stages else None,
        {variant: load_localization(path / variant) for variant, stage in LOCALIZED.items() if stage in stages},
        load_rewinding(path / "plain") if "rewind" in stages else None,
        load_retraining(path / "plain") if "retrain" in stages else None,
        {name: record.seconds for name, record in stages.items()},
    )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep a run directory, which is created if missing, from other processes, and clear it of what a kill left.

    Raises:
        ValueError: If another process writes to it.
    """
    import filelock  # torch brings it

    path.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(path / _LOCK, blocking=False):
            remove_temporaries(path)
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
    check_inside(path)
    if (path / CONFIG).exists():
        stored, given = flat(_read_config(path)), flat(config)
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
    if not (path / CONFIG).exists() or _read_config(path) != config:
        write_json(path / CONFIG, dict(config), sealed=True)
    return path


def check_inside(path: Path) -> None:
    """Raise a ValueError if a run directory, which may itself be a link, holds a link that leads out of it.

    A run from a stranger could else have files read, emptied or written elsewhere, and folders of others removed.
    """
    inside = os.path.realpath(path)
    for folder, folders, files in os.walk(path):
        for entry in (Path(folder, name) for name in (*folders, *files)):
            target = Path(os.path.realpath(entry))  # of a loop too
            if entry.is_symlink() and not target.is_relative_to(inside):
                raise ValueError(f"{entry}: must not lead out of the run, to {target}")


def _read_config(path: Path) -> dict[str, Any]:
    return read_as(path / CONFIG, "the settings of a run", _grouped)


def _grouped(stored: Any) -> dict[str, Any]:
    """Return settings, of any version; many a program has a config.json, which nobody wants to lose to --resume."""
    for group in ("data", "model", "train"):
        if not isinstance(stored[group], dict):
            raise ValueError(f"got {stored[group]!r} for {group}")
    flat(stored)
    return stored


def _whole(stored: Any) -> dict[str, Any]:
    given = flat(_grouped(stored))
    for name, default in flat(StudyConfig().as_json()).items():
        if name not in given or (default is not None and not isinstance(given[name], _KINDS[type(default)])):
            raise ValueError(f"got {given.get(name)!r} for {name}")
    return stored


def _history(stored: Any) -> list[dict[str, float]]:
    records = parsed(list[dict[str, float]], stored)
    if [record["epoch"] for record in records] != list(range(len(records))) or not records:
        raise ValueError("the epochs must be numbered from 0 on")
    return records


def _metrics(folder: Path, variant: str) -> list[dict[str, Any]]:
    def table(rows: Any) -> list[dict[str, Any]]:
        for row in rows:
            parsed_accuracy(row)
            if row["model"] != variant or set(row) != {"model", "mode", *SHARES}:
                raise ValueError(f"got the row {row!r}")
            parsed(str, row["mode"])
        if not rows:
            raise ValueError("got no row")
        return rows

    return read_as(folder / f"{METRICS}.json", "the table of a model", table)


def _is_ours(entry: Path) -> bool:
    temporary = entry.name.startswith(".") and entry.name.endswith(".tmp")  # of a write_atomically that was killed
    return temporary or entry.name == _LOCK
