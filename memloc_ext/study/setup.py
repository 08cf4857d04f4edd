"""What a study is about: its examples, its models, its device."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from memloc_ext import data, models
from memloc_ext._libraries import has_cuda_kernels
from memloc_ext.data import Dataset, Split
from memloc_ext.distributed import own_device
from memloc_ext.nn import FixedDropout, insert_after, insert_example_tied_dropout
from memloc_ext.parts import fingerprint
from memloc_ext.study.config import StudyConfig, Variant

_ROWS = 1024
"""Images whose pixels are read at a time."""


def load_data(config: StudyConfig, say: Callable[[str], object] = lambda _: None) -> Dataset:
    """Load the data set of a study on its device, with its label noise or its memorized examples.

    A part of the training examples keep their numbers in the data set.

    Args:
        config: The settings.
        say: Called with a line on how each file was understood that can be in more than one way.
    """
    settings = config.data
    dataset = data.load(
        settings.dataset, root=settings.root, download=settings.download, image_size=settings.image_size
    )
    seed, count = config.train.seed, len(dataset.train)
    rows = _drawn("examples", count, settings.examples, seed)
    test_rows = _drawn("test_examples", len(dataset.test), settings.test_examples, seed)
    if settings.memorized is not None:
        thresholds = {"below": settings.below, "above": settings.above}
        mask = data.memorized_mask(settings.memorized, count, **thresholds, part=rows, say=say)
        dataset = data.with_memorized(dataset, mask)
    dataset = replace(dataset, train=_part(dataset.train, rows), test=_part(dataset.test, test_rows))
    if settings.memorized is None:
        dataset = data.with_label_noise(dataset, settings.noise, kind=settings.noise_kind, seed=seed)
    return dataset.to(find_device(config.device))


def _drawn(name: str, count: int, wanted: int | None, seed: int) -> Tensor | None:
    if wanted is None:
        return None
    if wanted > count:
        raise ValueError(f"{name} must be at most {count}, which there are, got {wanted}")
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:wanted].sort().values


def _part(split: Split, rows: Tensor | None) -> Split:
    return split if rows is None else split.subset(rows)


def fingerprint_data(dataset: Dataset) -> str:
    """Return what stands for all of a data set: pixels, labels, and which examples are memorized."""
    names = []
    for split in (dataset.train, dataset.test):
        names += [fingerprint(split.inputs[rows]) for rows in torch.arange(len(split)).split(_ROWS)]
        names.append(fingerprint(split.labels, split.true_labels, split.memorized, split.indices))
    return fingerprint(names)


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


def find_device(name: str) -> torch.device:
    """Return the device of a study.

    Args:
        name: See `StudyConfig`; of the processes that torchrun starts, each takes the GPU of its own number.

    Raises:
        ValueError: If there is no such device, or the build has no kernels for it.
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
