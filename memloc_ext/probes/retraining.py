"""Layer retraining: does one layer group, trained anew on clean examples alone, bring the memorized labels back?"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from memloc_ext._version import __version__
from memloc_ext.borrowing import uncompiled
from memloc_ext.distributed import world_size
from memloc_ext.examples import Data, Examples
from memloc_ext.files import parsed
from memloc_ext.marks import Marks
from memloc_ext.nn import ExampleTiedDropout
from memloc_ext.parts import Parts, fingerprint, spread_parts
from memloc_ext.probes.accuracy import Accuracy, Evaluation
from memloc_ext.probes.layer_groups import Groups, LayerGroup, chosen_groups
from memloc_ext.probes.parameter_variants import named_tensors
from memloc_ext.probes.states import State, read_state
from memloc_ext.tasks import Task, TaskName
from memloc_ext.training import Backward, TrainConfig
from memloc_ext.training.epoch import epoch_rng, train_epoch

FITTED, ENDED = "fitted", "ended"
STOPPED = (FITTED, ENDED)


@dataclass(frozen=True)
class RetrainedEpoch:
    """A model while one of its layer groups is trained anew.

    Attributes:
        epoch: Number of finished epochs; 0: the group is back at its initial weights and not trained yet.
        loss: Mean over the clean examples, each before the step of its batch; None in epoch 0.
        accuracy: Of the whole model after the epoch.
    """

    epoch: int
    loss: float | None
    accuracy: Accuracy


@dataclass(frozen=True)
class GroupRetraining:
    """One layer group trained anew.

    Attributes:
        epochs: From 0 on.
        stopped: ``fitted``: every clean example was predicted as its label for ``patience`` epochs in a
            row; ``ended``: all epochs are over.
    """

    epochs: list[RetrainedEpoch]
    stopped: str


@dataclass(frozen=True)
class Retraining:
    """What `retrain` found.

    Attributes:
        unchanged: The model as it is.
        groups: Layer group to its retraining, in the order of the groups.
    """

    unchanged: Accuracy
    groups: dict[str, GroupRetraining]

    def rows(self) -> list[dict[str, Any]]:
        """Return a row per layer group and epoch: ``group``, ``epoch`` and the shares of `Accuracy`.

        The shares are ``clean``, ``memorized`` and ``test``; epoch 0 is before the training.
        """
        parts = ("clean", "memorized", "test")
        records = [(group, record) for group, result in self.groups.items() for record in result.epochs]
        return [{"group": group, "epoch": found.epoch, **found.accuracy.shares(parts)} for group, found in records]


def retrain(
    model: nn.Module,
    state: State,
    data: Data,
    *,
    memorized: Marks | None = None,
    true_labels: Any | None = None,
    test: Data | None = None,
    task: TaskName | Task = "classification",
    groups: Groups = None,
    epochs: int = 20,
    learning_rate: float = 0.01,
    train_batch_size: int = 64,
    patience: int = 3,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    seed: int = 0,
    batch_size: int = 512,
    num_workers: int = 0,
    parts: Parts | None = None,
) -> Retraining:
    """Put one layer group at a time back to its initial weights, and train it alone, on the clean examples only.

    Each group is trained in a copy of the model, by SGD with a triangular schedule; the defaults are the paper's but
    for the batch size. Whatever is outside the group stays as it is, bit for bit: there, parameters need no gradient
    and modules are in evaluation mode. The group's modules, which are those that own its parameters and those that hold
    no others, are in training mode. An `ExampleTiedDropout` gives each example its own mask while the group is trained,
    wherever it is, unless its mode was set by name.

    A group's result depends on no other group. Several processes (see `memloc_ext.distributed`) share the groups.

    Args:
        model: The trained model; left as it was.
        state: Its state dict from before the first epoch, or the path of one; see `memloc_ext.probes.states`.
        data: Training examples, of which at least one is clean; see `memloc_ext.examples`. The memorized ones are
            evaluated only.
        memorized: Bool ``[N]`` by number, or the numbers; by default what the data set says, which must then say it.
        true_labels: Targets before any noise, ``[N, *]`` by number; by default what the data set says.
        test: Test examples.
        task: ``classification``, ``tokens``, or an object with ``loss`` and ``right``; see `memloc_ext.tasks`.
        groups: Layer group to names of parameters or modules, or names of some of `memloc_ext.models.layer_groups`; by
            default all of these.
        epochs: Largest number of passes over the clean examples, at least 1.
        learning_rate: Peak of the schedule, positive.
        train_batch_size: Examples in a batch of the training, at least 1.
        patience: Epochs in a row with every clean example fitted after which the training stops, at least 1.
        momentum: Of SGD, in ``[0, 1)``.
        weight_decay: Of SGD, at least 0.
        seed: In [0, 2**63); names the order of the examples and the draws of standard dropout.
        batch_size: Examples at a time where a data set is evaluated, at least 1; a ``DataLoader`` has its own.
        num_workers: Processes that read a data set; a ``DataLoader`` has its own.
        parts: Keeps finished groups for a call with the same arguments, such as `memloc_ext.parts.PartFiles`.

    Returns:
        The accuracy of the model as it is, and of each group's copy before its training and after each epoch, as by
        `memloc_ext.accuracy`; test examples, which have no masks, are left out in mode ``train``.

    Raises:
        ValueError: If an argument breaks the above, a group is not there, ``state`` is damaged or of another model, or
            the model holds a ``torch.nn.SyncBatchNorm`` and there are several processes.
        TypeError: If ``groups`` is a single string, or data can be iterated only once.
        OSError: If the state cannot be read.
        FloatingPointError: If a loss is not finite.

    Source: Maini et al., "Can Neural Network Memorization Be Localized?", ICML 2023, section on layer retraining.
    """
    model = getattr(model, "_orig_mod", model)
    if patience < 1:
        raise ValueError(f"retrain: patience must be at least 1, got {patience}")
    config = TrainConfig(epochs, train_batch_size, learning_rate, momentum, weight_decay, "triangular", seed=seed)
    chosen = chosen_groups("retrain", model, groups)
    evaluation = Evaluation("retrain", model, data, memorized, true_labels, test, task, batch_size, num_workers)
    if evaluation.memorized is None:
        raise ValueError("retrain: memorized must be bool [N] by number, or numbers of examples, got None")
    clean = evaluation.train.subset((~evaluation.memorized(evaluation.train.indices)).nonzero()[:, 0])
    if len(clean) == 0:
        raise ValueError("retrain: data must hold at least one clean training example, got none")
    if world_size() > 1 and any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        rule = "in several processes, each of which trains other groups; call it in one process"
        raise ValueError(f"retrain: model must hold no SyncBatchNorm {rule}")
    initial = read_state("retrain", state, model)

    def one(group: LayerGroup) -> dict[str, Any]:
        return asdict(_retrain_group(model, initial, group, clean, config, patience, evaluation))

    unchanged, work, common = evaluation.accuracy(model), {}, None
    if parts is not None:
        settings = [asdict(config), patience, batch_size]
        common = fingerprint(__version__, model.state_dict(), evaluation.digest(), settings)
    for number, group in enumerate(chosen.values()):
        key = number if parts is None else fingerprint(common, group.names, [initial[name] for name in group.names])
        work[f"retrain_{key}"] = group
    results = spread_parts(one, work, parts, partial(parsed, GroupRetraining))
    return Retraining(unchanged, dict(zip(chosen, results, strict=True)))


def _retrain_group(
    model: nn.Module,
    state: Mapping[str, Tensor],
    group: LayerGroup,
    clean: Examples,
    config: TrainConfig,
    patience: int,
    evaluation: Evaluation,
) -> GroupRetraining:
    network = copy.deepcopy(model)
    parameters = _isolated(network, state, group)
    modules = list(_modules(network, group))
    optimizer = torch.optim.SGD(parameters, config.learning_rate, config.momentum, weight_decay=config.weight_decay)
    scaler = torch.amp.GradScaler(clean.device.type, enabled=False)
    records, fitted = [RetrainedEpoch(0, None, evaluation.accuracy(network))], 0
    for epoch in range(1, config.epochs + 1):
        network.eval()
        for module in modules:
            module.training = True
        with uncompiled(), torch.enable_grad(), epoch_rng(config.seed, epoch, clean.device) as generator:
            how = (config, epoch, generator, Backward(), evaluation.task)
            trained = train_epoch(network, clean, optimizer, scaler, *how)
        records.append(RetrainedEpoch(epoch, trained["loss"], evaluation.accuracy(network)))
        fitted = fitted + 1 if records[-1].accuracy.clean == 1 else 0
        if fitted == patience:
            return GroupRetraining(records, FITTED)
    return GroupRetraining(records, ENDED)


def _isolated(network: nn.Module, state: Mapping[str, Tensor], group: LayerGroup) -> list[nn.Parameter]:
    """Put a group back to a state, and return its parameters, which are the only ones that need a gradient then."""
    tensors = named_tensors(network)
    with torch.no_grad():
        for name in group.names:
            tensors[name].copy_(state[name])
    for name, parameter in network.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(name in group.parameters)
    return [parameter for name, parameter in network.named_parameters() if name in group.parameters]


def _modules(network: nn.Module, group: LayerGroup) -> Iterator[nn.Module]:
    """Yield the modules that train with a group, without their children, and every `ExampleTiedDropout`."""
    own = {id(parameter) for name, parameter in network.named_parameters() if name in group.parameters}
    inside: list[str] = []
    for name, module in network.named_modules():
        below = {id(parameter) for parameter in module.parameters()}
        if below and below <= own:
            inside.append(f"{name}." if name else "")
        owns = not own.isdisjoint(id(parameter) for parameter in module.parameters(recurse=False))
        within = any(f"{name}.".startswith(prefix) for prefix in inside)
        if owns or within or isinstance(module, ExampleTiedDropout):
            yield module
