"""What each stage of a study does."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict
from functools import partial
from pathlib import Path

from torch import nn

from memloc_ext.accounted_training import AccountedBackward, accounting_cost, write_accounting_tables
from memloc_ext.accounting_files import ACCOUNTS, COST
from memloc_ext.analysis import Accuracy, accuracy, accuracy_by_mode, localize_dataset
from memloc_ext.data import Dataset
from memloc_ext.distributed import rank
from memloc_ext.files import write_json, write_table
from memloc_ext.localization_files import save_localization
from memloc_ext.nn import dropout_mode
from memloc_ext.study.config import StudyConfig
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
        self._trained: dict[Variant, nn.Module] = {}

    def check(self, stages: Collection[StageName]) -> None:
        """Raise what is wrong with the settings of the models of some stages, before anything is written."""
        for variant, stage in TRAINED.items():
            if stage in stages:
                build_model(self.config, self.dataset, variant)

    def train(self, variant: Variant, accounted: bool = False) -> None:
        """Train a model and evaluate it in every mode."""
        folder, dataset, settings = self.path / variant, self.dataset, self.config.train
        model = build_model(self.config, dataset, variant)
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
            accuracy_by_mode(model, dataset) if variant == "example_tied" else {AS_TRAINED: accuracy(model, dataset)}
        )
        if rank() == 0:
            write_table(folder, HISTORY, history)
            write_table(folder, METRICS, [{"model": variant, "mode": mode, **asdict(m)} for mode, m in modes.items()])
        self._trained[variant] = model

    def trained(self, variant: Variant) -> nn.Module:
        """Return a trained model, from its last checkpoint if it was not trained just now.

        Raises:
            FileNotFoundError: If that checkpoint is missing.
            ValueError: If it is damaged, or of another model.
        """
        if variant not in self._trained:
            model, epochs = build_model(self.config, self.dataset, variant), self.config.train.epochs
            found = list_checkpoints(self.checkpoints(variant))
            if epochs not in found:
                raise FileNotFoundError(
                    f"{self.checkpoints(variant)} lacks the checkpoint of epoch {epochs}; delete "
                    f"{self.path / 'stages' / TRAINED[variant]}.json to train again"
                )
            model.load_state_dict(load_checkpoint(found[epochs], self.dataset.train.device).model)
            self._trained[variant] = model
        return self._trained[variant]

    def checkpoints(self, variant: Variant) -> Path:
        """Return the folder of a model's checkpoints."""
        return self.path / variant / "checkpoints"


def _train(study: Study, accounted: bool) -> None:
    study.train("plain", accounted)


def _account(study: Study, accounted: bool) -> None:
    folder, settings = study.path / "plain", study.config.train
    cost = accounting_cost(study.trained("plain"), study.dataset.train, settings)
    if rank() == 0:
        write_accounting_tables(folder, settings.epochs)
        write_json(folder / COST, cost)


def _localize(study: Study, accounted: bool, variant: Variant = "plain") -> None:
    config = study.config
    result = localize_dataset(study.trained(variant), study.dataset, config.localization, seed=config.train.seed)
    if rank() == 0:
        save_localization(study.path / variant, result)


def _dropout(study: Study, accounted: bool) -> None:
    study.train("example_tied")


def _controls(study: Study, accounted: bool) -> None:
    study.train("standard")
    study.train("fixed")


WORK: dict[StageName, Callable[[Study, bool], None]] = {
    "train": _train,
    "account": _account,
    "localize": _localize,
    "dropout": _dropout,
    "controls": _controls,
    "localize-dropout": partial(_localize, variant="example_tied"),
}
"""Stage to what it does; the second argument is whether the plain training keeps an account."""


def _numbers(model: nn.Module, dataset: Dataset, variant: Variant) -> dict[str, float]:
    if variant != "example_tied":
        return _present(accuracy(model, dataset))
    with dropout_mode(model, "drop"):
        dropped = _present(accuracy(model, dataset), "drop_")
    with dropout_mode(model, "train"):
        return _present(accuracy(model, dataset, test=False)) | dropped


def _present(result: Accuracy, prefix: str = "") -> dict[str, float]:
    return {prefix + name: value for name, value in asdict(result).items() if value is not None}
