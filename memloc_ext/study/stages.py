"""The stages of a study: what each needs, which settings its result depends on, and where in a run that result is."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from memloc_ext.files import parsed, read_as, write_json

StageName = Literal[
    "train", "account", "rewind", "retrain", "localize", "dropout", "controls", "localize-dropout", "report"
]
RECORDS = "stages"
"""Folder, in a run, of what is known of each stage."""
REPLACED = "replaced"
"""Folder, in a run, of results that are being made again with other settings; gone once they are."""
PLACE = ("data.root", "data.download", "device")
"""Settings that say where and not what: a run may go on under others."""
_TRAINING = ("data", "model", "train")


@dataclass(frozen=True)
class Stage:
    """A part of a study that can be done, reused or left out by itself.

    Attributes:
        name: As on the command line.
        needs: Stages whose results it reads.
        settings: Groups of settings that its result depends on, those of ``needs`` included.
        outputs: Patterns of the files and folders of its result, in a run.
    """

    name: StageName
    needs: tuple[StageName, ...]
    settings: tuple[str, ...]
    outputs: tuple[str, ...]


STAGES: dict[StageName, Stage] = {
    stage.name: stage
    for stage in (
        Stage("train", (), _TRAINING, ("plain",)),
        Stage("account", ("train",), _TRAINING, ("plain/accounting.*", "plain/accounting_*")),
        Stage("rewind", ("train",), (*_TRAINING, "rewind"), ("plain/rewinding*",)),
        Stage("retrain", ("train",), (*_TRAINING, "retrain"), ("plain/retraining*",)),
        Stage("localize", ("train",), (*_TRAINING, "localization"), ("plain/localization*",)),
        Stage("dropout", (), (*_TRAINING, "dropout"), ("example_tied",)),
        Stage("controls", (), (*_TRAINING, "dropout"), ("standard", "fixed")),
        Stage(
            "localize-dropout",
            ("dropout",),
            (*_TRAINING, "dropout", "localization"),
            ("example_tied/localization*",),
        ),
        Stage("report", (), (), ("report.html", "figures")),
    )
}


@dataclass(frozen=True)
class Record:
    """What is known of a stage in a run.

    Attributes:
        settings: Dotted name to value: those that its result was or is being made with.
        finished: Whether all of the result is there.
        seconds: Time that it took, over all processes that worked at it one after another.
    """

    settings: dict[str, Any]
    finished: bool = False
    seconds: float = 0.0

    def differing(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return its own values of those of some settings in which it differs."""
        return {name: own for name, value in settings.items() if (own := self.settings.get(name)) != value}


def settings_of(stage: Stage, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that the result of a stage depends on, out of the `flat` ones of a study."""
    return {k: v for k, v in config.items() if k.split(".")[0] in stage.settings and k not in PLACE}


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one dictionary with dotted names."""
    if not isinstance(config, Mapping):
        return {prefix.removesuffix("."): config}
    return {name: value for key, inner in config.items() for name, value in flat(inner, f"{prefix}{key}.").items()}


def read_record(run: Path, name: str) -> Record | None:
    """Return the record of a stage in a run; None if it was never begun.

    Raises:
        ValueError: If the record is damaged; names its file.
    """
    path = _path(run, name)
    if not path.exists():
        return None
    return read_as(path, "the record of a stage (delete it to do that stage again)", _record)


def _record(stored: Any) -> Record:
    record = Record(**stored)
    if not isinstance(record.settings, dict):
        raise TypeError(f"got {record.settings!r} for settings")
    return Record(record.settings, parsed(bool, record.finished), parsed(float, record.seconds))


def write_record(run: Path, name: str, record: Record) -> None:
    """Write the record of a stage into a run."""
    (run / RECORDS).mkdir(exist_ok=True)
    write_json(_path(run, name), vars(record), sealed=True)


def finished(run: Path, config: Mapping[str, Any]) -> dict[StageName, Record]:
    """Return the stages of a run that are finished with the `flat` settings of a study."""
    records = ((stage, read_record(run, name)) for name, stage in STAGES.items())
    return {s.name: r for s, r in records if r is not None and r.finished and not r.differing(settings_of(s, config))}


def set_aside(run: Path, stage: Stage) -> None:
    """Move the result of a stage, and what was made from it, away such that it can be made again."""
    for name, other in STAGES.items():
        if name == stage.name or stage.name in other.needs:
            _path(run, name).unlink(missing_ok=True)
    for path in [path for pattern in stage.outputs for path in sorted(run.glob(pattern))]:
        kept = run / REPLACED / stage.name / path.relative_to(run)
        if kept.exists():  # of a finished result; what lies in its place now is a part of its successor
            _remove(path)
        else:
            kept.parent.mkdir(parents=True, exist_ok=True)
            path.rename(kept)


def drop_replaced(run: Path, stage: Stage) -> None:
    """Remove what was set aside of a stage."""
    _remove(run / REPLACED / stage.name)
    if (run / REPLACED).is_dir() and not any((run / REPLACED).iterdir()):
        (run / REPLACED).rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _path(run: Path, name: str) -> Path:
    return run / RECORDS / f"{name}.json"
