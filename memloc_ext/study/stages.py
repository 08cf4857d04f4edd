"""The stages of a study: what each needs, which settings its result depends on, and what it does."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from memloc_ext.batches import Batch
from memloc_ext.borrowing import kept_state
from memloc_ext.distributed import alone, once
from memloc_ext.files import write_atomically, write_csv
from memloc_ext.nn import dropout_mode
from memloc_ext.parts import PartFiles
from memloc_ext.probes import Accuracy, Audit, accuracy, accuracy_by_mode, audit, localize_dataset, retrain, rewind
from memloc_ext.probes.layer_groups import chosen_groups
from memloc_ext.probes.states import checked_state
from memloc_ext.study import results
from memloc_ext.study.accounting import ACCOUNTS, AccountedBackward, accounted_epochs, accounting_cost
from memloc_ext.study.audited import shown_examples
from memloc_ext.study.config import StudyConfig, Variant
from memloc_ext.study.setup import StudyData, build_model
from memloc_ext.study.shipped import ship
from memloc_ext.study.store import LOGS, PARTS
from memloc_ext.tasks import TaskName
from memloc_ext.training import list_checkpoints, load_checkpoint, train

StageName = Literal[
    "train",
    "account",
    "rewind",
    "retrain",
    "localize",
    "audit",
    "dropout",
    "controls",
    "localize-dropout",
    "audit-dropout",
    "report",
]
TRAINED: dict[Variant, tuple[StageName, str]] = {
    "plain": ("train", ""),
    "example_tied": ("dropout", ""),
    "standard": ("controls", "standard/"),
    "fixed": ("controls", "fixed/"),
}
"""Model to the stage that trains it, and to the folder in its result."""
LOCALIZED: dict[Variant, StageName] = {"plain": "localize", "example_tied": "localize-dropout"}
"""Model to the stage that localizes it."""
AUDITED: dict[Variant, StageName] = {"plain": "audit", "example_tied": "audit-dropout"}
"""Model to the stage that audits the examples that it was trained on."""
CHECKPOINTS = "checkpoints"
PROGRAM = f"{results.SHIPPED}.pt2"
"""File of the example-tied model without its memorization channels, by ``torch.export``."""
_SHIPPED_EXAMPLES = 64
"""Of a timed pass of that model, at most."""


@dataclass
class Study:
    """What the stages of a run share: settings, stage to the folder of its result, examples, and what to show."""

    config: StudyConfig
    folders: Mapping[StageName, Path]
    dataset: StudyData
    progress: bool = False
    tensorboard: bool = False
    _trained: dict[Variant, nn.Module] = field(default_factory=dict)

    def check(self, stages: Collection[StageName]) -> None:
        """Raise what is wrong with the settings of some stages, before anything is written."""
        config = self.config
        models = {v: build_model(config, self.dataset, v) for v, (stage, _) in TRAINED.items() if stage in stages}
        batch = self.dataset.train.batch(torch.arange(min(2, len(self.dataset.train))))
        for model in models.values():
            self._try(model, batch)
        asked = {"rewind": config.rewind.rewind_groups, "retrain": config.retrain.retrain_groups}
        for stage, names in asked.items():
            if stage in stages:
                chosen_groups(stage, models["plain"], names or None)
        if "rewind" in stages and any(epoch > config.train.epochs for epoch in config.rewind.rewind_epochs):
            latest = max(config.rewind.rewind_epochs)
            raise ValueError(
                f"rewind_epochs must be at most {config.train.epochs}, the epochs of training, got {latest}"
            )
        if "retrain" in stages and bool(self.dataset.train.memorized.all()):
            raise ValueError("retrain needs a clean training example, and all are memorized: give --skip retrain")

    def train(self, variant: Variant) -> None:
        """Train a model and evaluate it in every mode."""
        folder, dataset, settings = self._folder(variant), self.dataset, self.config.train
        model, task = build_model(self.config, dataset, variant), self.config.task
        accounted = variant == "plain" and self.config.account
        history = train(
            model,
            dataset.train,
            settings,
            checkpoints=folder / CHECKPOINTS,
            task=task,
            evaluate=partial(_numbers, dataset=dataset, variant=variant, task=task),
            backward=AccountedBackward(model, dataset.train, folder / ACCOUNTS) if accounted else None,
            progress=self.progress,
            tensorboard=folder / LOGS if self.tensorboard else None,
        )
        if variant == "example_tied":
            modes = accuracy_by_mode(model, dataset.train, test=dataset.test, task=task)
        else:
            modes = {results.AS_TRAINED: accuracy(model, dataset.train, test=dataset.test, task=task)}
        once(lambda: results.save(folder, results.HISTORY, history, history))
        once(lambda: results.save(folder, results.METRICS, modes, results.metrics_rows(variant, modes)))
        if variant == "example_tied":
            once(lambda: self._ship(folder, model))
        self._trained[variant] = model

    def trained(self, variant: Variant) -> nn.Module:
        """Return a trained model, from its last checkpoint if it was not trained just now."""
        if variant not in self._trained:
            model, epochs = build_model(self.config, self.dataset, variant), self.config.train.epochs
            found = self.checkpoints(variant)
            if epochs not in found:
                folder = self._folder(variant)
                raise FileNotFoundError(f"{folder} lacks the checkpoint of epoch {epochs}; delete it to train again")
            state = load_checkpoint(found[epochs], self.dataset.train.device).model
            checked_state(str(found[epochs]), state, model)
            try:
                model.load_state_dict(state)
            except (RuntimeError, ValueError) as error:  # of the settings of its modules
                raise ValueError(f"{found[epochs]}: must be of the model of this run: {error}") from error
            self._trained[variant] = model
        return self._trained[variant]

    def checkpoints(self, variant: Variant) -> dict[int, Path]:
        """Return a model's checkpoints by epoch."""
        return list_checkpoints(self._folder(variant) / CHECKPOINTS)

    def probe(
        self, stage: StageName, function: Callable[..., Any], variant: Variant, *states: Path, **settings: Any
    ) -> Any:
        """Probe a trained model, write and return what comes out; its parts are on disk until all of it is there."""
        folder, dataset = self.folders[stage], self.dataset
        settings |= {"test": dataset.test, "task": self.config.task, "parts": PartFiles(folder / PARTS)}
        found = function(self.trained(variant), *states, dataset.train, **settings)
        name, rows = results.TABLES[type(found)]
        once(lambda: results.save(folder, name, found, rows(found)))
        shutil.rmtree(folder / PARTS, ignore_errors=True)  # by every process, for those that have a disk of their own
        return found

    def _ship(self, folder: Path, model: nn.Module) -> None:
        """Write the model without its memorization channels; say so if that, or its export, is not possible."""
        batch = self.dataset.train.batch(torch.arange(min(_SHIPPED_EXAMPLES, len(self.dataset.train))))
        try:
            found, program = ship(model, batch)
        except Exception as error:  # whatever its code raises
            warnings.warn(f"{PROGRAM} is left out: {type(error).__name__}: {error}")
            return
        write_atomically(folder / PROGRAM, program)
        results.save(folder, results.SHIPPED, found)

    def _try(self, model: nn.Module, batch: Batch) -> None:
        """Raise ValueError if a model does not go together with the data or the task; it is left as it was."""
        try:
            with alone(), kept_state(model):
                accuracy(model, [batch], task=self.config.task)
        except Exception as error:  # whatever its code raises
            names = f"--model {self.config.model.model} cannot take a batch of --dataset {self.config.data.dataset}"
            raise ValueError(f"{names}: {type(error).__name__}: {error}") from error

    def _folder(self, variant: Variant) -> Path:
        stage, inner = TRAINED[variant]
        return self.folders[stage] / inner


