"""The settings of a study."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from memloc_ext import data
from memloc_ext.probes.audit import ScoreName
from memloc_ext.tasks import TaskName
from memloc_ext.training import TrainConfig
from memloc_ext.training.config import check_rules, check_types

Variant = Literal["plain", "example_tied", "standard", "fixed"]
"""The ways to train a model: without dropout, or with one of three."""


@dataclass(frozen=True)
class DataConfig:
    """Which examples, and which of them are to be memorized.

    Attributes:
        dataset: digits, mnist, cifar10, svhn; folder:PATH, with train/CLASS/ and test/CLASS/; or
            package.module:factory, a function of the seed that returns a training and a test set.
        root: Folder of the data set's files. Digits needs none.
        download: Download missing files.
        image_size: Side in pixels to which images of a folder are resized, without keeping the aspect ratio. By default
            the longer side of the first training image.
        normalization: Mean and standard deviation of the pixels: paper (0.5 and 0.5) or imagenet (of 3 channels).
        examples: Number of training examples, at least 1, drawn by the seed. By default all.
        test_examples: Number of test examples, at least 1, drawn by the seed. By default all.
        noise: Share of training examples that get a wrong label, in [0, 1]. None do if the data set says which examples
            are memorized, or if the task is not classification.
        noise_kind: uniform draws any wrong class; repo draws as the authors' code does, which
            leaves out one wrong class.
        memorized: File that says which training examples are memorized, instead of label noise: a mask, indices or
            scores.
        below: Examples with a score below this are memorized (0.5 for C-scores).
        above: Examples with a score above this are memorized (for Feldman-Zhang scores).
    """

    dataset: str = "digits"
    root: Path = Path("data")
    download: bool = False
    image_size: int | None = None
    normalization: Literal["paper", "imagenet"] = "paper"
    examples: int | None = None
    test_examples: int | None = None
    noise: float = 0.1
    noise_kind: data.NoiseKind = "uniform"
    memorized: Path | None = None
    below: float | None = None
    above: float | None = None

    def __post_init__(self) -> None:
        if self.memorized is None:
            for name, value in (("below", self.below), ("above", self.above)):
                if value is not None:
                    raise ValueError(
                        f"DataConfig: {name} must come with memorized (--memorized), the file of the scores, "
                        f"got {value} without"
                    )
        for name in ("examples", "test_examples"):
            value = getattr(self, name)
            check_rules(self, **{name: (value is None or value >= 1, "at least 1")})


@dataclass(frozen=True)
class ModelConfig:
    """Which model.

    Attributes:
        model: lenet, resnet9, resnet18, resnet50, vit, torchvision:NAME, timm:NAME; or package.module:factory, a
            function of the seed that returns a module.
        width: Factor on the channels of resnet9. By default 1, and 0.5 for digits.
    """

    model: str = "resnet9"
    width: float | None = None


@dataclass(frozen=True)
class DropoutConfig:
    """Settings of example-tied and standard dropout.

    Attributes:
        p_gen: Share of generalization channels, in [0, 1].
        p_mem: Probability that an example keeps a memorization channel, in [0, 1].
        rescale: Factor on generalization channels in mode drop, see `memloc_ext.nn.ExampleTiedDropout`.
        sites: Modules that are followed by dropout. By default the model's own sites.
        channel_dim: Dimension of the channels in the outputs of the sites: 1, or -1 for tokens. By default it is found
            from the model.
        standard_p: Probability that standard dropout zeroes an activation, in [0, 1].
        skip_channels: Do not compute channels that are dropped. Results are equal to rounding.
    """

    p_gen: float = 0.2
    p_mem: float = 0.1
    rescale: Literal["none", "authors", "expectation"] = "none"
    sites: tuple[str, ...] = ()
    channel_dim: Literal[1, -1] | None = None
    standard_p: float = 0.2
    skip_channels: bool = False

    def __post_init__(self) -> None:
        check_rules(self, channel_dim=(self.channel_dim in (None, 1, -1), "1, -1 or None"))


@dataclass(frozen=True)
class RewindConfig:
    """Settings of layer rewinding.

    Attributes:
        rewind_epochs: Epochs to which layer groups are rewound, each at least 0. By default the paper's.
        rewind_groups: Names of layer groups. By default all.
    """

    rewind_epochs: tuple[int, ...] = ()
    rewind_groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_types(self)
        check_rules(self, rewind_epochs=(min(self.rewind_epochs, default=0) >= 0, "at least 0"))


@dataclass(frozen=True)
class RetrainConfig:
    """Settings of layer retraining; the defaults are the paper's except for the batch size.

    The schedule is triangular; momentum and weight decay are those of `memloc_ext.training.TrainConfig`.

    Attributes:
        retrain_epochs: Maximum number of epochs on the clean examples, at least 1.
        retrain_learning_rate: Peak learning rate, positive.
        retrain_batch_size: Batch size, at least 1.
        patience: Stop after this many epochs in a row in which every clean example is fitted, at least 1.
        retrain_groups: Names of layer groups. By default all.

    Source: Maini et al., "Can Neural Network Memorization Be Localized?", ICML 2023, section on layer retraining.
    """

    retrain_epochs: int = 20
    retrain_learning_rate: float = 0.01
    retrain_batch_size: int = 64
    patience: int = 3
    retrain_groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_types(self)
        check_rules(
            self,
            retrain_epochs=(self.retrain_epochs >= 1, "at least 1"),
            retrain_batch_size=(self.retrain_batch_size >= 1, "at least 1"),
            patience=(self.patience >= 1, "at least 1"),
            retrain_learning_rate=(0 < self.retrain_learning_rate < math.inf, "positive and finite"),
        )


@dataclass(frozen=True)
class LocalizationConfig:
    """Settings of neuron localization.

    Attributes:
        localized: Number of memorized and of clean training examples to localize, at least 1.
        max_units: Maximum number of units that are switched off for one example, at least 1.
        edited: Number of these examples, of each kind, for which accuracy is measured after each unit, at least 0.
    """

    localized: int = 100
    max_units: int = 50
    edited: int = 20

    def __post_init__(self) -> None:
        check_types(self)
        for name, least in {"localized": 1, "max_units": 1, "edited": 0}.items():
            check_rules(self, **{name: (getattr(self, name) >= least, f"at least {least}")})


@dataclass(frozen=True)
class AuditConfig:
    """Settings of the audit.

    Attributes:
        top: Number of most suspect examples in the report, at least 1.
        score: Score that ranks the examples, see `memloc_ext.audit`. By default drop with example-tied dropout, and
            loss without.
    """

    top: int = 50
    score: ScoreName | None = None

    def __post_init__(self) -> None:
        check_rules(
            self,
            top=(self.top >= 1, "at least 1"),
            score=(self.score in (None, *get_args(ScoreName)), f"one of {', '.join(get_args(ScoreName))}"),
        )


@dataclass(frozen=True)
class StudyConfig:
    """Settings of a study.

    Attributes:
        data: The data.
        model: The model.
        dropout: Dropout.
        train: Training.
        rewind: Layer rewinding.
        retrain: Layer retraining.
        localization: Neuron localization.
        audit: The audit.
        task: What the model predicts: a class per example, or per token, see `memloc_ext.tasks`.
        account: Account the gradients of plain training. Takes longer, and changes the weights by rounding.
        device: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one and the package has CUDA kernels.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    dropout: DropoutConfig = field(default_factory=DropoutConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=20, batch_size=64, learning_rate=0.1))
    rewind: RewindConfig = field(default_factory=RewindConfig)
    retrain: RetrainConfig = field(default_factory=RetrainConfig)
    localization: LocalizationConfig = field(default_factory=LocalizationConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    task: TaskName = "classification"
    account: bool = True
    device: str = "auto"
