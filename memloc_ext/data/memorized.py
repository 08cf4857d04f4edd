"""Which training examples count as memorized, from a file: a mask, a list of indices, or scores and a threshold."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memloc_ext.data._column import Column, read_column
from memloc_ext.data.split import Dataset


def memorized_mask(
    path: str | Path,
    num_examples: int,
    *,
    below: float | None = None,
    above: float | None = None,
    part: Tensor | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> Tensor:
    """Read a mask of the examples of one split.

    With a threshold the file holds a score per example: a C-score counts as atypical ``below`` 0.5, a Feldman-Zhang
    memorization score ``above`` a value. Both comparisons are strict. Without one it holds a mask, one boolean, 0 or 1
    per example, or the indices of the memorized examples, as distinct integers; N zeros and ones are a mask.

    Values are in the order of the split, unless a column tells which example each row is of, counted from 0.

    Args:
        path: ``.npy``, ``[n]`` or ``[n, 1]``; ``.npz`` with one such array, or with one named ``scores`` or ``mask``
            among others; text in ``.csv``, ``.tsv`` or ``.txt``, one value per line: ``true``, ``false`` or a number.
            Text may be UTF-8 or UTF-16 and have a header, comments after ``#``, and columns that commas, semicolons,
            tabs or blanks separate: one of values, and before it, or called ``index``, ``idx``, ``id``, ``example`` or
            nothing, one of example numbers. Others are passed over if one is called ``score``, ``scores``, ``mask`` or
            ``memorized``.
        num_examples: N, the examples of the split.
        below: Scores less than this are memorized.
        above: Scores greater than this are memorized.
        part: The examples that are needed, ``[K]`` int64 in ascending order. Scores and masks may then be of these
            alone, in this order or by their number in the split or in this order.
        say: Called with a line that tells how the file was understood.

    Returns:
        The mask, ``[N]``, bool.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or of another kind, holds values that fit neither reading, or both thresholds
            are given; names the file and the line.
    """
    path = Path(path)
    if below is not None and above is not None:
        raise ValueError(f"memorized_mask: give below or above, not both, got {below} and {above}")
    for name, threshold in (("below", below), ("above", above)):
        if threshold is not None and math.isnan(threshold):
            raise ValueError(f"memorized_mask: {name} must be a number, got {threshold}")
    rows = torch.arange(num_examples) if part is None else part
    column = read_column(path, (num_examples, len(rows)))
    try:
        kind, examples = _memorized(column, num_examples, rows, below, above)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    mask = torch.zeros(num_examples, dtype=torch.bool)
    mask[examples] = True
    say(f"{path}: read as {kind}{_source(column, num_examples, rows)}: {int(mask.sum())} memorized")
    return mask


def with_memorized(dataset: Dataset, mask: Tensor) -> Dataset:
    """Return ``dataset`` with ``mask``, ``[N]`` bool, as the training split's ``memorized``; labels stay.

    Raises:
        ValueError: If there is not one value per training example.
        TypeError: If ``mask`` is not bool.
    """
    return replace(dataset, train=replace(dataset.train, memorized=mask.to(dataset.train.device)))


def _memorized(
    column: Column, num_examples: int, rows: Tensor, below: float | None, above: float | None
) -> tuple[str, Tensor]:
    """Return what the values were taken for, and the memorized examples."""
    values, numbers, count = column.values, column.numbers, len(column.values)
    of = f"the {count} examples chosen" if count == len(rows) < num_examples else f"{count} examples"
    if below is not None or above is not None:
        if values.dtype.kind == "b":
            raise ValueError(f"holds a mask, which takes no threshold, got below={below}, above={above}")
        examples = _examples(column, num_examples, rows)
        missing = np.flatnonzero(np.isnan(values))
        if missing.size:
            place = missing[0]
            raise ValueError(f"scores must be numbers, got NaN for example {examples[place]} in {column.places[place]}")
        rule, marked = (f"below {below}", values < below) if below is not None else (f"above {above}", values > above)
        return f"scores of {of}, memorized {rule}", examples[torch.from_numpy(marked)]
    numbered = numbers is not None and not np.array_equal(numbers, np.arange(count))
    of_examples = numbered or count in (num_examples, len(rows))
    if values.dtype.kind == "b" or (of_examples and count and np.isin(values, (0, 1)).all()):
        return f"a mask of {of}", _examples(column, num_examples, rows)[torch.from_numpy(values == 1)]
    if values.dtype.kind == "f":
        raise ValueError("holds scores, which need a threshold: give below or above")
    _check_numbers("indices", values, column, num_examples)
    return f"the indices of {count} examples", torch.from_numpy(values.astype(np.int64))


def _examples(column: Column, num_examples: int, rows: Tensor) -> Tensor:
    """Return which example each value is of, ``[n]`` int64, all of ``rows`` among them."""
    numbers, count = column.numbers, len(column.values)
    if numbers is None:
        if count not in (num_examples, len(rows)):
            chosen = f" or of the {len(rows)} chosen" if len(rows) < num_examples else ""
            got = f"{count}{_source(column, num_examples, rows)}"
            raise ValueError(f"must hold one value for each of the {num_examples} examples{chosen}, got {got}")
        return torch.arange(num_examples) if count == num_examples else rows
    _check_numbers("example numbers", numbers, column, num_examples)
    examples = torch.from_numpy(numbers)
    if _numbers_chosen(column, num_examples, rows):
        return rows[examples]
    lacking = rows[~torch.isin(rows, examples)]
    if len(lacking):
        raise ValueError(f"must hold one value for each example, got none for example {int(lacking[0])}")
    return examples


def _check_numbers(name: str, numbers: np.ndarray, column: Column, num_examples: int) -> None:
    outside = np.flatnonzero((numbers < 0) | (numbers >= num_examples))
    if outside.size:
        place = outside[0]
        raise ValueError(f"{name} must be in [0, {num_examples}), got {numbers[place]} in {column.places[place]}")
    _, first = np.unique(numbers, return_index=True)
    if len(first) < len(numbers):
        place = np.setdiff1d(np.arange(len(numbers)), first)[0]
        raise ValueError(
            f"integers are {name} and must differ, got {numbers[place]} more than once, again in "
            f"{column.places[place]}; write a mask as true and false, one for each of the {num_examples} examples, "
            "and give below or above for scores"
        )


def _numbers_chosen(column: Column, num_examples: int, rows: Tensor) -> bool:
    """Whether the numbers count the examples that were chosen, and not those of the split."""
    numbers, count = column.numbers, len(column.values)
    return numbers is not None and len(rows) == count < num_examples and set(numbers) == set(range(count))


def _source(column: Column, num_examples: int, rows: Tensor) -> str:
    names = [f"column {column.name!r}"] if column.name is not None else []
    if column.numbers is not None:
        of = "those chosen" if _numbers_chosen(column, num_examples, rows) else "all"
        names.append(f"numbered among {of} in column {column.numbers_name or 1!r}")
    return f" ({', '.join(names)})" if names else ""
