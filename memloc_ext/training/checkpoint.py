"""What a training keeps after every epoch, how it is stored, and how a training that was interrupted goes on."""

from __future__ import annotations

import pickle
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memloc_ext import distributed
from memloc_ext.files import parsed, read_bytes, shown
from memloc_ext.tensor_files import load_archive, load_tensors, save_tensors
from memloc_ext.training.config import TrainConfig


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


@dataclass(frozen=True)
class _About:
    """What is no tensor in a checkpoint; ``extra`` is extra state of modules, ``optimizer`` has no tensors in it."""

    epoch: int
    optimizer: dict[str, Any]
    scaler: dict[str, int | float]
    history: list[dict[str, int | float]]
    config: dict[str, bool | int | float | str]
    data: str
    extra: dict[str, Any]


_NAMES = [field.name for field in fields(Checkpoint)]
_DATA = "the digest of the data's targets and numbers"
_FILE = r"epoch_(\d+)\.(safetensors|pt)"


def save_checkpoint(folder: str | Path, checkpoint: Checkpoint) -> Path:
    """Write ``epoch_<number>.safetensors`` into a folder, atomically, and return its path.

    Its tensors are ``model.<name>`` and ``optimizer.<parameter>.<name>``; the header holds the rest as JSON.

    Raises:
        TypeError: If the extra state of a module is neither a tensor nor JSON.
        OSError: If it cannot be written; nothing under that name changes then.
    """
    path = Path(folder) / f"epoch_{checkpoint.epoch:03d}.safetensors"
    tensors = {f"model.{name}": value for name, value in checkpoint.model.items() if isinstance(value, Tensor)}
    extra = {name: value for name, value in checkpoint.model.items() if not isinstance(value, Tensor)}
    state: dict[str, dict[str, Any]] = {}
    for number, kept in checkpoint.optimizer.get("state", {}).items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in kept.items() if isinstance(value, Tensor)}
        state[str(number)] = {name: value for name, value in kept.items() if not isinstance(value, Tensor)}
    about = {name: value for name, value in vars(checkpoint).items() if name != "model"}
    save_tensors(path, tensors, {**about, "optimizer": {**checkpoint.optimizer, "state": state}, "extra": extra})
    return path


def load_checkpoint(path: str | Path, map_location: str | torch.device = "cpu") -> Checkpoint:
    """Read a checkpoint; only tensors and plain values, so that a file of unknown origin cannot run code.

    Args:
        path: A file that `save_checkpoint` wrote, or the ``.pt`` of an earlier version.
        map_location: Device of the tensors.

    Raises:
        ValueError: If the file is damaged or something else, or its tensors cannot be put on ``map_location``; names
            the file.
        OSError: If it cannot be read, such as FileNotFoundError.
    """
    path = Path(path)
    checkpoint = _from_pickle(path, map_location) if path.suffix == ".pt" else _from_tensors(path, map_location)
    match = re.fullmatch(_FILE, path.name, re.ASCII)
    if match and match[1] != f"{checkpoint.epoch:03d}":
        raise ValueError(f"{path}: must be of its epoch, got {checkpoint.epoch}")
    return checkpoint


def _from_tensors(path: Path, device: str | torch.device) -> Checkpoint:
    tensors, about = load_tensors(path, _About)
    state = about.optimizer.get("state")
    if not isinstance(state, dict) or any(not isinstance(kept, dict) for kept in state.values()):
        raise ValueError(f"{path}: is no checkpoint: the optimizer must have a state")
    try:
        tensors = {name: value.to(device) for name, value in tensors.items()}
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{path}: cannot be loaded as a checkpoint: {error}") from error
    model = dict(about.extra)
    try:
        numbered = {int(number): dict(kept) for number, kept in state.items()}
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "optimizer":
                number, _, rest = rest.partition(".")
                numbered[int(number)][rest] = value
            else:
                model[rest] = value
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: is no checkpoint: the optimizer has no parameter {error}") from error
    optimizer = {**about.optimizer, "state": numbered}
    return Checkpoint(about.epoch, model, optimizer, about.scaler, about.history, about.config, about.data)


