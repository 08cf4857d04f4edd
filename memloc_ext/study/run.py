"""Do the stages of a study that are to be done, and read them back."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch

from memloc_ext._version import __version__
from memloc_ext.distributed import once, rank
from memloc_ext.files import decode_json, plain, read_json, remove_temporaries, write_json
from memloc_ext.models.layout import layout_of
from memloc_ext.probes import DatasetLocalization, Retraining, Rewinding
from memloc_ext.progress import named
from memloc_ext.study import results
from memloc_ext.study.accounting import ACCOUNTS, Accounting
from memloc_ext.study.audited import AuditedExamples
from memloc_ext.study.config import StudyConfig
from memloc_ext.study.setup import StudyData, build_model, fingerprint_data, fingerprint_model, load_data
from memloc_ext.study.shipped import Shipped
from memloc_ext.study.stages import AUDITED, LOCALIZED, STAGES, TRAINED, StageName, Study
from memloc_ext.study.store import ABOUT, Result, Source, check_inside, is_result, locked

RUN, NUMBERS, REPORT, FIGURES = "run.json", "numbers", "report.html", "figures"
SEEDS = "seeds.json"
"""File in the folder of several runs that differ in the seed: the names of their folders."""
_SEALED = (RUN, f"{results.METRICS}.*", f"{NUMBERS}.*", REPORT, f"{FIGURES}/*")


@dataclass(frozen=True)
class _Run:
    """What is in the file of a run: settings, stage to the folder of its result, finished or not; see `Run`."""

    config: StudyConfig
    stages: dict[str, str]
    version: str
    mislabelled: bool = True


@dataclass(frozen=True)
class Run:
    """What is finished of a run.

    Attributes:
        path: Its folder.
        config: Its settings.
        metrics: Rows of its table: ``model``, ``mode``, the shares of `Accuracy`, and, if there are tokens, the shares
            of right ones: ``clean_tokens``, ``memorized_tokens`` and ``test_tokens``.
        histories: Model to its records, one per epoch.
        accounting: Gradient accounting of the plain training; None if the run has none.
        localizations: Model to its localization, of plain training and of example-tied dropout; empty if the run has
            none.
        rewinding: Of the layer groups of the plain model; None if the run has none.
        retraining: Likewise.
        audits: Model to the audit of its training examples, likewise of plain training and of example-tied dropout.
        shipped: The model without its memorization channels beside the full one; None if the run has none.
        seconds: Finished stage to the time that it took.
        mislabelled: Whether memorized examples have other labels than their true ones; otherwise they are atypical.
    """

    path: Path
    config: StudyConfig
    metrics: list[dict[str, Any]]
    histories: dict[str, list[dict[str, float]]]
    accounting: Accounting | None = None
    localizations: dict[str, DatasetLocalization] = field(default_factory=dict)
    rewinding: Rewinding | None = None
    retraining: Retraining | None = None
    audits: dict[str, AuditedExamples] = field(default_factory=dict)
    shipped: Shipped | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    mislabelled: bool = True

    def seal(self) -> None:
        """Write the checksums of the run's own files, its report included."""
        Result(self.path).finish(*_SEALED)


