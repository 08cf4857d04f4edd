"""The command line: ``memloc run``, ``train``, ``account``, ``localize``, ``dropout`` and ``info``."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Annotated, ClassVar

from memloc_ext.info import info
from memloc_ext.run_directory import LOCALIZED
from memloc_ext.study import VARIANTS, StudyConfig, Variant, run_study


@dataclasses.dataclass(frozen=True)
class _Command:
    variants: ClassVar[tuple[Variant, ...]]
    study: StudyConfig = dataclasses.field(default_factory=StudyConfig)
    output: Path | None = None
    """Run directory, by default runs/<command>-<dataset>-<model>-seed<seed>; the same command continues one there."""
    tensorboard: bool = False
    """Log every epoch for TensorBoard."""

    @property
    def accounts(self) -> bool:
        """Whether the plain training is accounted."""
        return False

    @property
    def localizes(self) -> bool:
        """Whether the plain and the example-tied model are localized."""
        return False

    def run(self) -> None:
        from memloc_ext.localization_answers import summary
        from memloc_ext.report import cost, text_table, write_report

        config = self.study
        name = f"{type(self).__name__.lower()}-{config.data.dataset}-{config.model.model}-seed{config.train.seed}"
        output = self.output or Path("runs", re.sub(r"[^\w.-]+", "_", name))
        run = run_study(
            config,
            output,
            variants=self.variants,
            accounting=self.accounts,
            localization=self.localizes,
            tensorboard=self.tensorboard,
            say=_say,
        )
        report = write_report(run)
        print("", text_table(run.metrics), "", *cost(run), *summary(run.localizations), f"report: {report}", sep="\n")


@dataclasses.dataclass(frozen=True)
class Run(_Command):
    """Everything: plain training, example-tied dropout and its controls, each evaluated in every mode, and a report."""

    variants = VARIANTS
    accounting: bool = True
    """Keep an account of the gradients of the plain training; cannot be had with --compile."""
    localization: bool = True
    """Search for the units that flip single examples, after plain training and with example-tied dropout."""

    @property
    def accounts(self) -> bool:
        """Whether the plain training is accounted."""
        return self.accounting

    @property
    def localizes(self) -> bool:
        """Whether the plain and the example-tied model are localized."""
        return self.localization


@dataclasses.dataclass(frozen=True)
class Train(_Command):
    """Train a model without dropout, with a checkpoint after every epoch."""

    variants = ("plain",)


@dataclasses.dataclass(frozen=True)
class Account(_Command):
    """Train a model without dropout and keep an account of its gradients: which examples move which layers."""

    variants = ("plain",)

    @property
    def accounts(self) -> bool:
        """Whether the plain training is accounted."""
        return True


@dataclasses.dataclass(frozen=True)
class Localize(_Command):
    """Train a model without and one with example-tied dropout, and search for the units that flip single examples."""

    variants = LOCALIZED

    @property
    def localizes(self) -> bool:
        """Whether the plain and the example-tied model are localized."""
        return True


@dataclasses.dataclass(frozen=True)
class Dropout(_Command):
    """Train a model with example-tied dropout and evaluate it in every mode."""

    variants = ("example_tied",)


@dataclasses.dataclass(frozen=True)
class Info:
    """Print versions, kernels, instruction set and GPU."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a wrong setting or a missing file ends it with one line and exit status 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments in ([], ["info"]):  # needs nothing but torch and numpy
        print(info())
        return
    try:
        import tyro
    except ImportError:
        sys.exit("memloc: this command needs more packages; run: pip install 'memloc_ext[study]'")
    subcommand = tyro.conf.subcommand
    commands = (
        Annotated[Run, subcommand("run")]
        | Annotated[Train, subcommand("train")]
        | Annotated[Account, subcommand("account")]
        | Annotated[Localize, subcommand("localize")]
        | Annotated[Dropout, subcommand("dropout")]
        | Annotated[Info, subcommand("info")]
    )
    flags = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    try:
        command = tyro.cli(commands, prog="memloc", args=arguments, config=flags, description=__doc__)
        if isinstance(command, Info):
            print(info())
        else:
            command.run()
    except (ValueError, ImportError, FloatingPointError, OSError) as error:
        sys.exit(f"memloc: {error}")
    except KeyboardInterrupt:
        sys.exit("memloc: interrupted; the same command goes on from the last finished epoch")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
