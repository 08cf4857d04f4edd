"""Find where a neural network memorizes: the whole study, or one of its stages."""

from __future__ import annotations

import dataclasses
import re
import sys
import typing
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, ClassVar

from memloc_ext.distributed import process_group, rank
from memloc_ext.files import shown
from memloc_ext.info import info
from memloc_ext.study.config import StudyConfig
from memloc_ext.study.run import Run as FinishedRun
from memloc_ext.study.run import run_study
from memloc_ext.study.setup import find_device
from memloc_ext.study.stages import STAGES, StageName

RUNS = Path("runs")


@dataclasses.dataclass(frozen=True)
class _Command:
    stages: ClassVar[tuple[StageName, ...]]
    study: StudyConfig = dataclasses.field(default_factory=StudyConfig)
    output: Path | None = None
    """Folder of all results. By default the report goes to runs/<dataset>-<model>-seed<seed>, and the results of
    stages go to runs, where later commands find them."""
    seeds: int = 1
    """Number of seeds, the first being --seed. The report gives means and standard deviations."""
    tensorboard: bool = False
    """Log every epoch for TensorBoard."""

    def chosen(self) -> Collection[StageName]:
        """Return the stages to do."""
        return self.stages

    def config(self) -> StudyConfig:
        """Return the settings."""
        return self.study

    def run(self) -> None:
        """Do the stages, print what came out, write the report."""
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")
        with process_group(find_device(self.study.device)):
            first = self.study.train.seed
            runs = [self._run_seed(seed) for seed in range(first, first + self.seeds)]
            if rank() == 0 and self.seeds > 1 and "report" in self.chosen():
                from memloc_ext.study.report import write_seeds_report

                folder = self.output or self._folder(f"{first}-{first + self.seeds - 1}")
                print(f"report of all seeds: {write_seeds_report(folder, runs)}")

    def _run_seed(self, seed: int) -> FinishedRun:
        from memloc_ext.study.report import summary, text_table, write_report

        config = self.config()
        folder = self._folder(str(seed)) if self.output is None else self.output
        run = run_study(
            dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed)),
            folder / f"seed{seed}" if self.output and self.seeds > 1 else folder,
            store=self.output or RUNS,
            stages=self.chosen(),
            tensorboard=self.tensorboard,
            say=_say,
        )
        if rank() == 0:
            report = [f"report: {write_report(run)}"] if "report" in self.chosen() else []
            print("", text_table(run.metrics), "", *summary(run), *report, sep="\n")
        return run

    def _folder(self, seeds: str) -> Path:
        name = f"{self.study.data.dataset}-{self.study.model.model}-seed{seeds}"
        return RUNS / re.sub(r"[^\w.-]+", "_", name)


@dataclasses.dataclass(frozen=True)
class Run(_Command):
    """Run the whole study: all stages, and a report."""

    stages = (*STAGES, "report")
    only: tuple[StageName, ...] = ()
    """Run only these stages, and those that they need."""
    skip: tuple[StageName, ...] = ()
    """Skip these stages, and those that need them."""

    def config(self) -> StudyConfig:
        """Return the settings: without the stage ``account``, training keeps no account."""
        return dataclasses.replace(self.study, account=self.study.account and "account" not in self.skip)

    def chosen(self) -> Collection[StageName]:
        """Return the stages to do."""
        skipped = set[str](self.skip) | (set() if self.study.account else {"account"})
        for name, stage in STAGES.items():  # a stage comes after those that it needs
            if skipped.intersection(stage.needs):
                skipped.add(name)
        asked = (*self.only, "report") if self.only else self.stages
        chosen = tuple[StageName, ...](name for name in asked if name not in skipped)
        if not set(chosen) - {"report"}:
            raise ValueError("run: --only and --skip leave no stage to do")
        return chosen