def run_study(
    config: StudyConfig,
    output: str | Path,
    *,
    store: str | Path | None = None,
    stages: Collection[StageName] = tuple(STAGES),
    progress: bool = True,
    tensorboard: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Run:
    """Do stages of a study, and those that they need, and write which they are into the folder of the run.

    The result of a stage lies in a folder of its own, named by a hash of all that it depends on: one that is finished
    is reused, whoever made it. One that was interrupted goes on where it was: at most an epoch, a layer group or a
    chunk of examples is done again.

    Inside of `memloc_ext.distributed.process_group` all processes call this; they share the work, and the first writes.

    Args:
        config: The settings.
        output: The folder of the run; created if missing.
        store: The folder of the stages' folders: ``output``, or one above it; by default ``output``.
        stages: Names of the stages to do; ``report`` is left to `memloc_ext.study.report.write_report`.
        progress: Show how far each stage is: a bar on a terminal, a line every minute elsewhere.
        tensorboard: Log every epoch under ``tensorboard`` in the folder of a training.
        say: Called with a line on how a file of memorized examples was understood, and one per stage.

    Returns:
        The run as `load_run` reads it.

    Raises:
        ValueError: If a setting is wrong, the plain training cannot be accounted, another process writes to one of the
            folders, or ``output`` holds something else.
        FileNotFoundError: If the data set's files are missing.
        OSError: If something cannot be written; what is finished stays.
    """
    for name in stages:
        if name not in STAGES and name != "report":
            raise ValueError(f"run_study: stages must be of {', '.join(STAGES)}, got {name}")
    wanted, path = _with_needs(stages), Path(output)
    say = say if rank() == 0 else lambda _: None
    if "train" in wanted and config.account and config.train.compile:
        raise ValueError("account needs the calls of single modules: leave out --compile, or give --no-account")
    if "account" in wanted and not config.account:
        raise ValueError("the stage account needs a training that keeps an account: leave out --no-account")
    if config.data.download:
        once(lambda: len(load_data(config).train))  # fetches the files for all processes
    dataset = load_data(config, say)
    wanted = _possible(config, dataset, wanted, say)
    sources = _sources(config, dataset)
    folders: dict[StageName, Path] = {name: Path(store or path) / made.folder for name, made in sources.items()}
    study = Study(config, folders, dataset, progress=progress and rank() == 0, tensorboard=tensorboard)
    study.check(wanted)
    with contextlib.ExitStack() as stack:
        once(lambda: _check_folders(path, [folders[name] for name in wanted]))
        if rank() == 0:
            _lock(stack, path, [Result(folders[name]) for name in wanted])
        about = _Run(config, {name: s.folder for name, s in sources.items()}, __version__, _mislabelled(dataset))
        once(lambda: _write_run(path, about))
        for number, name in enumerate(wanted, 1):
            result = Result(folders[name])
            begun, finished = once(lambda result=result: (result.begun, result.finished))
            state = "finished before, reused" if finished else "goes on" if begun else "begins"
            say(f"[{number}/{len(wanted)}] {name}: {state}")
            if not finished:
                _do(study, name, sources[name], result)
        run = once(lambda: load_run(path))
        once(lambda: _write_metrics(run))
    return run


def load_run(path: str | Path) -> Run:
    """Read the finished stages of a run, from the folder that a ``memloc`` command wrote.

    Raises:
        FileNotFoundError: If it holds no run, or none with a trained model.
        ValueError: If a file is damaged, or a link leads out of its folder; names it.
    """
    path = Path(path)
    if not (path / RUN).exists():
        raise FileNotFoundError(f"load_run: {path} holds no run, {RUN} is missing")
    check_inside(path, path)
    own = Result(path)
    stored: _Run = own.read(RUN, _Run) if own.finished else read_json(path / RUN, _Run)
    found = _finished(path, stored)
    if not any(stage in found for stage, _ in TRAINED.values()):
        raise FileNotFoundError(f"load_run: {path} holds no finished training")
    trained = {v: (found[stage], inner) for v, (stage, inner) in TRAINED.items() if stage in found}
    metrics = {variant: results.load_metrics(*place) for variant, place in trained.items()}
    accounting = None
    if "account" in found and "train" in found:
        accounting = Accounting(found["train"].path / ACCOUNTS, *results.load_accounting(found["account"]))
    return Run(
        path,
        stored.config,
        [row for variant, modes in metrics.items() for row in results.metrics_rows(variant, modes)],
        {variant: results.load_history(*place) for variant, place in trained.items()},
        accounting,
        {v: results.load_localization(found[stage]) for v, stage in LOCALIZED.items() if stage in found},
        results.load_rewinding(found["rewind"]) if "rewind" in found else None,
        results.load_retraining(found["retrain"]) if "retrain" in found else None,
        {v: results.load_audit(found[stage]) for v, stage in AUDITED.items() if stage in found},
        results.load_shipped(found["dropout"]) if "dropout" in found else None,
        {name: result.about().seconds for name, result in found.items()},
        stored.mislabelled,
    )


def load_runs(path: str | Path) -> list[Run]:
    """Read a run, or all runs of a command with several seeds, see `load_run`."""
    path = Path(path)
    if not (path / SEEDS).exists():
        return [load_run(path)]
    names = read_json(path / SEEDS, list[str])
    if any(Path(name).name != name for name in names):
        raise ValueError(f"{path / SEEDS}: must hold names of folders, got {', '.join(names)}")
    return [load_run(path / name if (path / name).exists() else path.absolute().parent / name) for name in names]


def _finished(path: Path, run: _Run) -> dict[StageName, Result]:
    """Return the finished stages of a run, whose folders lie in its own or above it."""
    found: dict[StageName, Result] = {}
    for name, stage in STAGES.items():
        folder = run.stages.get(name, "")
        if not folder and name in AUDITED.values():  # a run from before there were audits
            continue
        if not is_result(folder) or not folder.startswith(f"{name}-"):
            raise ValueError(f"{path / RUN}: must hold the folder of {name}, got {folder!r}")
        above = Path(path.absolute()).parents[:2]
        result = next((Result(p / folder) for p in (path, *above) if (p / folder).exists()), None)
        if result is None or not result.finished:
            continue
        check_inside(result.path, result.path.parent)
        about = result.about()
        own = {key: value for key, value in about.source.settings.items() if key in stage.settings}
        made = decode_json(result.path / ABOUT, msgspec.json.encode(own), StudyConfig)  # what it lacks has its default
        same = all(getattr(made, key) == getattr(run.config, key) for key in stage.settings)
        if about.source.folder != folder or not same:
            raise ValueError(f"{path / RUN}: must have the settings of {result.path}")
        found[name] = result
    return found


def _sources(config: StudyConfig, dataset: StudyData) -> dict[StageName, Source]:
    """Return what the result of each stage is made from."""
    network, data = fingerprint_model(config, dataset), fingerprint_data(dataset)
    versions = {"memloc_ext": __version__, "torch": torch.__version__.partition("+")[0]}
    sources: dict[StageName, Source] = {}
    for name, stage in STAGES.items():
        settings = {key: plain(getattr(config, key)) for key in stage.settings}
        settings |= {"model": config.model.model, "task": config.task}
        needs: dict[str, str] = {need: sources[need].hash for need in stage.needs}
        sources[name] = Source(name, versions, settings, network, data, needs)
    return sources


def _do(study: Study, name: StageName, source: Source, result: Result) -> None:
    before, start = once(lambda: result.about().seconds if result.begun else 0.0), time.monotonic()

    def write() -> None:
        result.write_about(source, before + time.monotonic() - start)

    once(write)
    try:
        with named(name if study.progress else None):
            STAGES[name].work(study, result.path)
    except BaseException:
        if rank() == 0:
            with contextlib.suppress(OSError):  # of a full disk; the first error is the one to tell
                write()
        raise
    once(write)
    once(result.finish)


def _possible(
    config: StudyConfig, dataset: StudyData, wanted: list[StageName], say: Callable[[str], None]
) -> list[StageName]:
    """Leave out the dropouts of a model that does not say where they go, if there is anything else to do."""
    dropouts = {"dropout", "controls", "localize-dropout", "audit-dropout"}
    if config.dropout.sites or not set(wanted) & dropouts or set(wanted) <= dropouts:
        return wanted
    layout = layout_of(build_model(config, dataset, "plain"))
    if layout is not None and layout.sites:
        return wanted
    say(f"left out: {', '.join(name for name in wanted if name in dropouts)}; name modules for dropout by --sites")
    return [name for name in wanted if name not in dropouts]


def _mislabelled(dataset: StudyData) -> bool:
    train = dataset.train
    return bool((train.labels != train.true_labels)[train.memorized].any())


def _check_folders(path: Path, folders: Collection[Path]) -> None:
    """Raise a ValueError unless a run can be made or go on in a folder; nothing is written."""
    check_inside(path, path)
    for folder in folders:
        check_inside(folder, folder.parent)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} must be a folder; give another --output")
    names = [entry.name for entry in path.iterdir()] if path.exists() and not (path / RUN).exists() else []
    if not all(is_result(name) or re.fullmatch(r"\.lock|\..*\.tmp", name) for name in names):
        raise ValueError(f"{path} must be a new or empty folder or one that holds a run; give another --output")
    if (path / RUN).exists():
        read_json(path / RUN, _Run)  # many a program may have a file of this name


def _lock(stack: contextlib.ExitStack, path: Path, found: Collection[Result]) -> None:
    stack.enter_context(locked(path))
    for pattern in (".*.tmp", f"{FIGURES}/.*.tmp"):
        remove_temporaries(path, pattern)
    for result in found:
        if not result.finished:
            stack.enter_context(result.locked())


def _write_run(path: Path, run: _Run) -> None:
    if not (path / RUN).exists() or read_json(path / RUN) != plain(run):
        Result(path).unseal()
        write_json(path / RUN, run, sort_keys=False)


def _write_metrics(run: Run) -> None:
    results.save(run.path, results.METRICS, run.metrics, run.metrics)
    run.seal()


def _with_needs(stages: Collection[StageName]) -> list[StageName]:
    """Return stages and what they need, in the order in which they are done; not the report."""
    wanted = set(stages) - {"report"}
    for name in reversed(STAGES):
        if name in wanted:
            wanted.update(STAGES[name].needs)
    return [name for name in STAGES if name in wanted]
