"""Layer rewinding: what a trained model still predicts with one layer group put back to an earlier epoch.

Source: Maini et al., "Can Neural Network Memorization Be Localized?", ICML 2023, section on layer rewinding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memloc_ext._version import __version__
from memloc_ext.data import Dataset, Split
from memloc_ext.distributed import once
from memloc_ext.files import parsed
from memloc_ext.nn import example_ids
from memloc_ext.parts import Parts, fingerprint, spread_parts
from memloc_ext.probes.accuracy import Accuracy, accuracy, accuracy_of, masks_test_examples
from memloc_ext.probes.layer_states import Groups, LayerGroup, chosen_groups, dataset_digest, read_state
from memloc_ext.probes.parameter_variants import ParameterVariants
from memloc_ext.training import list_checkpoints

PAPER_EPOCHS = tuple(range(0, 15, 2))
"""The epochs that the authors rewind to."""
_SHORT = 3
"""Epochs of a training that is so short that all of them are taken."""


@dataclass(frozen=True)
class RewindConfig:
    """Which layer groups are rewound, and how far.

    Attributes:
        rewind_epochs: Epochs whose weights the groups get back, each at least 0; none for the paper's, see `rewind`.
        rewind_groups: Names of layer groups; none for all of the model's.

    Raises:
        ValueError: If an epoch is negative, or anything is there twice.
        TypeError: If a value is no tuple of such.
    """

    rewind_epochs: tuple[int, ...] = ()
    rewind_groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, kind in (("rewind_epochs", int), ("rewind_groups", str)):
            values = getattr(self, name)
            if type(values) is not tuple or any(type(value) is not kind for value in values):
                raise TypeError(f"RewindConfig: {name} must be a tuple of {kind.__name__}, got {values!r}")
            if len(set(values)) != len(values):
                raise ValueError(f"RewindConfig: {name} must be different, got {values}")
        if any(epoch < 0 for epoch in self.rewind_epochs):
            raise ValueError(f"RewindConfig: rewind_epochs must be at least 0, got {self.rewind_epochs}")


@dataclass(frozen=True)
class RewoundAccuracy:
    """A model with one layer group put back to an epoch.

    Attributes:
        epoch: Number of finished epochs then; 0 is the initialisation.
        with_buffers: Its accuracy if the group's batch-norm statistics are put back too.
        without_buffers: If these stay as they are; the same where the group has none.
    """

    epoch: int
    with_buffers: Accuracy
    without_buffers: Accuracy


@dataclass(frozen=True)
class GroupRewinding:
    """One layer group put back to every epoch.

    Attributes:
        has_buffers: Whether it has batch-norm statistics.
        epochs: In their order.
    """

    has_buffers: bool
    epochs: list[RewoundAccuracy]

    def at(self, epoch: int) -> RewoundAccuracy:
        """Return what comes of putting the group back to an epoch; KeyError if that was not done."""
        for found in self.epochs:
            if found.epoch == epoch:
                return found
        raise KeyError(epoch)


@dataclass(frozen=True)
class Rewinding:
    """What `rewind` found.

    Attributes:
        unchanged: The model as it is.
        groups: Layer group to its rewinding, in the order of the groups; each to the same epochs.
    """

    unchanged: Accuracy
    groups: dict[str, GroupRewinding]

    @property
    def epochs(self) -> list[int]:
        """The epochs that were rewound to."""
        return [found.epoch for group in list(self.groups.values())[:1] for found in group.epochs]


def rewind(
    model: nn.Module,
    checkpoints: str | Path | Mapping[int, Mapping[str, Any]],
    dataset: Dataset,
    *,
    groups: Groups = None,
    epochs: Sequence[int] | None = None,
    batch_size: int = 512,
    parts: Parts | None = None,
) -> Rewinding:
    """Put one layer group at a time back to its weights after each of some epochs, and evaluate the model.

    The model is evaluated as by `memloc_ext.probes.accuracy`, in evaluation mode but in the dropout mode it is in;
    test examples, which have no masks of their own, are left out in mode ``train``. It is left as it was. What does
    not depend on the group is computed once per batch for all epochs (see `memloc_ext.probes.parameter_variants`), and
    accuracy is that of a model that was loaded so, exactly; with PyTorch's own transformer layers, to rounding.

    Each checkpoint is read once, and of all of them the tensors of the groups are held. Several processes (see
    `memloc_ext.distributed`) share the groups.

    Args:
        model: The trained model, on the device of ``dataset``.
        checkpoints: Folder of the ``epoch_<number>.pt`` of its training, or epoch to state dict.
        dataset: Training and test examples; at least one to train on.
        groups: Layer group to parameter names; or names of the model's own, see `memloc_ext.models.layer_groups`; by
            default all of these.
        epochs: To put the groups back to; by default the paper's 0, 2, .. 14, of those that come before the last
            checkpoint, or all before it if that is of epoch 3 or less.
        batch_size: Examples at a time, at least 1.
        parts: Keeps what is finished, group by group, such as `memloc_ext.parts.PartFiles`; a call with the same
            arguments goes on from there.

    Returns:
        The accuracy of the model as it is, and of each group at each epoch, with the group's batch-norm statistics as
        of then and as they are.

    Raises:
        ValueError: If a group or epoch is not there, a checkpoint is damaged or of another model, or there are no
            training examples.
        TypeError: If ``groups`` is a single string.
        OSError: If a checkpoint cannot be read.

    Source: Maini et al., "Can Neural Network Memorization Be Localized?", ICML 2023, section on layer rewinding.
    """
    model = getattr(model, "_orig_mod", model)
    if len(dataset.train) == 0:
        raise ValueError("rewind: dataset must hold at least one training example, got none")
    chosen = chosen_groups("rewind", model, groups)
    sources: Mapping[int, Any] = checkpoints if isinstance(checkpoints, Mapping) else _found(checkpoints)
    if not sources:
        raise ValueError(f"rewind: checkpoints must hold at least one checkpoint, got none in {checkpoints}")
    when = _epochs(sources, epochs)
    names = {name for group in chosen.values() for name in group.names}
    test, variants = not masks_test_examples(model), ParameterVariants(model)
    states = {epoch: _part(read_state("rewind", sources[epoch], model), names) for epoch in when}

    def one(group: LayerGroup) -> dict[str, Any]:
        return asdict(_rewind_group(variants, dataset, group, states, batch_size, test))

    unchanged = accuracy(model, dataset, test=test, batch_size=batch_size)
    common = fingerprint(__version__, model.state_dict(), dataset_digest(dataset), when, batch_size)
    work = {}
    for group in chosen.values():
        values = [state[name] for state in states.values() for name in group.names]
        work[f"rewind_{fingerprint(common, group.names, values)}"] = group
    results = spread_parts(one, work, parts, partial(parsed, GroupRewinding))
    return Rewinding(unchanged, dict(zip(chosen, results, strict=True)))


def _found(folder: str | Path) -> dict[int, Path]:
    return once(lambda: list_checkpoints(folder))  # another machine may not see the newest yet


def _rewind_group(
    variants: ParameterVariants,
    dataset: Dataset,
    group: LayerGroup,
    states: Mapping[int, Mapping[str, Tensor]],
    batch_size: int,
    test: bool,
) -> GroupRewinding:
    parts = [group.parameters, group.names] if group.buffers else [group.parameters]
    device = dataset.train.device
    cells = []
    for state in states.values():
        whole = {name: state[name].to(device) for name in group.names}
        cells += [_part(whole, names) for names in parts]
    train = _predict(variants, dataset.train, cells, batch_size)
    tested = _predict(variants, dataset.test, cells, batch_size) if test else [None] * len(cells)
    found = [accuracy_of(dataset, *pair) for pair in zip(train, tested, strict=True)]
    step = len(parts)
    pairs = zip(states, found[::step], found[step - 1 :: step], strict=True)
    return GroupRewinding(bool(group.buffers), [RewoundAccuracy(epoch, full, bare) for epoch, bare, full in pairs])


def _predict(
    variants: ParameterVariants, split: Split, cells: Sequence[Mapping[str, Tensor]], batch_size: int
) -> list[Tensor]:
    """Return the predicted classes in each cell, ``[N]``."""
    classes: list[list[Tensor]] = [[split.labels.new_empty(0)] for _ in cells]
    for inputs, _, ids in split.batches(batch_size):
        with example_ids(ids):
            for found, logits in zip(classes, variants.outputs(inputs, cells), strict=True):
                found.append(logits.argmax(1))
    return [torch.cat(found) for found in classes]


def _part(state: Mapping[str, Tensor], names: Sequence[str] | set[str]) -> dict[str, Tensor]:
    return {name: state[name] for name in names}


def _epochs(there: Mapping[int, Any], epochs: Sequence[int] | None) -> list[int]:
    if epochs is None:
        last = max(there)
        epochs = [epoch for epoch in there if epoch < last and (last <= _SHORT or epoch in PAPER_EPOCHS)]
        if not epochs:
            raise ValueError(f"rewind: checkpoints must hold one to rewind to, before the last, got {_listed(there)}")
    for epoch in epochs:
        if epoch not in there:
            raise ValueError(f"rewind: epochs must be among the checkpoints, which are {_listed(there)}, got {epoch}")
    if not epochs:
        raise ValueError("rewind: epochs must hold at least one, got none")
    return sorted(set(epochs))


def _listed(epochs: Mapping[int, Any]) -> str:
    return ", ".join(map(str, sorted(epochs)))
