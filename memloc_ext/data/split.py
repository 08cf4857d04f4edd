"""A data set and its splits: images, labels, and which examples count as memorized."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import torch
import torch.utils.data
from torch import Tensor

from memloc_ext.batches import Batch
from memloc_ext.data.images import LazyImages, fits
from memloc_ext.examples import Shard, row_batches

Normalization: TypeAlias = "Literal['paper', 'imagenet'] | tuple[tuple[float, ...], tuple[float, ...]]"
"""Mean and standard deviation of each channel, for pixels scaled to [0, 1], one value for all or one for each; or those
of the paper, 0.5, which put inputs into [-1, 1]; or those of ImageNet, by name."""
NORMALIZATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "paper": ((0.5,), (0.5,)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

_COLUMNS = {"labels": torch.int64, "true_labels": torch.int64, "memorized": torch.bool, "indices": torch.int64}


@dataclass(frozen=True, eq=False, repr=False)
class Split(torch.utils.data.Dataset[tuple[Tensor, int, int]]):
    """The N examples of one split; a map-style data set of ``(input, label, index)``.

    Data as `memloc_ext.examples` has it, whose batches are taken on the device at once.

    Attributes:
        inputs: Pixels, ``[N, channels, height, width]``: uint8 in 0 .. 255, or floating point in ``[0, 1]``. May be on
            another device than the rest (see `Split.to`).
        labels: The labels to train on, ``[N]``, int64.
        true_labels: The labels before any noise, ``[N]``, int64.
        memorized: The examples that have to be memorized, because they are mislabelled or atypical, ``[N]``, bool. The
            rest are "clean".
        indices: The example's number in the data set, ``[N]``, int64. A subset keeps it, so that whatever is tied to an
            example (its dropout mask) stays with it.
        normalization: What is subtracted from the pixels, scaled to ``[0, 1]``, and what they are divided by then.

    Raises:
        ValueError: If a shape, device or value breaks the above.
        TypeError: If a dtype does.
    """

    inputs: Tensor | LazyImages
    labels: Tensor
    true_labels: Tensor
    memorized: Tensor
    indices: Tensor
    normalization: Normalization = "paper"
    _scale: tuple[float | Tensor, float | Tensor] = field(init=False)

    @classmethod
    def clean(cls, inputs: Tensor | LazyImages, labels: Tensor) -> Split:
        """Return a split with true labels, no memorized example, and examples numbered from 0."""
        num = len(labels)
        memorized = torch.zeros(num, dtype=torch.bool, device=labels.device)
        return cls(inputs, labels, labels, memorized, torch.arange(num, device=labels.device))

    def __post_init__(self) -> None:
        if len(self.inputs.shape) != 4:
            raise ValueError(f"Split: inputs must be [N, channels, height, width], got {list(self.inputs.shape)}")
        if self.inputs.dtype != torch.uint8 and not self.inputs.dtype.is_floating_point:
            raise TypeError(f"Split: inputs must be uint8 or floating point, got {self.inputs.dtype}")
        for name, dtype in _COLUMNS.items():
            column = getattr(self, name)
            if column.dtype != dtype:
                raise TypeError(f"Split: {name} must be {dtype}, got {column.dtype}")
            if column.shape != self.inputs.shape[:1]:
                rule = f"[{self.inputs.shape[0]}] like inputs"
                raise ValueError(f"Split: {name} must be {rule}, got {list(column.shape)}")
            if column.device != self.device:
                raise ValueError(f"Split: {name} must be on {self.device} like labels, got {column.device}")
            if (column < 0).any():
                raise ValueError(f"Split: {name} must not be negative, got {int(column.min())}")
        if isinstance(self.inputs, Tensor) and self.inputs.dtype.is_floating_point and self.inputs.numel():
            low, high = self.inputs.aminmax()
            if not (low >= 0 and high <= 1):  # also catches NaN
                raise ValueError(f"Split: floating-point inputs must be in [0, 1], got {low:g} .. {high:g}")
        object.__setattr__(self, "_scale", _scale(self.normalization, self.inputs.shape[1], self.device))

    @property
    def device(self) -> torch.device:
        """Where batches are returned."""
        return self.labels.device

    def __repr__(self) -> str:
        shape, marked = list(self.inputs.shape), int(self.memorized.sum())
        return f"Split({shape} {self.inputs.dtype}, {marked} memorized, on {self.device})"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        """Return example ``index`` of this split: normalised input ``[C, H, W]``, label, number in the data set."""
        position = range(len(self))[index]  # raises IndexError at the end, which is how iteration stops
        inputs, labels, indices = self.batch(torch.tensor([position]))
        return inputs[0], int(labels), int(indices)

    def batch(self, rows: Tensor) -> Batch:
        """Return examples by their position in this split.

        Args:
            rows: Positions, ``[B]``, int64, each in ``[0, N)``; or a mask, ``[N]``, bool.

        Returns:
            Inputs ``[B, C, H, W]`` float32, normalised: ``(p - mean) / std`` for a pixel p scaled to ``[0, 1]``; labels
            ``[B]`` int64; numbers in the data set ``[B]`` int64. All on `Split.device`.

        Raises:
            IndexError: If a position is out of range.
            TypeError: If ``rows`` is neither.
        """
        rows = self._positions("batch", rows)
        pixels = self.inputs[rows.to(self.inputs.device)].to(self.device)
        scaled = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
        rows = rows.to(self.device)
        mean, std = self._scale
        return Batch((scaled - mean) / std, self.labels[rows], self.indices[rows])

    def batches(
        self, batch_size: int | Sequence[int], generator: torch.Generator | None = None, *, shard: Shard = (0, 1)
    ) -> Iterator[Batch]:
        """Iterate once over all examples, in order or shuffled, see `memloc_ext.examples.row_batches`."""
        return map(self.batch, row_batches(len(self), batch_size, generator, shard))

    def subset(self, rows: Tensor) -> Split:
        """Return a split of the examples at ``rows`` (as in `Split.batch`), which keep their ``indices``."""
        rows = self._positions("subset", rows)
        inputs = self.inputs
        inputs = inputs.subset(rows) if isinstance(inputs, LazyImages) else inputs[rows.to(inputs.device)]
        rows = rows.to(self.device)
        return replace(self, inputs=inputs, **{name: getattr(self, name)[rows] for name in _COLUMNS})

    def to(self, device: torch.device | str) -> Split:
        """Return the split with its batches on ``device``.

        The inputs move there as a whole if they take at most half of its free memory. If not, they stay where they are
        and each batch moves by itself.
        """
        device = torch.device(device)
        inputs = self.inputs
        if isinstance(inputs, Tensor) and fits(inputs.nbytes, device):
            inputs = inputs.to(device)
        return replace(self, inputs=inputs, **{name: getattr(self, name).to(device) for name in _COLUMNS})

    def _positions(self, function: str, rows: Tensor) -> Tensor:
        if rows.dtype == torch.bool and rows.shape == self.labels.shape:
            return rows.nonzero()[:, 0]
        if rows.dtype != torch.int64 or rows.dim() != 1:
            got = f"{rows.dtype} {list(rows.shape)}"
            raise TypeError(f"{function}: rows must be int64 [B] or bool [{len(self)}], got {got}")
        if rows.numel():
            low, high = map(int, rows.aminmax())
            if low < 0 or high >= len(self):
                raise IndexError(f"{function}: rows must be in [0, {len(self)}), got {low if low < 0 else high}")
        return rows


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


def _scale(normalization: Normalization, channels: int, device: torch.device) -> tuple[float | Tensor, float | Tensor]:
    """Return mean and standard deviation, as numbers or ``[channels, 1, 1]``."""
    mean, std = NORMALIZATIONS.get(normalization, ((), ())) if isinstance(normalization, str) else normalization
    if any(len(values) not in (1, channels) for values in (mean, std)) or not all(value > 0 for value in std):
        raise ValueError(
            f"Split: normalization must be one of {', '.join(NORMALIZATIONS)} or (mean, std), each of one value or one "
            f"for each of {channels} channels, std positive; got {normalization!r}"
        )

    def shaped(values: tuple[float, ...]) -> float | Tensor:
        return values[0] if len(values) == 1 else torch.tensor(values, device=device)[:, None, None]

    return shaped(mean), shaped(std)
