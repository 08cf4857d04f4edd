"""What each stage of a study does."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from torch import nn

from memloc_ext.data import Dataset
from memloc_ext.distributed import once
from memloc_ext.files import write_json, write_table
from memloc_ext.nn import dropout_mode
from memloc_ext.parts import PartFiles
from memloc_ext.probes import Accuracy, accuracy, accuracy_by_mode, localize_dataset, retrain, rewind
from memloc_ext.probes.layer_groups import chosen_groups
from memloc_ext.probes.states import checked_state
from memloc_ext.study.accounted_training import AccountedBackward, accounting_cost, write_accounting_tables
from memloc_ext.study.accounting_files import ACCOUNTS, COST
from memloc_ext.study.config import StudyConfig
from memloc_ext.study.localization_files import LOCALIZATION, save_localization
from memloc_ext.study.retraining_files import RETRAINING, save_retraining
from memloc_ext.study.rewinding_files import REWINDING, save_rewinding
from memloc_ext.study.run_directory import AS_TRAINED, HISTORY, METRICS, TRAINED, Variant
from memloc_ext.study.setup import build_model
from memloc_ext.study.stages import StageName
from memloc_ext.training import list_checkpoints, load_checkpoint, train


class Study:
    """What the stages of a run share.

    Args:
        config: The settings.
        path: The run directory.
        dataset: Its examples.
        progress: Show a bar of the epochs on a terminal.
        tensorboard: Log every epoch.
    """

    def __init__(self, config: StudyConfig, path: Path, dataset: Dataset, progress: bool, tensorboard: bool) -> None:
        self.config, self.path, self.dataset = config, path, dataset
        self.progress, self.tensorboard = progress, tensorboard
        self._built: dict[Variant, nn.Module] = {}
        self._trained: dict[Variant, nn.Module] = {}

    def check(self, stages: Collection[StageName]) -> None:
        """Raise what is wrong with the settings of some stages, before anything is written."""
        for variant, stage in TRAINED.items():
            if stage in stages:
                self._built[variant] = build_model(self.config, self.dataset, variant)
        config = self.config
        asked = {"rewind": config.rewind.rewind_groups, "retrain": config.retrain.retrain_groups}
        for stage, names in asked.items():
            if stage in stages:
                chosen_groups(stage, self._built["plain"], names or None)
        if "rewind" in stages and any(epoch > config.train.epochs for epoch in config.rewind.rewind_epochs):
            latest = max(config.rewind.rewind_epochs)
            raise ValueError(
                f"rewind_epochs must be at most {config.train.epochs}, the epochs of training, got {latest}"
            )
        if "retrain" in stages and bool(self.dataset.train.memorized.all()):
            raise ValueError("retrain needs a clean training example, and all are memorized: give --skip retrain")

    def train(self, variant: Variant, accounted: bool = False) -> None:
        """Train a model and evaluate it in every mode."""
        folder, dataset, settings = self.path / variant, self.dataset, self.config.train
        model = self._model(variant)
        history = train(
            model,
            dataset.train,
            settings,
            checkpoints=self.checkpoints(variant),
            evaluate=partial(_numbers, dataset=dataset, variant=variant),
            backward=AccountedBackward(model, dataset.train, folder / ACCOUNTS) if accounted else None,
            progress=self.progress,
            tensorboard=folder / "tensorboard" if self.tensorboard else None,
        )
        modes = (
            accuracy_by_mode(model, dataset.train, test=dataset.test)
            if variant == "example_tied"
            else {AS_TRAINED: accuracy(model, dataset.train, test=dataset.test)}
        )
        rows = [{"model": variant, "mode": mode, **found.shares()} for mode, found in modes.items()]
        once(lambda: write_table(folder, HISTORY, history))
        once(lambda: write_table(folder, METRICS, rows))
        self._trained[variant] = model

    def trained(self, variant: Variant) -> nn.Module:
        """Return a trained model, from its last checkpoint if it was not trained just now.

        Raises:
            FileNotFoundError: If that checkpoint is missing.
            ValueError: If it is damaged, or of another model.
        """
        if variant not in self._trained:
            model, epochs = self._model(variant), self.config.train.epochs
            found = list_checkpoints(self.checkpoints(variant))
            if epochs not in found:
                raise FileNotFoundError(
                    f"{self.checkpoints(variant)} lacks the checkpoint of epoch {epochs}; delete "
                    f"{self.path / 'stages' / TRAINED[variant]}.json to train again"
                )
            state = load_checkpoint(found[epochs], self.dataset.train.device).model
            checked_state(str(found[epochs]), state, model)
            try:
                model.load_state_dict(state)
            except (RuntimeError, ValueError) as error:  # of the settings of its modules
                raise ValueError(f"{found[epochs]}: must be of the model of this run: {error}") from error
            self._trained[variant] = model
        return self._trained[variant]

    def _model(self, variant: Variant) -> nn.Module:
        """Return a model with its initial weights, the one that `check` built if it did."""
        if variant not in self._built:
            return build_model(self.config, self.dataset, variant)
        return self._built.pop(variant)

    def checkpoints(self, variant: Variant) -> Path:
        """Return the folder of a model's checkpoints."""
        return self.path / variant / "checkpoints"

    @contextlib.contextmanager
    def parts(self, variant: Variant, name: str) -> Iterator[PartFiles]:
        """Keep the parts of a stage on disk until all of its result is there, at the end of the ``with``."""
        folder = self.path / variant / f"{name}_parts"
        yield PartFiles(folder)
        shutil.rmtree(folder, ignore_errors=True)  # by every process, for those that have a disk of their own


