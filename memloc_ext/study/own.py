"""Models and data sets of a user's own, named on the command line by a function that makes them."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from memloc_ext.batches import Batch, tensors_of
from memloc_ext.data import NoiseKind, label_noise
from memloc_ext.examples import Examples, Shard, examples
from memloc_ext.marks import ByNumber, marked, truth
from memloc_ext.parts import fingerprint

_BATCH = 512


def is_own(name: str) -> bool:
    """Return whether a name is ``package.module:factory``."""
    module, colon, factory = name.partition(":")
    return bool(colon) and factory.isidentifier() and all(part.isidentifier() for part in module.split("."))


def called(option: str, name: str, seed: int) -> Any:
    """Import a factory, also from the current folder, and return what it makes for a seed; ValueError without one."""
    module, _, factory = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    function = getattr(importlib.import_module(module), factory, None)
    if not callable(function):
        raise ValueError(f"{option} must name a function, package.module:factory, got {name}: {module} has none such")
    return function(seed)


@dataclass(frozen=True, eq=False)
class OwnExamples:
    """Examples of a user's data set, read as it reads them, with what a study has to know of each.

    Attributes:
        source: Where they are read.
        labels: Labels to train on, ``[N, *]``, by row.
        true_labels: Labels before any noise, likewise.
        memorized: Which of them have to be memorized, ``[N]``, bool.
        pixels: Fingerprint of all inputs.
        relabelled: Whether ``labels`` take the place of those that are read.
    """

    source: Examples
    labels: Tensor
    true_labels: Tensor
    memorized: Tensor
    pixels: str
    relabelled: bool = False

    @classmethod
    def of(cls, option: str, data: Any, device: torch.device) -> tuple[OwnExamples, bool]:
        """Read a data set once; return its examples, and whether it says which are memorized."""
        source = examples(option, data, device)
        rows = torch.arange(len(source))
        seen, labels = [], []
        for x, y, _ in source.subset(rows).batches(_BATCH):
            if not isinstance(y, Tensor):
                raise ValueError(f"{option}: the labels of a batch must be a tensor, got {type(y).__name__}")
            labels.append(y)
            seen += map(fingerprint, tensors_of(x))
        if not labels:
            raise ValueError(f"{option} must hold at least one example, got none")
        every, ids = torch.cat(labels), source.indices.to(device)
        marks, true = marked(option, None, data), truth(option, None, data)
        memorized = torch.zeros(len(rows), dtype=torch.bool, device=device) if marks is None else marks(ids)
        return cls(source, every, every if true is None else true(ids), memorized, fingerprint(seen)), marks is not None

    @property
    def device(self) -> torch.device:
        """Where batches are."""
        return self.source.device

    @property
    def indices(self) -> Tensor:
        """Number of each example, ``[N]``, int64."""
        return self.source.indices

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, rows: Tensor) -> Batch:
        """Return the examples in some rows."""
        return self._relabelled(self.source.batch(rows))

    def batches(
        self, batch_size: int | Sequence[int], generator: torch.Generator | None = None, *, shard: Shard = (0, 1)
    ) -> Iterator[Batch]:
        """Iterate once over all examples, see `memloc_ext.examples.Examples`."""
        return map(self._relabelled, self.source.batches(batch_size, generator, shard=shard))

    def subset(self, rows: Tensor) -> OwnExamples:
        """Return the examples in some rows, ``[B]`` int64 or ``[N]`` bool, which keep their numbers."""
        rows = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows
        own = rows.to(self.labels.device)
        columns = {name: getattr(self, name)[own] for name in ("labels", "true_labels", "memorized")}
        pixels = fingerprint(self.pixels, rows)
        return replace(self, source=self.source.subset(rows.cpu()), pixels=pixels, **columns)

    def to(self, device: torch.device) -> OwnExamples:
        """Return the same with batches on another device."""
        columns = {name: getattr(self, name).to(device) for name in ("labels", "true_labels", "memorized")}
        return replace(self, source=self.source.to(device), **columns)

    def _relabelled(self, batch: Batch) -> Batch:
        if not self.relabelled:
            return batch
        return batch._replace(y=ByNumber("labels", self.labels, self.indices)(batch.ids))


@dataclass(frozen=True, eq=False)
class OwnDataset:
    """What a user's factory returned, and whether it says itself which of the training examples are memorized."""

    train: OwnExamples
    test: OwnExamples
    marked: bool

    @classmethod
    def load(cls, name: str, seed: int, device: torch.device) -> OwnDataset:
        """Call a factory; ValueError if it does not return a training and a test set."""
        made = called("--dataset", name, seed)
        if not isinstance(made, tuple | list) or len(made) != 2:
            raise ValueError(f"--dataset {name} must return the training and the test set, got {type(made).__name__}")
        train, is_marked = OwnExamples.of(f"{name}, train", made[0], device)
        return cls(train, OwnExamples.of(f"{name}, test", made[1], device)[0], is_marked)

    def with_noise(self, fraction: float, kind: NoiseKind, seed: int) -> OwnDataset:
        """Return the data set with label noise on its training examples."""
        labels = self.train.true_labels
        classes = 1 + max(int(labels.max()), int(self.test.labels.max()))
        noisy, mask = label_noise(labels.cpu(), classes, fraction, kind=kind, seed=seed)
        columns = {"labels": noisy.to(labels.device), "memorized": mask.to(labels.device)}
        return replace(self, train=replace(self.train, **columns, relabelled=True))
