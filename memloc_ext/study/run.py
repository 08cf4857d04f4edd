"""Do the stages of a study that are to be done, in one run directory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from memloc_ext.data import Dataset
from memloc_ext.distributed import once, rank
from memloc_ext.files import write_table
from memloc_ext.parts import fingerprint
from memloc_ext.study.config import StudyConfig
from memloc_ext.study.run_directory import METRICS, Run, check_run, load_run, locked, open_run
from memloc_ext.study.setup import load_data
from memloc_ext.study.stages import (
    STAGES,
    Record,
    Stage,
    StageName,
    drop_replaced,
    flat,
    read_record,
    set_aside,
    settings_of,
    write_record,
)
from memloc_ext.study.work import WORK, Study

_REUSED = "finished before, reused"
_AGAIN = "done again"
ACCOUNTED = "train.accounted"
"""What the record of the plain training says besides the settings: whether it keeps an account of its gradients."""
EXAMPLES = "data.fingerprint"
"""What the record of every stage says besides: the labels of the data set and which are memorized; files may change."""


def run_study(
    config: StudyConfig,
    output: str | Path,
    *,
    stages: Collection[StageName] = tuple(STAGES),
    resume: bool = False,
    progress: bool = True,
    tensorboard: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Run:
    """Do stages of a study, and those that they need, and write all of it to a run directory.

    A stage that is finished with the same settings is reused. One that was interrupted goes on where it was: at most
    an epoch, a layer group or a chunk of examples is done again.

    Inside of `memloc_ext.distributed.process_group` all processes call this; they share the work, and the first writes.

    Args:
        config: The settings.
        output: The run directory; created if missing.
        stages: Names of the stages to do; ``report`` is left to `memloc_ext.study.report.write_report`.
        resume: Allow other settings than those of the run that is there: stages that depend on them are done again,
            and replace the former result when they are finished.
        progress: Show a bar of the epochs on a terminal.
        tensorboard: Log every epoch under ``<output>/<model>/tensorboard``.
        say: Called with a line on how a file of memorized examples was understood, and one per stage: what is done with
            it, and why.

    Returns:
        The run as `load_run` reads it.

    Raises:
        ValueError: If a setting is wrong, the plain training cannot be accounted, another process writes to
            ``output``, or it holds a run with other settings.
        FileNotFoundError: If the data set's files are missing.
        OSError: If something cannot be written; what is finished stays.
    """
    for name in stages:
        if name not in STAGES:
            raise ValueError(f"run_study: stages must be of {', '.join(STAGES)}, got {name}")
    wanted = _with_needs(stages)
    if "account" in wanted and config.train.compile:
        raise ValueError("account needs the calls of single modules: leave out --compile, or give --skip account")
    path, settings = Path(output), config.as_json()
    with contextlib.ExitStack() as stack:
        study = Study(config, path, _load(config, say), progress and rank() == 0, tensorboard)
        study.check(wanted)
        once(lambda: check_run(path, settings, resume=resume))
        examples = _fingerprint(study.dataset)
        if not resume:
            once(lambda: _check_examples(path, wanted, examples))
        if rank() == 0:
            stack.enter_context(locked(path))
        once(lambda: open_run(path, settings, resume=resume))
        given = flat(settings) | {EXAMPLES: examples}
        todo = once(lambda: _plan(path, given, wanted))
        for number, (name, why) in enumerate(todo, 1):
            if rank() == 0:
                say(f"[{number}/{len(todo)}] {name}: {why}")
            if why != _REUSED:
                _do(study, STAGES[name], given, "account" in wanted)
        run = once(lambda: load_run(path))
        once(lambda: write_table(path, METRICS, run.metrics))
    return run


def _plan(path: Path, config: dict[str, Any], wanted: Collection[StageName]) -> list[tuple[StageName, str]]:
    """Return what is to be done with each stage that is wanted; move away what is in its place."""
    # all of them before any is moved away
    records: dict[StageName, Record | None] = {name: read_record(path, name) for name in wanted}
    todo = dict[StageName, str]()
    for name, record in records.items():
        stage = STAGES[name]
        settings = _settings(stage, config, "account" in wanted)
        again = [need for need in stage.needs if todo[need].startswith(_AGAIN)]
        if record is None:
            todo[name] = "begins"
        elif changed := [f"{key} = {settings[key]}, not {old}" for key, old in record.differing(settings).items()]:
            todo[name] = f"{_AGAIN}, {', '.join(changed)}"
        elif again:
            todo[name] = f"{_AGAIN}, as {again[0]} is"
        else:
            todo[name] = _REUSED if record.finished else "goes on"
        if todo[name].startswith(_AGAIN):
            set_aside(path, stage)
    return list(todo.items())


def _settings(stage: Stage, config: dict[str, Any], accounted: bool) -> dict[str, Any]:
    own = {ACCOUNTED: True} if accounted and stage.name == "train" else {}
    return settings_of(stage, config) | own


def _do(study: Study, stage: Stage, config: dict[str, Any], accounted: bool) -> None:
    path, start = study.path, time.monotonic()
    record = once(lambda: read_record(path, stage.name)) or Record(_settings(stage, config, accounted))

    def write(finished: bool) -> None:
        seconds = record.seconds + time.monotonic() - start
        write_record(path, stage.name, replace(record, finished=finished, seconds=seconds))

    once(lambda: write(False))
    try:
        WORK[stage.name](study, record.settings.get(ACCOUNTED, False))
    except BaseException:
        if rank() == 0:
            with contextlib.suppress(OSError):  # of a full disk; the first error is the one to tell
                write(False)
        raise
    once(lambda: write(True))
    if rank() == 0:
        drop_replaced(path, stage)


def _fingerprint(dataset: Dataset) -> str:
    return fingerprint(*((s.labels, s.true_labels, s.memorized, s.indices) for s in (dataset.train, dataset.test)))


def _check_examples(path: Path, stages: Collection[StageName], examples: str) -> None:
    """Raise a ValueError if a stage of a run was made of other examples, though its settings are the same."""
    for name in stages:
        record = read_record(path, name)
        if record is not None and record.settings.get(EXAMPLES, examples) != examples:
            raise ValueError(
                f"{path}: {name} was made with other labels or memorized examples than the files of the data hold "
                "now; give another --output, or --resume to do again what depends on them"
            )


def _load(config: StudyConfig, say: Callable[[str], None]) -> Dataset:
    if config.data.download:
        once(lambda: load_data(config).name)  # fetches the files for all processes
    return load_data(config, say if rank() == 0 else lambda _: None)


def _with_needs(stages: Collection[StageName]) -> list[StageName]:
    """Return stages and what they need, in the order in which they are done; not the report."""
    wanted = set(stages) - {"report"}
    for name in reversed(STAGES):
        if name in wanted:
            wanted.update(STAGES[name].needs)
    return [name for name in STAGES if name in wanted]
