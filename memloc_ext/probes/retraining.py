"""Layer retraining: does one layer group, trained anew on clean examples alone, bring the memorized labels back?

Source: Maini et al., "Can Neural Network Memorization Be Localized?", ICML 2023, section on layer retraining.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memloc_ext._version import __version__
from memloc_ext.borrowing import uncompiled
from memloc_ext.data import Dataset, Split
from memloc_ext.distributed import world_size
from memloc_ext.files import parsed
from memloc_ext.nn import ExampleTiedDropout
from memloc_ext.parts import Parts, fingerprint, spread_parts
from memloc_ext.probes.accuracy import Accuracy, accuracy, masks_test_examples
from memloc_ext.probes.layer_states import Groups, LayerGroup, chosen_groups, dataset_digest, read_state
from memloc_ext.training import Backward, TrainConfig
from memloc_ext.training.epoch import epoch_rng, train_epoch

FITTED, ENDED = "fitted", "ended"
STOPPED = (FITTED, ENDED)


@dataclass(frozen=True)
class RetrainConfig:
    """Which layer groups are trained anew, and how; the defaults are the paper's but for the batch size.

    The schedule is triangular; momentum and weight decay are those of `memloc_ext.training.TrainConfig`.

    Attributes:
        retrain_epochs: Largest number of passes over the clean examples, at least 1.
        retrain_learning_rate: Peak of the schedule, positive.
        retrain_batch_size: Examples in a batch, at least 1.
        patience: Epochs in a row with every clean example fitted after which the training stops, at least 1.
        retrain_groups: Names of layer groups; none for all of the model's.

    Raises:
        ValueError: If a value breaks the above.
        TypeError: If it is not a plain Python number, or tuple of names, as the attribute asks.

    Source: Maini et al., "Can Neural Network Memorization Be Localized?", ICML 2023, section on layer retraining.
    """

    retrain_epochs: int = 20
    retrain_learning_rate: float = 0.01
    retrain_batch_size: int = 64
    patience: int = 3
    retrain_groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("retrain_epochs", "retrain_batch_size", "patience"):
            value = getattr(self, name)
            if type(value) is not int:
                raise TypeError(f"RetrainConfig: {name} must be int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"RetrainConfig: {name} must be at least 1, got {value}")
        rate, groups = self.retrain_learning_rate, self.retrain_groups
        if type(rate) not in (int, float):
            raise TypeError(f"RetrainConfig: retrain_learning_rate must be float, got {type(rate).__name__}")
        if not 0 < rate < math.inf:
            raise ValueError(f"RetrainConfig: retrain_learning_rate must be positive and finite, got {rate}")
        if type(groups) is not tuple or any(type(group) is not str for group in groups):
            raise TypeError(f"RetrainConfig: retrain_groups must be a tuple of str, got {groups!r}")
        if len(set(groups)) != len(groups):
            raise ValueError(f"RetrainConfig: retrain_groups must be different, got {groups}")

    def as_training(self, seed: int) -> TrainConfig:
        """Return the same as settings of a training."""
        return TrainConfig(
            epochs=self.retrain_epochs,
            batch_size=self.retrain_batch_size,
            learning_rate=self.retrain_learning_rate,
            schedule="triangular",
            seed=seed,
        )


@dataclass(frozen=True)
class RetrainedEpoch:
    """A model while one of its layer groups is trained anew.

    Attributes:
        epoch: Number of finished epochs; 0: the group is back at its initial weights and not trained yet.
        loss: Cross-entropy, mean over the clean examples, each before the step of its batch; None in epoch 0.
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
        stopped: ``fitted``: every clean example was predicted as its label for `RetrainConfig.patience` epochs in a
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


