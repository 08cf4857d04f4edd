"""Label noise: mislabel a fixed number of training examples, which a network can then only memorize."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Literal, get_args

import torch
from torch import Tensor

from memloc_ext.data.split import Dataset

NoiseKind = Literal["uniform", "repo"]


def label_noise(
    labels: Tensor, num_classes: int, fraction: float, *, kind: NoiseKind = "uniform", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Replace the labels of exactly ``floor(fraction * N)`` examples, drawn without replacement, by wrong ones.

    ``fraction`` counts as the decimal it is written as: 0.29 of 100 examples are 29, although the float 0.29 is a
    little less. A larger fraction with the same seed keeps the examples and labels of a smaller one.

    Args:
        labels: True labels, ``[N]``, int64, in ``[0, num_classes)``. Not modified.
        num_classes: Number of classes; to mislabel an example, at least 2 for ``uniform`` and 3 for ``repo``.
        fraction: Share of noisy examples, in ``[0, 1]``.
        kind: ``uniform`` draws each of the ``num_classes - 1`` wrong classes with equal probability. ``repo`` is the
            published code of the paper: it never draws the class just before the true one (cyclically).
        seed: Seeds a generator of its own; the global one is not touched.

    Returns:
        The noisy labels, ``[N]`` int64, and the mask of replaced ones, ``[N]`` bool, on the device of ``labels``.

    Raises:
        ValueError: If a shape or value breaks the above.
        TypeError: If ``labels`` is not int64.

    Source: Maini et al., "Can Neural Network Memorization Be Localized?", ICML 2023.
    """
    if kind not in get_args(NoiseKind):
        raise ValueError(f"label_noise: kind must be one of {', '.join(get_args(NoiseKind))}, got {kind!r}")
    if not 0 <= fraction <= 1:
        raise ValueError(f"label_noise: fraction must be in [0, 1], got {fraction}")
    if labels.dtype != torch.int64:
        raise TypeError(f"label_noise: labels must be torch.int64, got {labels.dtype}")
    if labels.dim() != 1:
        raise ValueError(f"label_noise: labels must be [N], got {list(labels.shape)}")
    num = len(labels)
    count = math.floor(Fraction(repr(float(fraction))) * num)
    fewest = 2 if kind == "uniform" else 3
    if count > 0 and num_classes < fewest:
        got = f"{num_classes}; give fraction 0 (--noise 0) for none"
        raise ValueError(f"label_noise: num_classes must be at least {fewest} for kind {kind!r}, got {got}")
    if labels.numel() and not (labels.min() >= 0 and labels.max() < num_classes):
        got = f"{int(labels.min())} .. {int(labels.max())}"
        raise ValueError(f"label_noise: labels must be in [0, {num_classes}), got {got}")
    noisy, mask = labels.clone(), torch.zeros_like(labels, dtype=torch.bool)
    if count == 0:
        return noisy, mask
    generator = torch.Generator().manual_seed(seed)
    # both are drawn for all examples and then cut, so that they do not depend on the fraction
    chosen = torch.randperm(num, generator=generator)[:count].to(labels.device)
    largest = num_classes - 1 if kind == "uniform" else num_classes - 2
    offsets = torch.randint(1, largest + 1, (num,), generator=generator)[:count].to(labels.device)
    noisy[chosen] = (labels[chosen] + offsets) % num_classes
    mask[chosen] = True
    return noisy, mask


def with_label_noise(dataset: Dataset, fraction: float, *, kind: NoiseKind = "uniform", seed: int = 0) -> Dataset:
    """Return ``dataset`` with `label_noise` on its training split, whose ``memorized`` mask it sets.

    The noise starts from the true labels: labels and mask that an earlier call set are replaced. The test split keeps
    its labels.
    """
    train = dataset.train
    labels, mask = label_noise(train.true_labels, dataset.num_classes, fraction, kind=kind, seed=seed)
    return replace(dataset, train=replace(train, labels=labels, memorized=mask))
