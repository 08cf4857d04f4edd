"""Continue a training that was interrupted, if it is the same one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memloc_ext import distributed
from memloc_ext.files import shown
from memloc_ext.training.checkpoint import Checkpoint, is_dense, list_checkpoints, load_checkpoint
from memloc_ext.training.config import TrainConfig

_DATA = "the digest of the data's targets and numbers"


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
    for name in (*given, *sorted(stored.keys() - given.keys())):
        if given.get(name) != stored.get(name):
            raise ValueError(
                f"train: {name} must be {shown(stored.get(name))} to continue {path}, got {shown(given.get(name))}; "
                "train with other settings in another folder"
            )
    if not _is_momentum(saved.optimizer.get("state"), optimizer) or not _is_scaler(saved.scaler, scaler):
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


def _is_scaler(state: dict[str, Any], scaler: torch.amp.GradScaler) -> bool:
    own = scaler.state_dict()
    return state.keys() == own.keys() and all(type(value) in (int, float) for value in state.values())


def _trait(name: str, value: Any) -> Any:
    if name.endswith("_extra_state"):  # settings of a module, such as the seed of its dropout, not weights
        return value.cpu().numpy().tobytes() if isinstance(value, Tensor) else value
    return f"{value.dtype} {list(value.shape)}"