def _account(study: Study, folder: Path) -> None:
    settings, training = study.config.train, study.folders["train"]
    table = once(lambda: accounted_epochs(training / ACCOUNTS, settings.epochs))
    cost = accounting_cost(study.trained("plain"), study.dataset.train, settings, study.config.task)
    once(lambda: results.save(folder, results.ACCOUNTING, table, results.accounting_rows(table)))
    once(lambda: write_csv(folder / f"{results.PARAMETERS}.csv", results.parameter_rows(table)))
    once(lambda: results.save(folder, results.COST, cost))


def _rewind(study: Study, _: Path) -> None:
    config, checkpoints = study.config.rewind, study.folders["train"] / CHECKPOINTS
    settings = {"groups": config.rewind_groups or None, "epochs": config.rewind_epochs or None}
    study.probe("rewind", rewind, "plain", checkpoints, **settings)


def _retrain(study: Study, _: Path) -> None:
    config = study.config.retrain
    study.probe(
        "retrain",
        retrain,
        "plain",
        study.checkpoints("plain")[0],
        groups=config.retrain_groups or None,
        epochs=config.retrain_epochs,
        learning_rate=config.retrain_learning_rate,
        train_batch_size=config.retrain_batch_size,
        patience=config.patience,
        seed=study.config.train.seed,
    )


