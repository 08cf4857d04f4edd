"""The paper's training study: one data set, several ways to train, every mode of evaluation, one run directory."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from memloc_ext import data, models
from memloc_ext._libraries import has_cuda_kernels
from memloc_ext.accounted_training import AccountedBackward, accounting_cost, write_accounting_tables
from memloc_ext.accounting_files import ACCOUNTS, COST
from memloc_ext.analysis import Accuracy, LocalizationConfig, accuracy, accuracy_by_mode, localize_dataset
from memloc_ext.data import Dataset, Split
from memloc_ext.files import write_json, write_table
from memloc_ext.localization_files import SUMMARY, save_localization
from memloc_ext.nn import FixedDropout, dropout_mode, insert_after, insert_example_tied_dropout
from memloc_ext.run_directory import ACCOUNTED, AS_TRAINED, HISTORY, LOCALIZED, METRICS, Run, load_run, open_run
from memloc_ext.training import TrainConfig, train

Variant = Literal["plain", "example_tied", "standard", "fixed"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)


@dataclass(frozen=True)
class DataConfig:
    """Which examples, and which of them have to be memorized.

    Attributes:
        dataset: digits, mnist, cifar10, svhn, or folder:PATH with train/ and test/ in it, a folder per class in each.
        root: Folder of the data sets' files; digits needs none.
        download: Fetch the files that are missing.
        image_size: Resize the images of a folder to this side, in pixels.
        noise: Share of training examples that get a wrong label, in [0, 1].
        noise_kind: uniform: any wrong class; repo: as the authors' code draws it, which leaves one out.
        memorized: File of a mask, of indices or of scores; its examples count as memorized, in place of label noise.
        below: Memorized are the scores below this (C-scores: 0.5).
        above: Memorized are the scores above this (Feldman-Zhang).
    """

    dataset: str = "digits"
    root: Path = Path("data")
    download: bool = False
    image_size: int | None = None
    noise: float = 0.1
    noise_kind: data.NoiseKind = "uniform"
    memorized: Path | None = None
    below: float | None = None
    above: float | None = None


@dataclass(frozen=True)
class ModelConfig:
    """Which model.

    Attributes:
        model: lenet, resnet9, resnet18, resnet50 or vit.
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
        standard_p: Probability that standard dropout zeroes an activation, in [0, 1].
    """

    p_gen: float = 0.2
    p_mem: float = 0.1
    rescale: Literal["none", "authors", "expectation"] = "none"
    sites: tuple[str, ...] = ()
    standard_p: float = 0.2


@dataclass(frozen=True)
class StudyConfig:
    """All settings of a study; ``train.seed`` also names the noise, the initial weights and the dropout masks.

    Attributes:
        data: The examples.
        model: The model.
        dropout: The dropouts.
        train: The training.
        localization: The search for the units that flip examples.
        device: cpu, cuda, cuda:1, ...; auto is a GPU where there is one and the build has kernels for it.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    dropout: DropoutConfig = field(default_factory=DropoutConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=20, batch_size=64, learning_rate=0.1))
    localization: LocalizationConfig = field(default_factory=LocalizationConfig)
    device: str = "auto"

    def as_json(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        return json.loads(json.dumps(asdict(self), default=str))


def load_data(config: StudyConfig) -> Dataset:
    """Load the data set of a study on its device, with its label noise or its memorized examples."""
    settings = config.data
    dataset = data.load(
        settings.dataset, root=settings.root, download=settings.download, image_size=settings.image_size
    )
    if settings.memorized is None:
        dataset = data.with_label_noise(dataset, settings.noise, kind=settings.noise_kind, seed=config.train.seed)
    else:
        mask = data.memorized_mask(settings.memorized, len(dataset.train), below=settings.below, above=settings.above)
        dataset = data.with_memorized(dataset, mask)
    return dataset.to(_device(config.device))


def build_model(config: StudyConfig, dataset: Dataset, variant: Variant) -> nn.Module:
    """Build a study's model with the dropout of a variant; all variants start from the same weights.

    Args:
        config: The settings.
        dataset: What `load_data` returned.
        variant: ``plain`` without dropout, ``example_tied``, ``standard`` (torch's) or ``fixed`` (one mask for all).
    """
    seed, settings = config.train.seed, config.dropout
    width = config.model.width
    if width is None:
        width = 0.5 if (config.model.model, dataset.name) == ("resnet9", "digits") else 1.0
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = models.build(
            config.model.model,
            num_classes=dataset.num_classes,
            in_channels=dataset.in_channels,
            image_size=dataset.image_size,
            width=width,
        )
    if variant != "plain":
        sites = list(settings.sites) or models.dropout_sites(model)
        dim = models.channel_dim(model)
        if variant == "example_tied":
            insert_example_tied_dropout(
                model,
                sites,
                p_gen=settings.p_gen,
                p_mem=settings.p_mem,
                seed=seed,
                channel_dim=dim,
                rescale=settings.rescale,
            )
        elif variant == "standard":
            insert_after(model, sites, lambda _: nn.Dropout(settings.standard_p))
        else:
            insert_after(
                model,
                sites,
                lambda site: FixedDropout(settings.p_gen, settings.p_mem, seed=seed, site=site, channel_dim=dim),
            )
    return model.to(dataset.train.device)


def run_study(
    config: StudyConfig,
    output: str | Path,
    *,
    variants: Sequence[Variant] = VARIANTS,
    accounting: bool = False,
    localization: bool = False,
    progress: bool = True,
    tensorboard: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Run:
    """Train the variants, evaluate each in every mode, and write all of it to a run directory.

    A run that was interrupted goes on where it was if called again; a finished one is evaluated again only.

    Args:
        config: The settings.
        output: The run directory; created if missing.
        variants: Which models to train.
        accounting: Keep an account of the gradients of the plain training, and measure what that costs.
        localization: Search for the units that flip examples, in the plain and the example-tied model.
        progress: Show a bar of the epochs on a terminal.
        tensorboard: Log every epoch under ``<output>/<variant>/tensorboard``.
        say: Called with a line before each training and each localization.

    Returns:
        The run as `load_run` reads it.

    Raises:
        ValueError: If a setting is wrong, the plain training cannot be accounted, or ``output`` holds a run with other
            settings.
        FileNotFoundError: If the data set's files are missing.
    """
    if accounting and ACCOUNTED not in variants:
        raise ValueError(f"run_study: variants must hold {ACCOUNTED} for its accounting, got {', '.join(variants)}")
    if accounting and config.train.compile:
        raise ValueError("accounting needs the calls of single modules: leave out --compile, or give --no-accounting")
    localized = [variant for variant in LOCALIZED if localization and variant in variants]
    if localization and not localized:
        known = " or ".join(LOCALIZED)
        raise ValueError(f"run_study: variants must hold {known} for its localization, got {', '.join(variants)}")
    settings = {"variants": list(variants), "accounting": accounting, **config.as_json()}
    settings["localization"] = settings["localization"] if localization else None
    dataset = load_data(config)
    networks: dict[Variant, nn.Module] = {variant: build_model(config, dataset, variant) for variant in variants}
    path = open_run(output, settings)
    rows: list[dict[str, Any]] = []
    for number, (variant, model) in enumerate(networks.items(), 1):
        say(f"[{number}/{len(networks)}] {variant}: {config.train.epochs} epochs on {dataset.name}")
        folder = path / variant
        folder.mkdir(exist_ok=True)
        accounted = accounting and variant == ACCOUNTED
        history = train(
            model,
            dataset.train,
            config.train,
            checkpoints=folder / "checkpoints",
            evaluate=partial(_numbers, dataset=dataset, variant=variant),
            backward=AccountedBackward(model, dataset.train, folder / ACCOUNTS) if accounted else None,
            progress=progress,
            tensorboard=folder / "tensorboard" if tensorboard else None,
        )
        write_table(folder, HISTORY, history)
        if accounted:
            _close_accounting(folder, model, dataset.train, config.train)
        if variant == "example_tied":
            modes = accuracy_by_mode(model, dataset)
        else:
            modes = {AS_TRAINED: accuracy(model, dataset)}
        rows += [{"model": variant, "mode": mode, **asdict(result)} for mode, result in modes.items()]
        if variant in localized and not (folder / SUMMARY).exists():  # a finished one is kept, its time with it
            each = config.localization.localized
            say(f"[{number}/{len(networks)}] {variant}: localization of {each} memorized and {each} clean examples")
            result = localize_dataset(model, dataset, config.localization, seed=config.train.seed)
            save_localization(folder, result)
    write_table(path, METRICS, rows)
    return load_run(path)


def _close_accounting(folder: Path, model: nn.Module, split: Split, config: TrainConfig) -> None:
    write_accounting_tables(folder, config.epochs)
    if not (folder / COST).exists():  # a measurement is kept: another would differ
        write_json(folder / COST, accounting_cost(model, split, config))


def _numbers(model: nn.Module, dataset: Dataset, variant: Variant) -> dict[str, float]:
    if variant != "example_tied":
        return _present(accuracy(model, dataset))
    with dropout_mode(model, "drop"):
        dropped = _present(accuracy(model, dataset), "drop_")
    with dropout_mode(model, "train"):
        return _present(accuracy(model, dataset, test=False)) | dropped


def _present(result: Accuracy, prefix: str = "") -> dict[str, float]:
    return {prefix + name: value for name, value in asdict(result).items() if value is not None}


def _device(name: str) -> torch.device:
    gpu = torch.cuda.is_available() and has_cuda_kernels
    if name == "auto":
        return torch.device("cuda" if gpu else "cpu")
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if not match:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:<number>, got {name!r}")
    if name != "cpu" and (not gpu or int(match[1] or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device must be one that torch and this build can use, see `memloc info`, got {name!r}")
    return torch.device(name)