def _from_pickle(path: Path, device: str | torch.device) -> Checkpoint:
    stored = read_bytes(path)
    try:
        values = load_archive(stored, device)
    except pickle.UnpicklingError:
        raise ValueError(f"{path}: is no checkpoint: it holds more than tensors and plain values") from None
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(f"{path}: cannot be loaded as a checkpoint: {error}") from error
    if not isinstance(values, dict) or set(values) != set(_NAMES):
        raise ValueError(f"{path}: is no checkpoint: it must hold {', '.join(_NAMES)}")
    for name in ("model", "optimizer"):
        if not isinstance(values[name], dict):
            raise ValueError(f"{path}: {name} must be dict, got {type(values[name]).__name__}")
    for name, value in values["model"].items():
        is_extra = str(name).endswith("_extra_state") and not isinstance(value, Tensor)
        if not isinstance(name, str) or not (is_extra or is_dense(value)):
            raise ValueError(
                f"{path}: model must hold dense tensors by name, got {type(value).__name__} for {shown(name)}"
            )
    try:
        about = parsed(_About, {**values, "optimizer": {}, "extra": {}})
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is no checkpoint: {shown(str(error))}") from error
    return Checkpoint(**{**values, "history": about.history})


def is_dense(value: Any) -> bool:
    """Return whether something is a tensor with all its elements in memory."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and not (value.is_meta or value.is_quantized or value.is_nested)
    )


def list_checkpoints(folder: str | Path) -> dict[int, Path]:
    """Return the checkpoints of a folder by epoch, in order; none if there is no such folder."""
    found = {}
    for path in sorted(Path(folder).glob("*")):  # of two files of an epoch, .safetensors comes after .pt
        match = re.fullmatch(_FILE, path.name, re.ASCII)
        if match and match[1] == f"{int(match[1]):03d}":
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def restore(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    config: TrainConfig,
    data: str,
) -> list[dict[str, float]]:
    """Give model, optimizer and scaler the state of the newest checkpoint, which the first process reads for all.

    Returns its history, one record per epoch, empty without a checkpoint. ValueError if the checkpoint is damaged, or
    differs in the config, in the name, shape, dtype or extra state of anything in the model, or in the ``data``, the
    `memloc_ext.examples.digest`; says in what. Nothing changes then.
    """
    newest = distributed.once(lambda: _newest(folder))
    if newest is None:
        return []
    path, saved = newest
    given = _identity(asdict(config), model.state_dict(), data)
    stored = _identity(saved.config, saved.model, saved.data)
    epochs = [record.get("epoch") for record in saved.history]
    if epochs != list(range(saved.epoch + 1)):
        raise ValueError(f"train: {path}: must hold a record per epoch, 0 to {saved.epoch}, got {shown(epochs)}")
    for name in given | stored:
        if given.get(name) != stored.get(name):
            raise ValueError(
                f"train: {name} must be {shown(stored.get(name))} to continue {path}, got {shown(given.get(name))}; "
                "train with other settings in another folder"
            )
    has_scale = saved.scaler.keys() == scaler.state_dict().keys()
    if not _is_momentum(saved.optimizer.get("state"), optimizer) or not has_scale:
        raise ValueError(f"train: {path}: must hold the momentum of every parameter, and the scale of the gradients")
    model.load_state_dict(saved.model)
    # its settings are those of the config
    optimizer.load_state_dict({**optimizer.state_dict(), "state": saved.optimizer["state"]})
    scaler.load_state_dict(saved.scaler)
    return saved.history


def _newest(folder: Path) -> tuple[Path, Checkpoint] | None:
    found = list_checkpoints(folder)
    if not found:
        return None
    path = found[max(found)]
    try:
        return path, load_checkpoint(path)
    except ValueError as error:
        raise ValueError(f"train: {error}; delete it to continue from the one before") from error


def _identity(config: dict[str, Any], state: dict[str, Any], data: str) -> dict[str, Any]:
    settings = {f"config.{name}": value for name, value in config.items()}
    return settings | {f"model.{name}": _trait(name, value) for name, value in state.items()} | {_DATA: data}


def _is_momentum(state: Any, optimizer: torch.optim.Optimizer) -> bool:
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    return isinstance(state, dict) and all(
        number in parameters
        and isinstance(kept, dict)
        and set(kept) <= {"momentum_buffer"}
        and all(value is None or _like(value, parameters[number]) for value in kept.values())
        for number, kept in state.items()
    )


def _like(value: Any, tensor: Tensor) -> bool:
    written = is_dense(value) and 0 not in value.stride()  # in place, which a repeated element would not survive
    return written and (value.dtype, value.shape) == (tensor.dtype, tensor.shape)


def _trait(name: str, value: Any) -> Any:
    if name.endswith("_extra_state"):  # settings of a module, such as the seed of its dropout, not weights
        return value.cpu().numpy().tobytes() if isinstance(value, Tensor) else value
    return f"{value.dtype} {list(value.shape)}"
