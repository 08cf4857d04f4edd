"""Atomic writes and validated reads."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import reprlib
import secrets
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

_LINE = 1000
"""Characters of an error that are shown."""


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file, or replace it, as a whole: it holds the old bytes or the new ones, even after a power failure.

    A process that is killed here leaves ``.<name>.<random>.tmp`` beside the file, which nothing reads.

    The folder must exist. OSError if the file cannot be written; an old one is then as it was.
    """
    if not isinstance(data, bytes):
        raise TypeError(f"write_atomically: data must be bytes, got {type(data).__name__}")
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # or the new name may reach the disk before what it names
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):  # writing names no file, and opening the temporary one
            error.filename = str(path)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_temporaries(folder: Path, pattern: str = "**/.*.tmp") -> None:
    """Remove what killed processes left in a folder that only this one writes to, at any depth by default."""
    for path in folder.glob(pattern):
        if re.fullmatch(r"\..+\.[0-9a-f]{16}\.tmp", path.name) and not path.is_dir():
            path.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any, *, sort_keys: bool = True) -> None:
    """Write a value as indented JSON, by `write_atomically`: equal values give equal bytes.

    The value is made of dataclasses, dictionaries with string keys, which are sorted by them or not, lists, strings,
    paths, finite numbers, booleans and None. TypeError if it holds something else; ValueError if NaN, an infinity or a
    lone surrogate.
    """
    try:
        text = json.dumps(plain(value), indent=2, sort_keys=sort_keys, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"write_json: value for {path} must be JSON: {error}") from error
    write_atomically(path, text + b"\n")


def plain(value: Any) -> Any:
    """Return a value as JSON has it: dataclasses as dictionaries, tuples as lists, paths as strings."""
    return json.loads(json.dumps(msgspec.to_builtins(value, enc_hook=_path), allow_nan=False))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as a table whose columns are the keys in order of appearance."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def read_bytes(path: str | Path) -> bytes:
    """Read a file; ValueError if it is a folder, a pipe, which one could wait for in vain, or too large."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: must be a file")
    try:
        return path.read_bytes()
    except MemoryError:  # a file with holes can be of any size
        raise ValueError(f"{path}: must fit into the memory, got {path.stat().st_size} bytes") from None


def open_archive(stored: bytes) -> zipfile.ZipFile:
    """Open the bytes of a zip archive; ValueError if it holds compressed data, BadZipFile if it is none."""
    archive = zipfile.ZipFile(io.BytesIO(stored))
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
        raise ValueError("it holds compressed data, which could fill the memory")
    return archive


def read_json(path: str | Path, kind: Any = Any) -> Any:
    """Read JSON as a type, see `parsed`; ValueError names a file that is something else."""
    return decode_json(path, read_bytes(path), kind)


def decode_json(path: str | Path, stored: bytes, kind: Any = Any) -> Any:
    """Return the bytes of a JSON file as a type, see `read_json`."""
    try:
        value = msgspec.json.decode(stored)
        return value if kind is Any else parsed(kind, value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: must be JSON: {error}") from error


def parsed(kind: Any, value: Any) -> Any:
    """Return a JSON value as a type that `msgspec` knows, such as a dataclass or ``dict[str, int | float]``.

    ValueError if it is something else, or holds a negative integer that is no ``channel_dim``; says where.
    """
    result = msgspec.convert(value, kind, dec_hook=lambda kind, text: kind(text))
    _check_counts(value)
    return result


def shown(value: Any) -> str:
    """Return a value as text for an error: of bounded length and without control characters, whoever made it.

    A pickle of few bytes can hold a list of 2^60 places, whose own text would never end.
    """
    text = value if isinstance(value, str) else reprlib.repr(value)
    if len(text) > _LINE:
        text = f"{text[: _LINE // 2]} ... {text[-_LINE // 2 :]}"
    line = " ".join(text.split())
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)


def _check_counts(value: Any) -> None:
    if type(value) is int and value < 0:
        raise ValueError(f"integers must not be negative, got {value}")
    if isinstance(value, dict | list):
        for item in (v for k, v in value.items() if k != "channel_dim") if isinstance(value, dict) else value:
            _check_counts(item)


def _path(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not JSON")
