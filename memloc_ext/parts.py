"""Long work in parts: spread over the processes, and kept one by one, so that a kill loses only those in work."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
import torch
from torch import Tensor

from memloc_ext.distributed import rank, spread, world_size
from memloc_ext.files import plain, read_json, write_json
from memloc_ext.progress import is_named, progress

T = TypeVar("T")
R = TypeVar("R")


class Parts(Protocol):
    """Where the results of finished parts are kept. Each process puts in its own."""

    def get(self, name: str) -> Any | None:
        """Return what was put in under a name, or None."""
        ...

    def put(self, name: str, result: Any) -> None:
        """Keep the result of a part, JSON; its name stands for all that it depends on, see `fingerprint`."""
        ...


class PartFiles:
    """Parts as ``<name>.json`` in a folder, which is created with the first. Whoever needs no part any more removes it.

    Processes that see different disks keep their parts apart, and look for them there.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)

    def get(self, name: str) -> Any | None:
        """Read a part; None if there is none. ValueError names a damaged file."""
        path = self._path(name)
        if not path.exists():
            return None
        part = read_json(path)
        if not isinstance(part, dict) or part != _sealed(part.get("result")):
            raise ValueError(f"{path}: its checksum is wrong; delete it to do that part again")
        return part["result"]

    def put(self, name: str, result: Any) -> None:
        """Write a part as a whole or, if that fails with an OSError, not at all."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_json(self._path(name), _sealed(result))

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"


def spread_parts(
    function: Callable[[T], Any], work: Mapping[str, T], parts: Parts | None, parse: Callable[[Any], R]
) -> list[R]:
    """Call a function for each part that is not kept yet, see `memloc_ext.distributed.spread`, and keep the results.

    Args:
        function: Takes the work of a part and returns JSON, which depends on nothing that is not in its name.
        work: By the name of the part; the same in every process.
        parts: Where the results are kept; None keeps none.
        parse: Takes a result, which a stranger may have put there, and returns what is made of it, in the order of the
            parts; a ValueError names a kept part of which it makes nothing.
    """
    if parts is None:
        return spread(lambda item: parse(function(item)), list(work.values()))
    finished, report = itertools.count(1), None

    def done(name: str) -> R:
        result = function(work[name])
        parts.put(name, result)
        value = parse(result)
        if report is not None:
            report(next(finished))
        return value

    def found(name: str) -> R | None:
        result = parts.get(name)
        try:
            return None if result is None else parse(result)
        except (LookupError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"{name}.json: must be a part of this stage: {error}; delete it to do it again") from error

    everything = zip(work, spread(found, list(work)), strict=True)
    kept = {name: result for name, result in everything if result is not None}
    missing = [name for name in work if name not in kept]
    with contextlib.ExitStack() as stack:
        if is_named():
            report = stack.enter_context(progress(len(missing[rank() :: world_size()]), 0, "part"))
        kept.update(zip(missing, spread(done, missing), strict=True))
    return [kept[name] for name in work]


def fingerprint(*values: Any) -> str:
    """Return 32 hexadecimal digits that stand for tensors, dictionaries, lists, and what has equal text if equal."""
    sha = hashlib.sha256()
    _feed(sha, values)
    return sha.hexdigest()[:32]


def _sealed(result: Any) -> dict[str, Any]:
    result = plain(result)
    return {"result": result, "sha256": fingerprint(msgspec.json.encode(result, order="sorted"))}


def _feed(sha: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        sha.update(f"{value.dtype}{list(value.shape)}".encode())
        sha.update(value.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        _feed(sha, list(value.items()))
    elif isinstance(value, (list, tuple)):
        sha.update(f"({len(value)}".encode())
        for item in value:
            _feed(sha, item)
    else:
        text = repr(value).encode()
        sha.update(f"{len(text)}:".encode() + text)
