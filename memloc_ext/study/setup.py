"""What a study is about: its examples, its models, its device."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from memloc_ext import data, models
from memloc_ext._libraries import has_cuda_kernels
from memloc_ext._torchvision import import_torchvision
from memloc_ext.data import Dataset
from memloc_ext.distributed import own_device
from memloc_ext.models.layout import layout_of
from memloc_ext.nn import FixedDropout, insert_after, insert_example_tied_dropout
from memloc_ext.parts import fingerprint
from memloc_ext.study.config import StudyConfig, Variant
from memloc_ext.study.own import OwnDataset, OwnExamples, called, is_own

StudyData: TypeAlias = Dataset | OwnDataset
_ROWS = 1024
"""Images whose pixels are read at a time."""


def load_data(config: StudyConfig, say: Callable[[str], object] = lambda _: None) -> StudyData:
    """Load the data set of a study on its device, with its label noise or its memorized examples.

    A part of the training examples keep their numbers in the data set. ``say`` gets a line on how each file was
    understood that can be in more than one way.
    """
    settings, seed = config.data, config.train.seed
    if is_own(settings.dataset):
        dataset = OwnDataset.load(settings.dataset, seed, find_device(config.device))
    else:
        names = ("root", "download", "image_size", "normalization")
        dataset = data.load(settings.dataset, **{name: getattr(settings, name) for name in names})
    count = len(dataset.train)
    rows = _drawn("examples", count, settings.examples, seed)
    test_rows = _drawn("test_examples", len(dataset.test), settings.test_examples, seed)
    if settings.memorized is not None:
        thresholds = {"below": settings.below, "above": settings.above}
        mask = data.memorized_mask(settings.memorized, count, **thresholds, part=rows, say=say)
        dataset = replace(dataset, train=replace(dataset.train, memorized=mask.to(dataset.train.device)))
    parts: dict[str, Any] = {"train": rows, "test": test_rows}
    parts = {name: getattr(dataset, name).subset(rows) for name, rows in parts.items() if rows is not None}
    dataset = replace(dataset, **parts)
    if isinstance(dataset, OwnDataset):
        noisy = settings.memorized is None and not dataset.marked and config.task == "classification"
        return dataset.with_noise(settings.noise, settings.noise_kind, seed) if noisy else dataset
    if settings.memorized is None:
        dataset = data.with_label_noise(dataset, settings.noise, kind=settings.noise_kind, seed=seed)
    return dataset.to(find_device(config.device))


def _drawn(name: str, count: int, wanted: int | None, seed: int) -> Tensor | None:
    if wanted is None:
        return None
    if wanted > count:
        raise ValueError(f"{name} must be at most {count}, which there are, got {wanted}")
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:wanted].sort().values


def fingerprint_data(dataset: StudyData) -> str:
    """Return what stands for all of a data set: pixels, labels, and which examples are memorized."""
    names: list[object] = []
    for split in (dataset.train, dataset.test):
        if isinstance(split, OwnExamples):
            names.append(split.pixels)
        else:
            names += [fingerprint(split.inputs[rows]) for rows in torch.arange(len(split)).split(_ROWS)]
            names.append(split.normalization)
        names.append(fingerprint(split.labels, split.true_labels, split.memorized, split.indices))
    return fingerprint(names)


def build_model(config: StudyConfig, dataset: StudyData, variant: Variant) -> nn.Module:
    """Build a study's model with the dropout of a variant; all variants start from the same weights."""
    seed, settings = config.train.seed, config.dropout
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = _untrained(config, dataset)
    if variant != "plain":
        sites = list(settings.sites) or models.dropout_sites(model)
        layout = layout_of(model)
        dim = layout.channel_dim if layout and settings.channel_dim is None else settings.channel_dim
        if variant == "example_tied":
            shares = {"p_gen": settings.p_gen, "p_mem": settings.p_mem, "rescale": settings.rescale}
            insert_example_tied_dropout(model, sites, **shares, seed=seed, channel_dim=dim, skip=settings.skip_channels)
        elif variant == "standard":
            insert_after(model, sites, lambda _: nn.Dropout(settings.standard_p))
        else:
            shares = (settings.p_gen, settings.p_mem)
            insert_after(model, sites, lambda site: FixedDropout(*shares, seed=seed, site=site, channel_dim=dim))
    return model.to(dataset.train.device)


def _untrained(config: StudyConfig, dataset: StudyData) -> nn.Module:
    name, width = config.model.model, config.model.width
    library, colon, inner = name.partition(":")
    if is_own(name) and library not in ("torchvision", "timm"):
        model = called("--model", name, config.train.seed)
        if not isinstance(model, nn.Module):
            raise ValueError(f"--model {name} must return a torch.nn.Module, got {type(model).__name__}")
        return model
    if isinstance(dataset, OwnDataset):
        x = dataset.train.batch(torch.arange(1)).x
        if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[2] != x.shape[3]:
            raise ValueError(f"--model {name} takes square images; name a function of your own that makes a model")
        classes = 1 + max(int(split.true_labels.max()) for split in (dataset.train, dataset.test))
        channels, size = x.shape[1], x.shape[2]
    else:
        classes, channels, size = dataset.num_classes, dataset.in_channels, dataset.image_size
    if library == "torchvision" and colon:
        if channels != 3:
            raise ValueError(f"--model {name} takes images of 3 channels, got {channels}")
        return import_torchvision("models").get_model(inner, weights=None, num_classes=classes)
    if library == "timm" and colon:
        try:
            import_torchvision()  # which timm imports
            import timm  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError(f"--model {name} needs timm; run: pip install timm") from error
        if not timm.is_model(inner):
            raise ValueError(f"--model {name} must be of timm.list_models(), got {inner}")
        known = timm.models.get_pretrained_cfg(inner)
        sized = {"img_size": size} if known is not None and known.fixed_input_size else {}
        return timm.create_model(inner, num_classes=classes, in_chans=channels, **sized)
    if width is None:
        width = 0.5 if (name, config.data.dataset) == ("resnet9", "digits") else 1.0
    return models.build(name, num_classes=classes, in_channels=channels, image_size=size, width=width)


def fingerprint_model(config: StudyConfig, dataset: StudyData) -> str:
    """Return what stands for a study's model: its modules, its initial weights, and the code of a user's own."""
    model = build_model(config, dataset, "plain")  # the other models start from its weights
    own = sys.modules.get(config.model.model.partition(":")[0])
    return fingerprint(str(model), model.state_dict(), inspect.getsource(own) if own else "")


def find_device(name: str) -> torch.device:
    """Return the device of a study, see `StudyConfig`; ValueError if it is not there, or the build lacks its kernels.

    Of the processes that torchrun starts, each takes the GPU of its own number.
    """
    gpu = torch.cuda.is_available() and has_cuda_kernels
    if name == "auto":
        name = "cuda" if gpu else "cpu"
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if not match:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:<number>, got {name!r}")
    if name != "cpu" and (not gpu or int(match[1] or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device must be one that torch and this build can use, see `memloc info`, got {name!r}")
    return own_device(torch.device(name))
