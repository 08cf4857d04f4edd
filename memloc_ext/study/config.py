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
    """Which examples, and which of them have to be memorized.

    Attributes:
        dataset: digits, mnist, cifar10, svhn, or folder:PATH with train/ and test/ in it, a folder per class in each;
            or package.module:factory, which is called with the seed and returns a training and a test set, see
            `memloc_ext.examples`, whose items are the same each time.
        root: Folder of the data sets' files; digits needs none.
        download: Fetch the files that are missing.
        image_size: Side in pixels that the images of a folder are resized to, stretched if they are not square; by
            default the longer side of the first training image.
        normalization: Mean and standard deviation of the images' pixels: paper for 0.5 and 0.5, or imagenet, which has
            3 channels; a data set of one's own has its own.
        examples: Train on so many of the training examples only, at least 1, drawn by the seed; by default on all.
        test_examples: Evaluate on so many of the test examples only, likewise.
        noise: Share of training examples that get a wrong label, in [0, 1]; none of a data set of one's own that says
            itself which are memorized, or of other tasks than classification.
        noise_kind: uniform: any wrong class; repo: as the authors' code draws it, which leaves one out.
        memorized: File of a mask, of indices or of scores, in place of label noise; of all training examples, or of
            those that examples and the seed choose.
        below: Memorized are the scores below this (C-scores: 0.5).
        above: Memorized are the scores above this (Feldman-Zhang).
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
        model: lenet, resnet9, resnet18, resnet50 or vit; or package.module:factory, which is called with the seed and
            returns a module; or torchvision:NAME or timm:NAME.
        width: Factor on the channels of resnet9; by default 1, and 0.5 on digits, whose images are small.
    """

    model: str = "resnet9"
    width: float | None = None


@dataclass(frozen=True)
class DropoutConfig:
    """How the dropouts are set.

    Attributes:
        p_gen: Share of generalization channels, in [0, 1].
        p_mem: Probability that an example keeps a memorization channel, in [0, 1].
        rescale: What drop multiplies generalization channels by, see ExampleTiedDropout.
        sites: Modules after which dropout goes; by default the model's own sites.
        channel_dim: Dimension of the channels in what these return: 1, or -1 for tokens. By default the model's own, or
            1; three dimensions are then refused but behind a module that tells, such as Conv1d.
        standard_p: Probability that standard dropout zeroes an activation, in [0, 1].
        skip_channels: Whether training skips the work for channels that are not kept; results are equal to rounding.
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
    """Which layer groups are rewound, and how far.

    Attributes:
        rewind_epochs: Epochs whose weights the groups get back, each at least 0; none for the paper's, see `rewind`.
        rewind_groups: Names of layer groups; none for all of the model's.
    """

    rewind_epochs: tuple[int, ...] = ()
    rewind_groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_types(self)
        check_rules(self, rewind_epochs=(min(self.rewind_epochs, default=0) >= 0, "at least 0"))


@dataclass(frozen=True)
class RetrainConfig:
    """Which layer groups are trained anew, and how; the defaults are the paper's but for the batch size.

    The schedule is triangular; momentum and weight decay are those of `memloc_ext.training.TrainConfig`.

    Attributes:
        retrain_epochs: Largest number of passes over the clean examples, at least 1.
        retrain_learning_rate: Peak of the schedule, positive.
        retrain_batch_size: Examples in a batch, at least 1.
        patience: Epochs in a row with every clean example fitted after which the training stops, at least 1.
        retrain_groups: Names of layer groups; none for all of the model's.

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
    """How many examples are localized, and how far.

    Attributes:
        localized: Training examples whose units are searched for, at least 1: so many memorized and so many clean ones.
        max_units: Largest number of units that are switched off for an example, at least 1.
        edited: Of these examples, how many of each kind have accuracy measured after each of their units, at least 0.
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
    """How training examples are ranked by how memorized they are, and how many a report shows.

    Attributes:
        top: Most suspect examples in the report, at least 1.
        score: What ranks the examples, see `memloc_ext.audit`; by default drop with example-tied dropout, loss without,
            where there is no drop.
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
    """All settings of a study; ``train.seed`` also names the noise, the initial weights and the dropout masks.

    Attributes:
        data: The examples.
        model: The model.
        dropout: The dropouts.
        train: The training.
        rewind: The layer groups that are put back to earlier epochs.
        retrain: The layer groups that are trained anew.
        localization: The search for the units that flip examples.
        audit: The ranking of training examples.
        task: What the model is to predict, see `memloc_ext.tasks`.
        account: Keep an account of the gradients of plain training. That takes longer, and is another training than
            one without: the weights differ by rounding.
        device: cpu, cuda, cuda:1, ...; auto is a GPU where there is one and the build has kernels for it.
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