def _train(study: Study, accounted: bool) -> None:
    study.train("plain", accounted)


def _account(study: Study, accounted: bool) -> None:
    folder, settings, split = study.path / "plain", study.config.train, study.dataset.train
    model = study.trained("plain")
    once(lambda: write_accounting_tables(folder, settings.epochs))
    cost = accounting_cost(model, split, settings)
    once(lambda: write_json(folder / COST, cost, sealed=True))


def _rewind(study: Study, accounted: bool) -> None:
    model, config = study.trained("plain"), study.config.rewind
    with study.parts("plain", REWINDING) as parts:
        found = rewind(
            model,
            study.checkpoints("plain"),
            study.dataset.train,
            test=study.dataset.test,
            groups=config.rewind_groups or None,
            epochs=config.rewind_epochs or None,
            parts=parts,
        )
        once(lambda: save_rewinding(study.path / "plain", found))


def _retrain(study: Study, accounted: bool) -> None:
    model, initial = study.trained("plain"), list_checkpoints(study.checkpoints("plain"))[0]
    config, dataset = study.config.retrain, study.dataset
    settings = {**config.as_arguments(), "seed": study.config.train.seed}
    with study.parts("plain", RETRAINING) as parts:
        found = retrain(model, initial, dataset.train, test=dataset.test, **settings, parts=parts)
        once(lambda: save_retraining(study.path / "plain", found))


def _localize(study: Study, accounted: bool, variant: Variant = "plain") -> None:
    model, data = study.trained(variant), study.dataset
    settings = {**asdict(study.config.localization), "seed": study.config.train.seed}
    with study.parts(variant, LOCALIZATION) as parts:
        found = localize_dataset(model, data.train, test=data.test, **settings, parts=parts)
        once(lambda: save_localization(study.path / variant, found))


def _dropout(study: Study, accounted: bool) -> None:
    study.train("example_tied")


def _controls(study: Study, accounted: bool) -> None:
    study.train("standard")
    study.train("fixed")


WORK: dict[StageName, Callable[[Study, bool], None]] = {
    "train": _train,
    "account": _account,
    "rewind": _rewind,
    "retrain": _retrain,
    "localize": _localize,
    "dropout": _dropout,
    "controls": _controls,
    "localize-dropout": partial(_localize, variant="example_tied"),
}
"""Stage to what it does; the second argument is whether the plain training keeps an account."""


def _numbers(model: nn.Module, dataset: Dataset, variant: Variant) -> dict[str, float]:
    if variant != "example_tied":
        return _present(accuracy(model, dataset.train, test=dataset.test))
    with dropout_mode(model, "drop"):
        dropped = _present(accuracy(model, dataset.train, test=dataset.test), "drop_")
    with dropout_mode(model, "train"):
        return _present(accuracy(model, dataset.train)) | dropped


def _present(result: Accuracy, prefix: str = "") -> dict[str, float]:
    return {prefix + name: value for name, value in result.shares().items() if value is not None}
