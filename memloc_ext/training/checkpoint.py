"""What a training keeps after every epoch, and how it is stored."""

from __future__ import annotations

import io
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memloc_ext.files import open_archive, read_bytes, shown, write_atomically


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The state of a training after an epoch; together with the split, all that it takes to continue.

    Attributes:
        epoch: Number of finished epochs; 0 is the initialisation.
        model: The model's state dict.
        optimizer: The optimizer's state dict.
        scaler: The gradient scaler's state dict, empty unless the precision is float16.
        history: One record per epoch, from 0 to ``epoch``; see `memloc_ext.training.train`.
        config: The `TrainConfig` as a dictionary.
        data: Digest of the labels and indices of the split, in hexadecimal.
    """

    epoch: int
    model: dict[str, Any]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    history: list[dict[str, float]]
    config: dict[str, Any]
    data: str


_TYPES = {"epoch": int, "model": dict, "optimizer": dict, "scaler": dict, "history": list, "config": dict, "data": str}
_NAME = r"epoch_(\d+)\.pt"


def save_checkpoint(folder: str | Path, checkpoint: Checkpoint) -> Path:
    """Write ``epoch_<number>.pt`` into a folder, atomically, and return its path.

    Raises:
        OSError: If it cannot be written; nothing under that name changes then.
    """
    path = Path(folder) / _name(checkpoint.epoch)
    buffer = io.BytesIO()
    torch.save(vars(checkpoint), buffer)
    write_atomically(path, buffer.getvalue())
    return path


def load_checkpoint(path: str | Path, map_location: str | torch.device = "cpu") -> Checkpoint:
    """Read a checkpoint; only tensors and plain values, so that a file of unknown origin cannot run code.

    Args:
        path: A file that `save_checkpoint` wrote.
        map_location: Device of the tensors.

    Raises:
        ValueError: If the file is damaged or something else, or its tensors cannot be put on ``map_location``; names
            the file.
        OSError: If it cannot be read, such as FileNotFoundError.
    """
    stored = read_bytes(path)
    try:
        _check_archive(stored)
        values = torch.load(io.BytesIO(stored), map_location=map_location, weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path}: is no checkpoint: it holds more than tensors and plain values") from None
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(f"{path}: cannot be loaded as a checkpoint: {error}") from error
    if not isinstance(values, dict) or values.keys() != _TYPES.keys():
        raise ValueError(f"{path}: is no checkpoint: it must hold {', '.join(_TYPES)}")
    for name, kind in _TYPES.items():
        if not isinstance(values[name], kind):
            raise ValueError(f"{path}: {name} must be {kind.__name__}, got {type(values[name]).__name__}")
    epoch, history = values["epoch"], values["history"]
    if re.fullmatch(_NAME, Path(path).name, re.ASCII) and Path(path).name != _name(epoch):
        raise ValueError(f"{path}: must be of its epoch, got {epoch}")
    for name, value in values["model"].items():
        is_extra = isinstance(name, str) and name.endswith("_extra_state") and not isinstance(value, Tensor)
        if not (is_extra or (isinstance(name, str) and is_dense(value))):
            raise ValueError(
                f"{path}: model must hold dense tensors by name, got {type(value).__name__} for {shown(name)}"
            )
    for name, record in (("config", values["config"]), *(("history", record) for record in history)):
        kinds = (int, float) if name == "history" else (bool, int, float, str)
        items = record.items() if isinstance(record, dict) else [(None, record)]
        for key, value in items:
            if type(key) is not str or type(value) not in kinds:
                raise ValueError(f"{path}: {name} must hold plain values by name, got {shown(value)} for {shown(key)}")
    return Checkpoint(**values)


def is_dense(value: Any) -> bool:
    """Return whether something is a tensor with all its elements in memory."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and not (value.is_meta or value.is_quantized or value.is_nested)
    )


def _check_archive(stored: bytes) -> None:
    """Raise a ValueError unless a file is a zip archive that is whole and takes no more memory than it is large."""
    if not stored.startswith(b"PK\3\4"):  # or torch.load takes it for something else
        raise ValueError("it is no zip archive")
    with open_archive(stored) as archive:
        damaged = archive.testzip()  # torch.load does not compare checksums
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
        pickles = [archive.read(name) for name in archive.namelist() if name.lower().endswith(".pkl")]
        if any(b"bytearray\n" in stream for stream in pickles):  # torch.load calls it, with any number
            raise ValueError("it holds a bytearray, which could fill the memory")


def list_checkpoints(folder: str | Path) -> dict[int, Path]:
    """Return the checkpoints of a folder by epoch, in order; none if there is no such folder."""
    folder = Path(folder)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    epochs = sorted(int(found[1]) for name in names if (found := re.fullmatch(_NAME, name, re.ASCII)))
    return {epoch: folder / _name(epoch) for epoch in epochs if _name(epoch) in names}


def _name(epoch: int) -> str:
    return f"epoch_{epoch:03d}.pt"
