"""A data set: a training split, a test split, and the names of the classes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from memloc_ext.data.split import Normalization, Split


@dataclass(frozen=True, eq=False)
class Dataset:
    """Two splits of equally sized images with the same classes.

    Attributes:
        name: What `memloc_ext.data.load` calls it.
        train: Examples to train on.
        test: Examples to evaluate on.
        classes: Name of each class; a label is a position in it.

    Raises:
        ValueError: If the images of the splits differ in shape, or a label has no class.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        train, test = (list(split.inputs.shape[1:]) for split in (self.train, self.test))
        if train != test:
            raise ValueError(f"{self.name}: train and test images must have one shape, got {train} and {test}")
        for split in (self.train, self.test):
            for labels in (split.labels, split.true_labels):
                if labels.numel() and labels.max() >= self.num_classes:
                    raise ValueError(f"{self.name}: labels must be in [0, {self.num_classes}), got {int(labels.max())}")

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def in_channels(self) -> int:
        """Channels of an image."""
        return self.train.inputs.shape[1]

    @property
    def image_size(self) -> int:
        """Side of an image in pixels.

        Raises:
            ValueError: If the images are not square.
        """
        height, width = self.train.inputs.shape[2:]
        if height != width:
            raise ValueError(f"{self.name}: images must be square here, got height {height} and width {width}")
        return height

    def to(self, device: torch.device | str) -> Dataset:
        """Return the data set with both splits moved as in `Split.to`."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    def normalized(self, normalization: Normalization) -> Dataset:
        """Return the data set with inputs normalised otherwise, see `Split`."""
        train, test = (replace(split, normalization=normalization) for split in (self.train, self.test))
        return replace(self, train=train, test=test)
