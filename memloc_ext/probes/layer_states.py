"""The tensors of a model's layer groups, and their values at other times of its training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from memloc_ext import models
from memloc_ext.data import Dataset
from memloc_ext.parts import fingerprint
from memloc_ext.training import load_checkpoint

Groups = Mapping[str, Sequence[str]] | Sequence[str] | None
"""Layer group to parameter names; or some of the model's own groups by name; or None for all of them."""


@dataclass(frozen=True)
class LayerGroup:
    """Names of a group's tensors.

    Attributes:
        parameters: As in ``named_parameters``.
        buffers: Those in the state dict of the modules that own these parameters: the statistics of batch norms.
    """

    parameters: tuple[str, ...]
    buffers: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.parameters, *self.buffers)


def chosen_groups(function: str, model: nn.Module, groups: Groups) -> dict[str, LayerGroup]:
    """Return the layer groups to be probed.

    Args:
        function: Named in errors.
        model: Not compiled.
        groups: Which.

    Raises:
        ValueError: If there is none, or a group or parameter is not the model's, is there twice, or a group is empty.
        TypeError: If ``groups`` is a single string.
    """
    if isinstance(groups, str):
        raise TypeError(f"{function}: groups must be a list of names or a mapping, got the string {groups!r}")
    if isinstance(groups, Mapping):
        chosen = {group: list(names) for group, names in groups.items()}
    else:
        own = models.layer_groups(model)
        for group in groups or ():
            if group not in own:
                raise ValueError(f"{function}: groups must be among {', '.join(own)}, got {group!r}")
        chosen = {group: own[group] for group in (own if groups is None else groups)}
    if not chosen:
        raise ValueError(f"{function}: groups must hold at least one layer group, got none")
    known, seen = dict(model.named_parameters()), set[str]()
    for group, names in chosen.items():
        if not names:
            raise ValueError(f"{function}: groups must hold parameters, got {group!r} without")
        for name in names:
            if name not in known or name in seen:
                where = "twice" if name in seen else "which the model does not have"
                raise ValueError(f"{function}: groups must hold parameters of the model once, got {name} {where}")
            seen.add(name)
    state, buffers = model.state_dict(), [name for name, _ in model.named_buffers()]
    kept = [name for name in buffers if name in state]
    return {group: LayerGroup(tuple(names), _buffers(names, kept)) for group, names in chosen.items()}


def read_state(function: str, source: str | Path | Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Return the values of a model's parameters and buffers at another time, on the CPU if they are read from a file.

    Args:
        function: Named in errors.
        source: A checkpoint's path, or a state dict.
        model: Not compiled.

    Raises:
        ValueError: If a file is damaged, or it is the state of another model.
        OSError: If a file cannot be read.
    """
    if isinstance(source, Mapping):
        return checked_state(f"{function}: the state dict", source, model)
    return checked_state(f"{function}: {source}", load_checkpoint(source).model, model)


def checked_state(where: str, state: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers in a state dict; ValueError, which begins with ``where``, if another model's.

    ``load_state_dict`` would turn any dtype into the model's, complex numbers and float64 too.
    """
    own = {name: value for name, value in model.state_dict().items() if not name.endswith("_extra_state")}
    for name, value in own.items():
        there = state.get(name)
        if not isinstance(there, Tensor) or (there.dtype, there.shape) != (value.dtype, value.shape):
            what = f"as {there.dtype} {list(there.shape)}" if isinstance(there, Tensor) else "not there"
            raise ValueError(
                f"{where} must be of this model, whose {name} is {value.dtype} {list(value.shape)}, got it {what}"
            )
    for name in state:
        if name not in own and not name.endswith("_extra_state"):
            raise ValueError(f"{where} must be of this model, got {name}, which the model does not have")
    return {name: state[name] for name in own}


def dataset_digest(dataset: Dataset) -> str:
    """Return what stands for the examples of a data set, by their numbers and labels, and for which are memorized."""
    splits = (dataset.train, dataset.test)
    return fingerprint([[split.indices, split.labels, split.true_labels, split.memorized] for split in splits])


def _buffers(parameters: Sequence[str], buffers: Sequence[str]) -> tuple[str, ...]:
    owners = {name.rpartition(".")[0] for name in parameters}
    return tuple(name for name in buffers if name.rpartition(".")[0] in owners)
