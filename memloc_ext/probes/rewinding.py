"""Layer rewinding: what a trained model still predicts with one layer group put back to an earlier epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memloc_ext._version import __version__
from memloc_ext.batches import device_of
from memloc_ext.examples import Data
from memloc_ext.files import parsed
from memloc_ext.marks import Marks
from memloc_ext.parts import Parts, fingerprint, spread_parts
from memloc_ext.probes.accuracy import Accuracy, Evaluation
from memloc_ext.probes.layer_groups import Groups, LayerGroup, chosen_groups
from memloc_ext.probes.parameter_variants import ParameterVariants
from memloc_ext.probes.states import States, epoch_of, read_state, sources_of
from memloc_ext.tasks import Classification, Task, TaskName, Tokens, logits_of

PAPER_EPOCHS = tuple(range(0, 15, 2))
"""The epochs that the authors rewind to."""
_SHORT = 3
"""Epochs of a training that is so short that all of them are taken."""


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
        return {found.epoch: found for found in self.epochs}[epoch]


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

    def rows(self) -> list[dict[str, Any]]:
        """Return a row per layer group, epoch and treatment of the buffers.

        The keys are ``group``; ``epoch``; ``buffers``: whether the group's batch-norm statistics are put back too, None
        for a group without; and the shares ``clean``, ``memorized`` and ``test`` of `Accuracy`.
        """
        rows = []
        for group, result in self.groups.items():
            for found in result.epochs:
                ways = {False: found.without_buffers, True: found.with_buffers}
                for buffers, share in ways.items() if result.has_buffers else [(None, found.with_buffers)]:
                    shares = share.shares(("clean", "memorized", "test"))
                    rows.append({"group": group, "epoch": found.epoch, "buffers": buffers, **shares})
        return rows


def rewind(
    model: nn.Module,
    states: States,
    data: Data,
    *,
    memorized: Marks | None = None,
    true_labels: Any | None = None,
    test: Data | None = None,
    task: TaskName | Task = "classification",
    groups: Groups = None,
    epochs: Sequence[int] | None = None,
    batch_size: int = 512,
    num_workers: int = 0,
    parts: Parts | None = None,
) -> Rewinding:
    """Put one layer group at a time back to its weights after each of some epochs, and evaluate the model.

    The model is evaluated as by `memloc_ext.accuracy`, in evaluation mode but in the dropout mode it is in; test
    examples, which have no masks of their own, are left out in mode ``train``. It is left as it was. What does not
    depend on the group is computed once per batch for all epochs (see `memloc_ext.probes.parameter_variants`), and
    accuracy is that of a model that was loaded so, exactly; with PyTorch's own transformer layers, to rounding.

    Each checkpoint is read once, and of all of them the tensors of the groups are held. Several processes (see
    `memloc_ext.distributed`) share the groups.

    Args:
        model: The trained model.
        states: Epoch to state dict or path; or a list of such, from epoch 0 on; or a folder of checkpoints, of this
            package, of Hugging Face or of Lightning, see `memloc_ext.probes.states.found_states`.
        data: Training examples, at least one; see `memloc_ext.examples`.
        memorized: Bool ``[N]`` by number, or the numbers; by default what the data set says, or none.
        true_labels: Targets before any noise, ``[N, *]`` by number; by default what the data set says.
        test: Test examples.
        task: ``classification``, ``tokens``, or an object with ``loss`` and ``right``; see `memloc_ext.tasks`.
        groups: Layer group to names of parameters or modules, or names of some of `memloc_ext.models.layer_groups`; by
            default all of these.
        epochs: To put the groups back to; by default all that are given one by one; of a folder the paper's, 0, 2,
            .. 14, before its last checkpoint; all before it if the paper's are fewer than two, or the last is of epoch
            3 or less.
        batch_size: Examples at a time of a data set, at least 1; a ``DataLoader`` has its own.
        num_workers: Processes that read a data set; a ``DataLoader`` has its own.
        parts: Keeps finished groups for a call with the same arguments, such as `memloc_ext.parts.PartFiles`.

    Returns:
        The accuracy of the model as it is, and of each group at each epoch, with the group's batch-norm statistics as
        of then and as they are.

    Raises:
        ValueError: If a group or epoch is not there, a checkpoint is damaged or of another model, there are no training
            examples, or their numbers cannot be known.
        TypeError: If ``groups`` is a single string, or data can be iterated only once.
        OSError: If a checkpoint cannot be read.

    Source: Maini et al., "Can Neural Network Memorization Be Localized?", ICML 2023, section on layer rewinding.
    """
    model = getattr(model, "_orig_mod", model)
    chosen = chosen_groups("rewind", model, groups)
    evaluation = Evaluation("rewind", model, data, memorized, true_labels, test, task, batch_size, num_workers)
    sources = sources_of("rewind", states)
    if epochs is None:
        when = _before_last(sources) if isinstance(states, str | Path) else list(sources)
    else:
        when = _there(sources, epochs)
    if not when:
        raise ValueError("rewind: epochs must hold at least one, got none")
    names = {name for group in chosen.values() for name in group.names}
    past = {epoch: _part(read_state("rewind", sources[epoch], model), names) for epoch in when}
    unchanged = evaluation.accuracy(model)
    if unchanged.counts["clean"] + unchanged.counts["memorized"] == 0:
        raise ValueError("rewind: data must hold at least one training example, got none")
    known = isinstance(evaluation.task, Classification | Tokens)  # to read nothing but the logits
    variants = ParameterVariants(model, logits_of if known else lambda output: output)

    def one(group: LayerGroup) -> dict[str, Any]:
        return asdict(_rewind_group(variants, evaluation, group, past, device_of(model)))

    work, common = {}, None
    if parts is not None:
        common = fingerprint(__version__, model.state_dict(), evaluation.digest(), when, batch_size)
    for number, group in enumerate(chosen.values()):
        values = [state[name] for state in past.values() for name in group.names]
        key = number if parts is None else fingerprint(common, group.names, values)
        work[f"rewind_{key}"] = group
    results = spread_parts(one, work, parts, partial(parsed, GroupRewinding))
    return Rewinding(unchanged, dict(zip(chosen, results, strict=True)))


def _rewind_group(
    variants: ParameterVariants,
    evaluation: Evaluation,
    group: LayerGroup,
    states: Mapping[int, Mapping[str, Tensor]],
    device: torch.device,
) -> GroupRewinding:
    ways = [group.parameters, group.names] if group.buffers else [group.parameters]
    cells = []
    for state in states.values():
        whole = {name: state[name].to(device) for name in group.names}
        cells += [_part(whole, names) for names in ways]
    found = evaluation.accuracies(lambda x: variants.outputs(x, cells), len(cells))
    step = len(ways)
    pairs = zip(states, found[::step], found[step - 1 :: step], strict=True)
    return GroupRewinding(bool(group.buffers), [RewoundAccuracy(epoch, full, bare) for epoch, bare, full in pairs])


def _part(state: Mapping[str, Tensor], names: Sequence[str] | set[str]) -> dict[str, Tensor]:
    return {name: state[name] for name in names}


def _there(sources: Mapping[int, Any], epochs: Sequence[int]) -> list[int]:
    wanted = {epoch_of("rewind", "epochs", epoch) for epoch in epochs}
    for epoch in wanted - sources.keys():
        raise ValueError(f"rewind: epochs must be among those of states, {_listed(sources)}, got {epoch}")
    return sorted(wanted)


def _before_last(sources: Mapping[int, Any]) -> list[int]:
    last = max(sources)
    before = sorted(epoch for epoch in sources if epoch < last)
    if not before:
        raise ValueError(f"rewind: states must hold one to rewind to, before the last, got {_listed(sources)}")
    papers = [epoch for epoch in before if epoch in PAPER_EPOCHS]
    return before if last <= _SHORT or len(papers) < 2 else papers  # one may be a number of steps


def _listed(epochs: Mapping[int, Any]) -> str:
    return ", ".join(map(str, sorted(epochs)))
