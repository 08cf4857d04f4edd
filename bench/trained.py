"""Networks that have fitted a training set with wrong labels, as the search for the units that flip examples needs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from memloc_ext import data
from memloc_ext.data import Split
from memloc_ext.study import DataConfig, ModelConfig, StudyConfig, build_model, load_data
from memloc_ext.training import TrainConfig, train

MNIST_EXAMPLES = 5000
REFERENCE = 512


def mnist_folder() -> Path | None:
    """Return the folder of the data sets' files, that MEMLOC_DATA names, if MNIST is there."""
    folder = Path(os.environ.get("MEMLOC_DATA", "data"))
    return folder if (folder / "MNIST").is_dir() else None


def digits(seed: int) -> StudyConfig:
    """Return the settings of ``memloc run``."""
    return StudyConfig(train=replace(StudyConfig().train, seed=seed), device="cpu")


def mnist(seed: int) -> StudyConfig:
    """Return those for a part of MNIST: ResNet-9 with a quarter of its channels."""
    folder = mnist_folder()
    assert folder is not None
    return StudyConfig(
        data=DataConfig(dataset="mnist", root=folder),
        model=ModelConfig(width=0.25),
        train=TrainConfig(epochs=20, batch_size=64, learning_rate=0.1, seed=seed),
        device="cpu",
    )


STUDIES: dict[str, Callable[[int], StudyConfig]] = {"digits": digits, "mnist": mnist}


@dataclass(frozen=True)
class Trained:
    """A network and its training set.

    Attributes:
        model: In evaluation mode.
        split: The training examples.
        fitted: Positions of the examples that the network predicts as labelled, ``[*]``, in random order.
    """

    model: nn.Module
    split: Split
    fitted: Tensor

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs and labels of some examples."""
        inputs, labels, _ = self.split.batch(rows)
        return inputs, labels

    def noisy(self, count: int) -> Tensor:
        """Return positions of fitted examples with a wrong label, at most so many."""
        return self.fitted[self.split.memorized[self.fitted]][:count]

    def clean(self, count: int) -> Tensor:
        """Return positions of fitted examples with their true label, at most so many, none of the reference's."""
        return self._clean()[REFERENCE:][:count]

    def reference(self) -> Tensor:
        """Return positions of 512 examples with their true label, that stand for the population."""
        return self._clean()[:REFERENCE]

    def _clean(self) -> Tensor:
        return self.fitted[~self.split.memorized[self.fitted]]


def trained(config: StudyConfig) -> Trained:
    """Train the plain network of a study; on MNIST on 5,000 examples, drawn by the seed."""
    seed = config.train.seed
    generator = torch.Generator().manual_seed(seed)
    if config.data.dataset == "mnist":
        whole = data.load("mnist", root=config.data.root)
        rows = torch.randperm(len(whole.train), generator=generator)[:MNIST_EXAMPLES]
        part = replace(whole, train=whole.train.subset(rows))
        dataset = data.with_label_noise(part, config.data.noise, kind=config.data.noise_kind, seed=seed)
    else:
        dataset = load_data(config)
        assert isinstance(dataset, data.Dataset)  # not one of a user's own
    model = build_model(config, dataset, "plain")
    with tempfile.TemporaryDirectory() as checkpoints:
        train(model, dataset.train, config.train, checkpoints=checkpoints, progress=False)
    model.eval()
    with torch.no_grad():
        predicted = torch.cat([model(inputs).argmax(1) for inputs, _, _ in dataset.train.batches(512)])
    fitted = (predicted == dataset.train.labels).nonzero()[:, 0]
    return Trained(model, dataset.train, fitted[torch.randperm(len(fitted), generator=generator)])
