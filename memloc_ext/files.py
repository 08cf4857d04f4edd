"""Write files so that nobody, whatever happens, finds half of one; read those of strangers, and name the bad ones."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import reprlib
import secrets
import types
import typing
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")
_SEAL = 32
"""Length of the last line of a sealed file."""
_LINE = 1000
"""Characters of an error that are shown."""
NOT_PARSED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What a function that takes a value apart may raise if that is something else than it expects."""


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file, or replace it, as a whole: it holds the old bytes or the new ones, even after a power failure.

    A process that is killed here leaves ``.<name>.<random>.tmp`` beside the file, which nothing reads.

    Args:
        path: The file; its folder must exist.
        data: All its bytes.

    Raises:
        TypeError: If ``data`` is not ``bytes``.
        OSError: If the file cannot be written, for example because the disk is full; an old one is then as it was.
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


def remove_temporaries(folder: Path) -> None:
    """Remove what killed processes left in a folder that only this one writes to, at any depth."""
    for path in folder.rglob(".*.tmp"):
        if re.fullmatch(r"\..+\.[0-9a-f]{16}\.tmp", path.name) and not path.is_dir():
            path.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any, *, sealed: bool = False) -> None:
    """Write a value as indented JSON with sorted keys, by `write_atomically`: equal values give equal bytes.

    Args:
        path: The file; its folder must exist.
        value: Dictionaries with string keys, lists, strings, finite numbers, booleans and None.
        sealed: Add a line of 32 blanks, space for 0 and tab for 1: the CRC-32 of the text before it. JSON may end in
            blanks, so every program reads the file as before, and `read_json` notices a flipped bit in a number.

    Raises:
        TypeError: If ``value`` holds something else.
        ValueError: If it holds NaN or an infinity, which JSON does not have, or a lone surrogate.
        OSError: If the file cannot be written.
    """
    try:
        text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"write_json: value for {path} must be JSON: {error}") from error
    text += b"\n"
    write_atomically(path, text + _seal(text) + b"\n" if sealed else text)


def write_table(path: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as ``<name>.json`` and as ``<name>.csv``, whose columns are the keys in order of appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path / f"{name}.csv", text.getvalue().encode())
    write_json(path / f"{name}.json", list(rows), sealed=True)


def read_bytes(path: str | Path) -> bytes:
    """Read a file.

    Raises:
        ValueError: If it is a folder, a pipe, which one could wait for in vain, or a device, or does not fit into the
            memory; names it.
        OSError: If it cannot be read, such as FileNotFoundError.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: must be a file")
    try:
        return path.read_bytes()
    except MemoryError:  # a file with holes can be of any size
        raise ValueError(f"{path}: must fit into the memory, got {path.stat().st_size} bytes") from None


def open_archive(stored: bytes) -> zipfile.ZipFile:
    """Open the bytes of a zip archive.

    Raises:
        ValueError: If it holds compressed data, which could fill the memory.
        zipfile.BadZipFile: If it is no archive or a truncated one.
    """
    archive = zipfile.ZipFile(io.BytesIO(stored))
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
        raise ValueError("it holds compressed data, which could fill the memory")
    return archive


def read_json(path: str | Path) -> Any:
    """Read what `write_json` wrote, or other JSON.

    Raises:
        ValueError: If the file is not JSON, holds NaN, an infinity or a name twice in an object, or was damaged
            since it was sealed; names it.
        OSError: If it cannot be read.
    """
    stored = read_bytes(path)
    try:
        text, newline, last = stored.removesuffix(b"\n").rpartition(b"\n")
        if len(last) == _SEAL and not last.strip() and last != _seal(text + newline):
            raise ValueError(
                "it was damaged or edited: its last line is the checksum of another text; after an edit, delete it"
            )
        return json.loads(stored, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: must be JSON: {error}") from error


def read_as(path: str | Path, what: str, parse: Callable[[Any], T]) -> T:
    """Read JSON and return what a function makes of it.

    Args:
        path: The file.
        what: What it must be, for the error, such as ``"a table of epochs"``.
        parse: Takes the value that `read_json` returns, and raises nearly anything if it is something else.

    Raises:
        ValueError: If the file is damaged or ``parse`` raises; names the file and says why.
        OSError: If it cannot be read.
    """
    value = read_json(path)
    try:
        return parse(value)
    except NOT_PARSED as error:
        raise ValueError(f"{path}: must be {what}: {error}") from error


def parsed(kind: Any, value: Any) -> Any:
    """Return a JSON value as what an annotation names.

    Args:
        kind: ``int``, ``float``, ``bool``, ``str``, or a list, a dictionary or a dataclass of these, to any depth; or
            one of them or None.
        value: As `read_json` returns it. Integers must not be negative.

    Raises:
        ValueError: If it is something else; says what.
    """
    if is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict) or set(value) != {field.name for field in fields(kind)}:
            raise ValueError(f"got {value!r} for a {kind.__name__}")
        kinds = typing.get_type_hints(kind)
        return kind(**{name: parsed(kinds[name], inner) for name, inner in value.items()})
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if value is None else parsed(inner[0], value)
    if origin is list and isinstance(value, list):
        return [parsed(inner[0], item) for item in value]
    if origin is dict and isinstance(value, dict):
        return {key: parsed(inner[1], item) for key, item in value.items()}
    rules: dict[Any, Callable[[], bool]] = {
        bool: lambda: isinstance(value, bool),
        str: lambda: isinstance(value, str),
        int: lambda: type(value) is int and value >= 0,
        float: lambda: type(value) in (int, float) and math.isfinite(value),
    }
    if kind not in rules or not rules[kind]():
        raise ValueError(f"got {value!r}")
    return value


def shown(value: Any) -> str:
    """Return a value as text for an error: of bounded length and without control characters, whoever made it.

    A pickle of few bytes can hold a list of 2^60 places, whose own text would never end.
    """
    text = value if isinstance(value, str) else reprlib.repr(value)
    if len(text) > _LINE:
        text = f"{text[: _LINE // 2]} ... {text[-_LINE // 2 :]}"
    line = " ".join(text.split())
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)


def _seal(text: bytes) -> bytes:
    return f"{zlib.crc32(text):0{_SEAL}b}".encode().translate(bytes.maketrans(b"01", b" \t"))


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError(f"an object has a name twice, of {', '.join(name for name, _ in pairs)}")
    return value


def _finite(number: str) -> float:
    return value if math.isfinite(value := float(number)) else _refuse(number)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")
