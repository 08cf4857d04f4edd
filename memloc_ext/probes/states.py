"""The states of a model at other times of its training: state dicts, files, and the folders that trainers write."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from memloc_ext.distributed import once
from memloc_ext.files import read_bytes
from memloc_ext.tensor_files import load_archive
from memloc_ext.training import list_checkpoints, load_checkpoint

State = str | Path | Mapping[str, Any]
"""A state dict, the path of a file that holds one, or the folder of a Hugging Face checkpoint."""
States = str | Path | Mapping[int, State] | Sequence[State]
"""Epoch to state; states of epochs 0, 1, ..; or a folder of checkpoints, see `found_states`."""
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""What holds the weights in the folder of a Hugging Face checkpoint."""
_INNER = ("model", "state_dict", "model_state_dict")
"""Names under which the files of trainers hold a state dict: of this package, of Lightning, of others."""


def sources_of(function: str, states: States) -> dict[int, State]:
    """Return states by epoch, in order.

    Raises:
        TypeError: If an epoch is no integer.
        ValueError: If there is none in a folder.
    """
    if isinstance(states, str | Path):
        return once(lambda: dict(found_states(function, states)))  # another machine may not see the newest yet
    given = states if isinstance(states, Mapping) else dict(enumerate(states))
    numbered = {epoch_of(function, "states", epoch): state for epoch, state in given.items()}
    return {epoch: numbered[epoch] for epoch in sorted(numbered)}


def epoch_of(function: str, name: str, epoch: Any) -> int:
    """Return an epoch in the argument ``name`` as int; TypeError if it is no integer."""
    try:
        return operator.index(epoch)
    except TypeError:
        raise TypeError(f"{function}: epochs in {name} must be integers, got {epoch!r}") from None


def found_states(function: str, folder: str | Path) -> dict[int, Path]:
    """Return the checkpoints in a folder by epoch, in order.

    They are those of `memloc_ext.training.train`; or the folders ``checkpoint-<step>`` of a Hugging Face ``Trainer``,
    by the epoch in their ``trainer_state.json`` if all were saved at the end of one, else by step; or the ``.ckpt``
    files of Lightning, by the epoch in their name, ``epoch=<number>``, the last step of each.

    Raises:
        ValueError: If there is none.
    """
    folder = Path(folder)
    found = list_checkpoints(folder) or _hugging_face(folder) or _lightning(folder)
    if not found:
        raise ValueError(f"{function}: states must hold at least one checkpoint, got none in {folder}")
    return dict(sorted(found.items()))


def read_state(function: str, source: State, model: nn.Module) -> dict[str, Tensor]:
    """Return the values of a model's parameters and buffers at another time, on the CPU if they are read from a file.

    Files are ``.safetensors``, or what ``torch.save`` wrote, of which only tensors and plain values are read. A prefix
    that a wrapper gave to all names, such as ``module.`` or ``_orig_mod.``, is taken off. The model is not compiled.

    Raises:
        ValueError: If a file is damaged, or it is the state of another model.
        OSError: If a file cannot be read.
    """
    if isinstance(source, Mapping):
        return checked_state(f"{function}: the state dict", _without_prefix(source, model), model)
    try:
        state = _read(Path(source))
    except OSError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(f"{function}: {source}: cannot be read as the state of a model: {error}") from error
    return checked_state(f"{function}: {source}", _without_prefix(state, model), model)


def recorded_rates(source: State) -> dict[int, float]:
    """Return the learning rate of the last step of each epoch up to a checkpoint, 0 without any, by epoch.

    Empty if it is no checkpoint of this package.
    """
    if isinstance(source, Mapping) or not _is_own(Path(source)):
        return {}
    return {int(record["epoch"]): record.get("learning_rate", 0.0) for record in load_checkpoint(source).history}


def checked_state(where: str, state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers in a state dict; ValueError, which begins with ``where``, if another model's.

    ``load_state_dict`` would turn any dtype into the model's, complex numbers and float64 too. A tied tensor may be
    there by one of its names alone.
    """
    own = {name: value for name, value in model.state_dict().items() if not name.endswith("_extra_state")}
    tied = {value.data_ptr(): name for name, value in own.items() if name in state and value.numel()}
    found = {}
    for name, value in own.items():
        there = state.get(name if name in state else tied.get(value.data_ptr(), name))
        if not isinstance(there, Tensor) or (there.dtype, there.shape) != (value.dtype, value.shape):
            what = f"as {there.dtype} {list(there.shape)}" if isinstance(there, Tensor) else "not there"
            own_kind = f"{value.dtype} {list(value.shape)}"
            raise ValueError(f"{where} must be of this model, whose {name} is {own_kind}, got it {what}")
        found[name] = there
    for name in state:
        if name not in own and not name.endswith("_extra_state"):
            raise ValueError(f"{where} must be of this model, got {name}, which the model does not have")
    return found


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        file = next((path / name for name in _WEIGHTS if (path / name).exists()), None)
        if file is None:
            raise ValueError(f"it is a folder without {', '.join(_WEIGHTS)}")
        return _read(file)
    if path.name.endswith(".index.json"):
        files = set(json.loads(read_bytes(path))["weight_map"].values())
        return {name: value for file in sorted(files) for name, value in _read(path.parent / Path(file).name).items()}
    if _is_own(path):
        return load_checkpoint(path).model
    if path.suffix == ".safetensors":
        from safetensors.torch import load

        return load(read_bytes(path))
    stored = load_archive(read_bytes(path))
    inner = [stored[name] for name in _INNER if isinstance(stored, dict) and isinstance(stored.get(name), dict)]
    state = inner[0] if inner else stored
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError("it holds no tensors by name")
    return state


def _is_own(path: Path) -> bool:
    """Return whether a file is a checkpoint of this package, which has a checksum."""
    return path.suffix == ".safetensors" and re.fullmatch(r"epoch_\d+", path.stem) is not None


def _without_prefix(state: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Return what is under the one prefix that all of a model's names have in a state, if there is one."""
    own = [name for name, value in model.state_dict().items() if isinstance(value, Tensor)]
    if own and not any(name in state for name in own):
        for prefix in dict.fromkeys(name.removesuffix(own[0]) for name in state if name.endswith(f".{own[0]}")):
            inner = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            if any(name in inner for name in own):
                return inner
    return state


def _hugging_face(folder: Path) -> dict[int, Path]:
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    found = [(re.fullmatch(r"checkpoint-(\d+)", name, re.ASCII), folder / name) for name in names]
    steps = {int(match[1]): path for match, path in found if match}
    epochs = [_epoch(path) for path in steps.values()]
    whole = {int(epoch): path for epoch, path in zip(epochs, steps.values(), strict=True) if epoch == int(epoch)}
    return whole if len(whole) == len(steps) else steps


def _epoch(path: Path) -> float:
    """Return the epoch of a Hugging Face checkpoint, or one half if it does not tell."""
    try:
        return float(json.loads((path / "trainer_state.json").read_bytes())["epoch"])
    except (OSError, KeyError, TypeError, ValueError):
        return 0.5


def _lightning(folder: Path) -> dict[int, Path]:
    found = [(path, re.search(r"epoch=(\d+)(?:.*step=(\d+))?", path.name)) for path in sorted(folder.glob("*.ckpt"))]
    told = [(int(match[2] or -1), int(match[1]), path) for path, match in found if match]
    return {epoch: path for _, epoch, path in sorted(told)}
