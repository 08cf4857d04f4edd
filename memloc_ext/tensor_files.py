"""Tensors and what belongs to them in one safetensors file, with a checksum of all of it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from memloc_ext.files import open_archive, parsed, plain, read_bytes, write_atomically
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


def load_archive(stored: bytes, device: str | torch.device = "cpu") -> Any:
    """Return what ``torch.save`` wrote, if it is a zip archive of tensors and plain values.

    Nothing in it can run code or take more memory than the file is large.

    Raises:
        ValueError: If it is no such archive or damaged.
        pickle.UnpicklingError: If it holds something else.
    """
    if not stored.startswith(b"PK\3\4"):  # or torch.load takes it for something else
        raise ValueError("it is no zip archive")
    with open_archive(stored) as archive:
        damaged = archive.testzip()  # torch.load does not compare checksums
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
        pickles = [archive.read(name) for name in archive.namelist() if name.lower().endswith(".pkl")]
        if any(b"bytearray\n" in stream for stream in pickles):  # torch.load calls it, with any number
            raise ValueError("it holds a bytearray, which could fill the memory")
    return torch.load(io.BytesIO(stored), map_location=device, weights_only=True)


def _digest(tensors: Mapping[str, Tensor], about: Any) -> str:
    return fingerprint(sorted(tensors.items()), msgspec.json.encode(about))