def _localize(study: Study, _: Path, variant: Variant) -> None:
    settings = {**asdict(study.config.localization), "seed": study.config.train.seed}
    study.probe(LOCALIZED[variant], localize_dataset, variant, **settings)


def _audit(study: Study, folder: Path, variant: Variant) -> None:
    config, (_, inner) = study.config.audit, TRAINED[variant]
    score = None if (variant, config.score) == ("plain", "drop") else config.score
    states = study.folders[TRAINED[variant][0]] / inner / CHECKPOINTS
    found: Audit = study.probe(AUDITED[variant], audit, variant, states=states, score=score)
    examples = shown_examples(study.dataset.train, [row["index"] for row in found.top(config.top)])
    once(lambda: results.save(folder, results.AUDIT_EXAMPLES, examples))


def _train(study: Study, _: Path, variants: Collection[Variant]) -> None:
    for variant in variants:
        study.train(variant)


@dataclass(frozen=True)
class Stage:
    """A part of a study that can be done, reused or left out by itself.

    Attributes:
        needs: Stages whose results it reads.
        settings: Names of settings in `StudyConfig` that its result depends on, besides those of ``needs``.
        work: Computes the result and writes it into a folder.
    """

    needs: tuple[StageName, ...]
    settings: tuple[str, ...]
    work: Callable[[Study, Path], None]


STAGES: dict[StageName, Stage] = {
    "train": Stage((), ("train", "account"), partial(_train, variants=("plain",))),
    "account": Stage(("train",), (), _account),
    "rewind": Stage(("train",), ("rewind",), _rewind),
    "retrain": Stage(("train",), ("retrain",), _retrain),
    "localize": Stage(("train",), ("localization",), partial(_localize, variant="plain")),
    "audit": Stage(("train",), ("audit",), partial(_audit, variant="plain")),
    "dropout": Stage((), ("train", "dropout"), partial(_train, variants=("example_tied",))),
    "controls": Stage((), ("train", "dropout"), partial(_train, variants=("standard", "fixed"))),
    "localize-dropout": Stage(("dropout",), ("localization",), partial(_localize, variant="example_tied")),
    "audit-dropout": Stage(("dropout",), ("audit",), partial(_audit, variant="example_tied")),
}
"""In the order in which they are done; the report of all of them comes after."""


def _numbers(model: nn.Module, dataset: StudyData, variant: Variant, task: TaskName) -> dict[str, float]:
    if variant != "example_tied":
        return _present(accuracy(model, dataset.train, test=dataset.test, task=task))
    with dropout_mode(model, "drop"):
        dropped = _present(accuracy(model, dataset.train, test=dataset.test, task=task), "drop_")
    with dropout_mode(model, "train"):
        return _present(accuracy(model, dataset.train, task=task)) | dropped


def _present(result: Accuracy, prefix: str = "") -> dict[str, float]:
    return {prefix + name: value for name, value in result.shares().items() if value is not None}
