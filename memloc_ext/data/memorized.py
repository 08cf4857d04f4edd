"""Which training examples count as memorized, from a file: a mask, a list of indices, or scores and a threshold."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memloc_ext.data.dataset import Dataset
from memloc_ext.files import read_bytes

_UNFOLDED = 2**30
"""Largest size of an array in an archive, in bytes: more values than there are examples of anything in memory."""


def memorized_mask(
    path: str | Path, num_examples: int, *, below: float | None = None, above: float | None = None
) -> Tensor:
    """Read a mask of the examples of one split.

    Without a threshold the file holds a mask (booleans, one per example) or the indices of the memorized examples
    (integers). With one it holds a score per example: a C-score counts as atypical ``below`` 0.5, a Feldman-Zhang
    memorization score ``above`` a value. Both comparisons are strict.

    Args:
        path: ``.npy``; ``.npz`` with one array, or with one named ``scores`` or ``mask`` among others; ``.csv`` or
            ``.txt`` with one value (``true``, ``false`` or a number) per line. In the order of the split.
        num_examples: N, the examples of the split.
        below: Scores less than this are memorized.
        above: Scores greater than this are memorized.

    Returns:
        The mask, ``[N]``, bool.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or of another kind, holds values that fit neither reading, or both thresholds
            are given.
    """
    path = Path(path)
    if below is not None and above is not None:
        raise ValueError(f"memorized_mask: give below or above, not both, got {below} and {above}")
    for name, threshold in (("below", below), ("above", above)):
        if threshold is not None and math.isnan(threshold):
            raise ValueError(f"memorized_mask: {name} must be a number, got {threshold}")
    values = _read(path)
    if values.ndim != 1:
        raise ValueError(f"{path}: must hold one value per example, got an array of shape {list(values.shape)}")
    kind = values.dtype.kind
    if kind not in "biuf":
        raise ValueError(f"{path}: must hold booleans or numbers, got {values.dtype}")
    if below is None and above is None:
        if kind == "f":
            raise ValueError(f"{path}: holds scores, which need a threshold: give below or above")
        return _from_mask(path, values, num_examples) if kind == "b" else _from_indices(path, values, num_examples)
    if kind == "b":
        raise ValueError(f"{path}: holds a mask, which takes no threshold, got below={below}, above={above}")
    _check_length(path, values, num_examples)
    missing = np.flatnonzero(np.isnan(values))
    if missing.size:
        raise ValueError(f"{path}: scores must be numbers, got NaN for example {missing[0]}")
    return torch.from_numpy(values < below if below is not None else values > above)


def with_memorized(dataset: Dataset, mask: Tensor) -> Dataset:
    """Return ``dataset`` with ``mask``, ``[N]`` bool, as the training split's ``memorized``; labels stay.

    Raises:
        ValueError: If there is not one value per training example.
        TypeError: If ``mask`` is not bool.
    """
    return replace(dataset, train=replace(dataset.train, memorized=mask.to(dataset.train.device)))


def _from_mask(path: Path, values: np.ndarray, num_examples: int) -> Tensor:
    _check_length(path, values, num_examples)
    return torch.from_numpy(values)


def _from_indices(path: Path, values: np.ndarray, num_examples: int) -> Tensor:
    outside = values[(values < 0) | (values >= num_examples)]
    if outside.size:
        raise ValueError(f"{path}: indices must be in [0, {num_examples}), got {outside[0]}")
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) < len(values):
        raise ValueError(
            f"{path}: integers are indices and must differ, got {distinct[counts > 1][0]} more than once; "
            "write a mask as true and false, and give below or above for scores"
        )
    mask = torch.zeros(num_examples, dtype=torch.bool)
    mask[torch.from_numpy(values.astype(np.int64))] = True
    return mask


def _check_length(path: Path, values: np.ndarray, num_examples: int) -> None:
    if len(values) != num_examples:
        raise ValueError(f"{path}: must hold one value for each of the {num_examples} examples, got {len(values)}")


def _read(path: Path) -> np.ndarray:
    if path.suffix in (".csv", ".txt"):
        return _read_text(path)
    if path.suffix not in (".npy", ".npz"):
        raise ValueError(f"{path}: must end in .npy, .npz, .csv or .txt, got {path.suffix!r}")
    stored = read_bytes(path)
    try:
        loaded = np.load(io.BytesIO(stored), allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            named = loaded.files if len(loaded.files) == 1 else [k for k in ("scores", "mask") if k in loaded.files]
            if len(named) != 1:
                keys = ", ".join(loaded.files) or "none"
                raise ValueError(f"must hold one array, or one called scores or mask, got {keys}")
            size = loaded.zip.getinfo(f"{named[0]}.npy").file_size
            if size > _UNFOLDED:
                raise ValueError(f"must hold an array of at most {_UNFOLDED} bytes, got {size}")
            return loaded[named[0]]
    except Exception as error:  # a damaged archive can raise nearly anything, from zlib.error to MemoryError
        raise ValueError(f"{path}: cannot be read: {error}") from error


def _read_text(path: Path) -> np.ndarray:
    try:
        lines = read_bytes(path).decode("utf-8-sig").strip().lower().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if not lines:
        raise ValueError(f"{path}: must hold one value per line, got an empty file")
    if set(map(str.strip, lines)) <= {"true", "false"}:
        return np.array([line.strip() == "true" for line in lines])
    try:
        return np.array([int(line) for line in lines], dtype=np.int64)
    except (ValueError, OverflowError):
        pass  # not all are integers
    try:
        return np.array([float(line) for line in lines])
    except ValueError as error:
        raise ValueError(f"{path}: must hold true, false or one number per line: {error}") from None
