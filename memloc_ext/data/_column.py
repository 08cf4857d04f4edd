"""One column of values from a file: an array, or text as spreadsheets, numpy and pandas write it."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memloc_ext.files import read_bytes

SUFFIXES = (".npy", ".npz", ".csv", ".tsv", ".txt")
_VALUES = ("score", "scores", "mask", "memorized")
"""Names of the column to read, where there are several."""
_NUMBERS = ("", "index", "idx", "id", "example", "examples", "unnamed: 0")
"""Names of a column that tells which example a row is of; pandas gives the first of them."""
_UNFOLDED = 2**30
"""Largest size of an array in an archive, in bytes: more values than there are examples of anything in memory."""

_Row = tuple[int, list[str]]
"""Number of a line, from 1, and its cells."""


@dataclass(frozen=True)
class Column:
    """The values of a file, and where they are in it.

    Attributes:
        values: ``[n]``, booleans or numbers.
        numbers: Example that each value is of, as its row says, ``[n]`` int64; None if the order tells.
        places: Where each value is, for messages.
        name: What the header calls the column; None without one.
        numbers_name: Likewise of ``numbers``.
    """

    values: np.ndarray
    numbers: np.ndarray | None
    places: Sequence[str]
    name: str | None = None
    numbers_name: str | None = None


def read_column(path: Path, lengths: Collection[int]) -> Column:
    """Read the values of a file; how many are expected tells a header that looks like a number.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or holds something else; names the file and the line.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, got {path.suffix!r}")
    stored = read_bytes(path)
    if suffix in (".npy", ".npz"):
        return _from_array(path, stored)
    try:
        return _from_text(_decoded(stored), lengths)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _from_array(path: Path, stored: bytes) -> Column:
    try:
        values = _unpacked(stored)
    except Exception as error:  # a damaged archive can raise nearly anything, from zlib.error to MemoryError
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1:
        raise ValueError(f"{path}: must hold one value per example, got an array of shape {list(values.shape)}")
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{path}: must hold booleans or numbers, got {values.dtype}")
    return Column(values, None, [f"row {row}" for row in range(len(values))])


def _unpacked(stored: bytes) -> np.ndarray:
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


def _decoded(stored: bytes) -> str:
    try:
        return stored.decode(json.detect_encoding(stored))
    except UnicodeDecodeError as error:
        line = stored[: error.start].count(b"\n") + 1
        raise ValueError(f"line {line}: cannot be read: {error}") from None


def _from_text(text: str, lengths: Collection[int]) -> Column:
    rows = _rows(text)
    first, width = rows[0], max(len(cells) for _, cells in rows)
    for line, cells in rows:
        if len(cells) != width:
            raise ValueError(f"line {line}: must have {width} columns as other lines do, got {len(cells)}")
    names = None
    if not all(_is_number(cell) or cell.strip().lower() in ("true", "false") for cell in first[1]):
        names = [cell.strip() for cell in first[1]]
    elif first[1] == [str(n) for n in range(width)] and _is_header(rows, lengths):
        names = first[1]
    if names is not None:
        rows = rows[1:]
        if not rows:
            raise ValueError(f"line {first[0]}: must be followed by values, got a header alone")
    column, index = _chosen(names, rows, width)
    values = _parsed([(line, cells[column]) for line, cells in rows])
    numbers = None
    if index is not None:
        numbers = _integers(cells[index] for _, cells in rows)
        if numbers is None:
            raise ValueError(f"line {rows[0][0]}: must hold an integer in column {index + 1}, and so must all others")
    name, numbers_name = (None if names is None or at is None else names[at] for at in (column, index))
    return Column(values, numbers, [f"line {line}" for line, _ in rows], name, numbers_name)


def _rows(text: str) -> list[_Row]:
    """Return the lines that are neither comments nor, before the first or after the last other one, blank."""
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        content = line if '"' in line else line.partition("#")[0]
        if content.strip() or not line.strip():
            lines.append((number, content.rstrip()))
    blank = [not line.strip(" \t,;") for _, line in lines]
    if all(blank):
        raise ValueError("must hold one value per line, got an empty file")
    lines = lines[blank.index(False) : len(blank) - blank[::-1].index(False)]
    body = [line for _, line in lines[1:] or lines]  # a header may hold anything
    delimiter = next((mark for mark in "\t;," if any(mark in line for line in body)), None)
    blanks = any(len(line.split()) > 1 for line in body)
    rows = []
    for number, line in lines:
        try:
            if delimiter:
                cells = next(csv.reader([line], delimiter=delimiter), [""])
            else:
                cells = line.split() if blanks else [line.strip(' "')]
        except csv.Error as error:
            raise ValueError(f"line {number}: cannot be read: {error}") from None
        while len(cells) > 1 and not cells[-1].strip():
            cells.pop()
        rows.append((number, cells))
    return rows


def _is_header(rows: Sequence[_Row], lengths: Collection[int]) -> bool:
    """Whether the first row, which counts the columns, is what pandas writes where these have no names."""
    masks = all(cells[-1] in ("0", "1") or not cells[-1].isdecimal() for _, cells in rows[1:])
    return masks and len(rows) - 1 in lengths and len(rows) not in lengths


def _chosen(names: Sequence[str] | None, rows: Sequence[_Row], width: int) -> tuple[int, int | None]:
    """Return which column holds the values, and which the numbers of the examples, if any does."""
    if width == 1:
        return 0, None
    lower = [None] * width if names is None else [name.lower() for name in names]
    index = next((at for at, name in enumerate(lower) if name in _NUMBERS), None)
    if index is None:
        numbers = _integers(cells[0] for _, cells in rows)
        index = 0 if numbers is not None and len(np.unique(numbers)) == len(rows) else None
    named = [at for at, name in enumerate(lower) if name in _VALUES]
    others = [at for at, name in enumerate(lower) if at != index and name not in _NUMBERS]
    found = named or others
    if len(found) != 1:
        got = f"{width} without names" if names is None else ", ".join(map(repr, names))
        raise ValueError(
            f"line {rows[0][0]}: must hold one column of values, beside one of distinct example numbers, or call it "
            f"{', '.join(_VALUES[:-1])} or {_VALUES[-1]}; got {got}"
        )
    return found[0], index if index != found[0] else None


def _parsed(cells: Sequence[tuple[int, str]]) -> np.ndarray:
    texts = [text.strip().lower() for _, text in cells]
    if set(texts) <= {"true", "false"}:
        return np.array(texts) == "true"
    for kind, dtype in ((int, np.int64), (float, np.float64)):
        with contextlib.suppress(ValueError, OverflowError):  # not all are integers
            return np.array([kind(text) for text in texts], dtype=dtype)
    line, text = next(cell for cell in cells if not _is_number(cell[1]))
    raise ValueError(f"line {line}: must hold true, false or a number, got {text!r}")


def _integers(texts: Iterable[str]) -> np.ndarray | None:
    try:
        values = np.array([float(text) for text in texts])
    except ValueError:
        return None
    return values.astype(np.int64) if (abs(values) < 2**53).all() and (values % 1 == 0).all() else None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
