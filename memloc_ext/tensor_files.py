"""Tensors and what belongs to them in one safetensors file, with a checksum of all of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from memloc_ext.files import parsed, plain, read_bytes, write_atomically
from memloc_ext.parts import fingerprint

T = TypeVar("T")
_KEY = "memloc_ext"
"""Name of the metadata in the header: one, since safetensors writes several in any order."""


@dataclass(frozen=True)
class _Header:
    about: Any
    sha256: str


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], about: Any) -> None:
    """Write dense tensors by name, and as JSON what the header says of them, atomically; equal ones give equal bytes.

    TypeError if ``about`` is not JSON, see `memloc_ext.files.write_json`; nothing is written then.
    """
    # a copy of each, since tied weights share memory
    own = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    values = plain(about)
    header = _Header(values, _digest(own, values))
    write_atomically(path, save(own, {_KEY: msgspec.json.encode(header).decode()}))


def load_tensors(path: str | Path, kind: type[T]) -> tuple[dict[str, Tensor], T]:
    """Read what `save_tensors` wrote: the tensors, on the CPU, and what the header says of them, as a type.

    Nothing in a file can run code or take more memory than the file is large. ValueError names a file that is damaged
    or something else.
    """
    stored = read_bytes(path)
    try:
        tensors = dict(sorted(load(stored).items()))  # which come in any order
        size = int.from_bytes(stored[:8], "little")
        metadata = msgspec.json.decode(stored[8 : 8 + size], type=dict[str, Any]).get("__metadata__", {})
        header = parsed(_Header, msgspec.json.decode(metadata.get(_KEY, "")))
        if header.sha256 != _digest(tensors, header.about):
            raise ValueError("its checksum is wrong")
        return tensors, parsed(kind, header.about)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be loaded as {kind.__name__}: {error}") from error


def _digest(tensors: Mapping[str, Tensor], about: Any) -> str:
    return fingerprint(sorted(tensors.items()), msgspec.json.encode(about))
