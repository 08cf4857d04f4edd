"""The tensors of a model's layer groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from memloc_ext import models

Groups = Mapping[str, Sequence[str]] | Sequence[str] | None
"""Layer group to names of parameters or of modules; or some of the model's own groups by name; or None for all."""


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
    """Return the layer groups of a model, which is not compiled, that are to be probed.

    Raises:
        ValueError: If there is none, or a group or parameter is not the model's, is there twice, or a group is empty.
        TypeError: If ``groups`` is a single string.
    """
    if isinstance(groups, str):
        raise TypeError(f"{function}: groups must be a mapping or a list of names, got the string {groups!r}")
    if groups is None or isinstance(groups, Mapping):
        chosen = models.layer_groups(model, groups)
    else:
        own = models.layer_groups(model)
        for group in groups:
            if group not in own:
                raise ValueError(f"{function}: groups must be among {', '.join(own)}, got {group!r}")
        chosen = {group: own[group] for group in groups}
    if not chosen:
        raise ValueError(f"{function}: groups must hold at least one layer group, got none")
    state, found = model.state_dict(), {}
    kept = [name for name, _ in model.named_buffers() if name in state]
    for group, names in chosen.items():
        owners = {name.rpartition(".")[0] for name in names}
        found[group] = LayerGroup(tuple(names), tuple(name for name in kept if name.rpartition(".")[0] in owners))
    return found