_SINGLE: dict[str, tuple[str, tuple[StageName, ...]]] = {
    "train": ("Train a model without dropout, with a checkpoint after every epoch.", ("train",)),
    "account": (
        "Train a model, and measure how much clean and memorized examples contribute to the gradient of each layer.",
        ("train", "account"),
    ),
    "rewind": (
        "Train a model, then rewind one layer group at a time to an earlier epoch and measure accuracy.",
        ("train", "rewind"),
    ),
    "retrain": (
        "Train a model, then reset one layer group at a time, retrain it on clean examples and measure accuracy.",
        ("train", "retrain"),
    ),
    "localize": (
        "Train a model with and one without example-tied dropout, and find the units that flip single predictions.",
        ("train", "localize", "dropout", "localize-dropout"),
    ),
    "audit": (
        "Train a model with and one without example-tied dropout, and rank the training examples by how memorized "
        "they are.",
        ("train", "audit", "dropout", "audit-dropout"),
    ),
    "dropout": ("Train a model with example-tied dropout and evaluate it in every mode.", ("dropout",)),
}
"""Commands that run some stages and report them: what they do, and the stages."""

_COMMON = {
    "output", "dataset", "model", "noise", "epochs", "batch_size", "learning_rate", "p_gen", "p_mem", "seed",
}  # fmt: skip
"""Settings that ``--help`` shows; ``--help-all`` shows all."""


@dataclasses.dataclass(frozen=True)
class Info:
    """Print versions, kernels, instruction set and GPU."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a wrong setting or a missing file ends it with one line and exit status 1.

    Warnings are one line each.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments in ([], ["info"]):  # needs no package of [study]
        print(info())
        return
    try:
        import tyro
    except ImportError:
        sys.exit("memloc: this command needs more packages; run: pip install 'memloc_ext[study]'")
    commands: Any = Annotated[Info, tyro.conf.subcommand("info")]
    for name, kind in reversed(_commands().items()):
        if name == arguments[0] and not {"-h", "--help"}.isdisjoint(arguments):
            kind = type(_with_common_settings(kind(), tyro.conf.Suppress))
        commands = Annotated[kind, tyro.conf.subcommand(name)] | commands
    arguments = ["--help" if argument == "--help-all" else argument for argument in arguments]
    in_full, warnings.formatwarning = warnings.formatwarning, lambda text, *_: f"memloc: {shown(str(text))}\n"
    flags = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    try:
        command = tyro.cli(commands, prog="memloc", args=arguments, config=flags, description=__doc__)
        if isinstance(command, Info):
            print(info())
        else:
            command.run()
    except (ValueError, ImportError, FloatingPointError, OSError) as error:
        sys.exit(f"memloc: {shown(str(error))}")
    except KeyboardInterrupt:
        sys.exit("memloc: interrupted; the same command goes on from the last finished epoch")
    finally:
        warnings.formatwarning = in_full


def _commands() -> dict[str, type[_Command]]:
    """Return the commands that take settings, by name."""
    single = {
        name: type(name.title(), (_Command,), {"__doc__": text, "stages": (*stages, "report")})
        for name, (text, stages) in _SINGLE.items()
    }
    return {"run": Run, **single}


def _with_common_settings(settings: Any, suppress: Any) -> Any:
    """Return the same settings in a class of which help shows those of `_COMMON` only."""
    kind, hints = type(settings), typing.get_type_hints(type(settings))
    values, annotations = {}, {}
    for field in dataclasses.fields(settings):
        name, value = field.name, getattr(settings, field.name)
        nested = dataclasses.is_dataclass(value)
        values[name] = _with_common_settings(value, suppress) if nested else value
        hint = type(values[name]) if nested else hints[name]
        annotations[name] = hint if nested or name in _COMMON else Annotated[hint, suppress]
    defaults = {name: dataclasses.field(default_factory=lambda value=value: value) for name, value in values.items()}
    note = " --help-all shows every setting." if issubclass(kind, _Command) else ""
    namespace = {"__annotations__": annotations, "__doc__": f"{kind.__doc__}{note}", "__post_init__": lambda _: None}
    return dataclasses.dataclass(frozen=True)(type(kind.__name__, (kind,), namespace | defaults))(**values)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