def retrain(
    model: nn.Module,
    initial: str | Path | Mapping[str, Any],
    dataset: Dataset,
    *,
    groups: Groups = None,
    config: RetrainConfig = RetrainConfig(),
    seed: int = 0,
    batch_size: int = 512,
    parts: Parts | None = None,
) -> Retraining:
    """Put one layer group at a time back to its initial weights, and train it alone, on the clean examples only.

    Each group is trained in a copy of the model. Whatever is outside the group stays as it is, bit for bit: there,
    parameters need no gradient and modules are in evaluation mode. The group's modules, which are those that own its
    parameters and those that hold no others, are in training mode. An `ExampleTiedDropout` gives each example its own
    mask while the group is trained, wherever it is, unless its mode was set by name.

    A group's result depends on no other group. Several processes (see `memloc_ext.distributed`) share the groups.

    Args:
        model: The trained model, on the device of ``dataset``; left as it was.
        initial: The path of its checkpoint from before the first epoch, or its state dict then.
        dataset: Training and test examples; at least one clean example to train on. The others are evaluated only.
        groups: Layer group to parameter names; or names of the model's own, see `memloc_ext.models.layer_groups`; by
            default those of ``config``.
        config: How to train.
        seed: In [0, 2**63); names the order of the examples and the draws of standard dropout.
        batch_size: Examples at a time where the model is evaluated, at least 1.
        parts: Keeps what is finished, group by group, such as `memloc_ext.parts.PartFiles`; a call with the same
            arguments goes on from there.

    Returns:
        The accuracy of the model as it is, and of each group's copy before its training and after each epoch, as by
        `memloc_ext.probes.accuracy`; test examples, which have no masks, are left out in mode ``train``.

    Raises:
        ValueError: If a group is not there, ``initial`` is damaged or of another model, or there are no clean training
            examples, or the model holds a ``torch.nn.SyncBatchNorm`` and there are several processes.
        TypeError: If ``groups`` is a single string.
        OSError: If the checkpoint cannot be read.
        FloatingPointError: If a loss is not finite.

    Source: Maini et al., "Can Neural Network Memorization Be Localized?", ICML 2023, section on layer retraining.
    """
    model = getattr(model, "_orig_mod", model)
    chosen = chosen_groups("retrain", model, config.retrain_groups or None if groups is None else groups)
    clean = dataset.train.subset(~dataset.train.memorized)
    if len(clean) == 0:
        raise ValueError("retrain: dataset must hold at least one clean training example, got none")
    if world_size() > 1 and any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        raise ValueError(
            "retrain: model must hold no SyncBatchNorm in several processes, each of which trains other groups; "
            "call it in one process"
        )
    state, test = read_state("retrain", initial, model), not masks_test_examples(model)
    settings = config.as_training(seed)

    def evaluated(network: nn.Module) -> Accuracy:
        return accuracy(network, dataset, test=test, batch_size=batch_size)

    def one(group: LayerGroup) -> dict[str, Any]:
        return asdict(_retrain_group(model, state, group, clean, settings, config.patience, evaluated))

    unchanged, training = evaluated(model), [asdict(settings), config.patience, batch_size]
    common = fingerprint(__version__, model.state_dict(), dataset_digest(dataset), training)
    work = {}
    for group in chosen.values():
        initial_values = [state[name] for name in group.names]
        work[f"retrain_{fingerprint(common, group.names, initial_values)}"] = group
    results = spread_parts(one, work, parts, partial(parsed, GroupRetraining))
    return Retraining(unchanged, dict(zip(chosen, results, strict=True)))


def _retrain_group(
    model: nn.Module,
    state: Mapping[str, Tensor],
    group: LayerGroup,
    clean: Split,
    config: TrainConfig,
    patience: int,
    evaluate: Callable[[nn.Module], Accuracy],
) -> GroupRetraining:
    network = copy.deepcopy(model)
    parameters = _isolated(network, state, group)
    modules = list(_modules(network, group))
    optimizer = torch.optim.SGD(
        parameters, config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
    )
    scaler = torch.amp.GradScaler(clean.device.type, enabled=False)
    records, fitted = [RetrainedEpoch(0, None, evaluate(network))], 0
    for epoch in range(1, config.epochs + 1):
        network.eval()
        for module in modules:
            module.training = True
        with uncompiled(), torch.enable_grad(), epoch_rng(config.seed, epoch, clean.device) as generator:
            trained = train_epoch(network, clean, optimizer, scaler, config, epoch, generator, Backward())
        records.append(RetrainedEpoch(epoch, trained["loss"], evaluate(network)))
        fitted = fitted + 1 if records[-1].accuracy.clean == 1 else 0
        if fitted == patience:
            return GroupRetraining(records, FITTED)
    return GroupRetraining(records, ENDED)


def _isolated(network: nn.Module, state: Mapping[str, Tensor], group: LayerGroup) -> list[nn.Parameter]:
    """Put a group back to a state, and return its parameters, which are the only ones that need a gradient then."""
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
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
