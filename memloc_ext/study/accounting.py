"""Training that keeps an account of its gradients: the backward pass that does it, its files, and what it costs."""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memloc_ext import distributed
from memloc_ext.accounting import GradientAccountant
from memloc_ext.examples import Examples
from memloc_ext.marks import marked
from memloc_ext.probes import EpochAccount, GradientAccounting, GroupAccount, ParameterAccount
from memloc_ext.probes.account_epoch import COSINES_EVERY
from memloc_ext.tasks import Task, TaskName, task_of
from memloc_ext.tensor_files import load_tensors, save_tensors
from memloc_ext.training import Backward, TrainConfig
from memloc_ext.training.epoch import batch_sizes, epoch_rng, train_epoch

ACCOUNTS = "accounting"
"""Folder of the epochs' files, in that of a training."""
_TENSORS = ("example_norms", "example_cosines", "memorized", "indices")
_MAX_PAIRS, _MIN_PAIRS = 20, 3
_SECONDS = 10
"""Limit on the time that `accounting_cost` takes, once it has its least number of pairs."""


class AccountedBackward(Backward):
    """Keep the account of every epoch of a training, and write it before the epoch's checkpoint.

    The model is accounted in training mode, dropout draws and all; what counts as one example's gradient where batch
    norm mixes the examples of a batch, says `memloc_ext.GradientAccountant`. Of several processes each accounts its
    slices of the batches; the first writes the account of all of them.

    Args:
        model: The model that is trained, not compiled.
        split: The examples that it is trained on.
        folder: Of the epochs' files; created if missing.
    """

    def __init__(self, model: nn.Module, split: Examples, folder: Path) -> None:
        self._model, self._split, self._folder = model, split, folder
        self._accountant = GradientAccountant(model)
        self._accounting = GradientAccounting(model, marked("train", None, split))

    def start(self, epoch: int) -> None:
        """Begin an account with nothing in it."""
        self._accounting = GradientAccounting(self._model, marked("train", None, self._split))

    def batch(self) -> contextlib.AbstractContextManager[object]:
        """Return the accountant, which watches the modules of the model."""
        return self._accountant

    def run(self, loss: Tensor, ids: Tensor, scale: Tensor | None, share: float) -> None:
        """Give the parameters their gradients and add them to the account."""
        with torch._C.DisableTorchFunction():  # nothing of this is for the accountant to follow
            queries = self._accounting.queries(ids)
        account = self._accountant.backward(loss, loss_reduction="mean", **queries)
        with torch._C.DisableTorchFunction():
            self._accounting.add(account, ids, scale, share)

    def finish(self, epoch: int) -> None:
        """Write the account of the epoch."""
        self._accounting.gather()
        distributed.once(lambda: self._write(epoch))

    def account(self) -> EpochAccount:
        """Return the account of the batches since ``start``."""
        return self._accounting.result()

    def _write(self, epoch: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        save_account(account_path(self._folder, epoch), epoch, self.account())


@dataclass(frozen=True)
class AccountedEpoch:
    """The account of an epoch, from 1 on, without its single examples; see `EpochAccount`."""

    epoch: int
    model: GroupAccount
    groups: dict[str, GroupAccount]
    parameters: dict[str, ParameterAccount]


@dataclass(frozen=True)
class Accounting:
    """The gradient accounting of a finished training: its epochs, whose files are in a folder, and what it cost."""

    folder: Path
    table: list[AccountedEpoch]
    cost: dict[str, float]

    @property
    def groups(self) -> list[str]:
        """The layer groups, from input to output."""
        return list(self.table[0].groups)

    @property
    def epochs(self) -> list[int]:
        """The epochs, from 1."""
        return [row.epoch for row in self.table]

    def column(self, name: str, group: str | None = None) -> list[Any]:
        """Return a number of a layer group, or of the whole model, one value per epoch."""
        return [getattr(row.model if group is None else row.groups[group], name) for row in self.table]

    def epoch(self, epoch: int) -> EpochAccount:
        """Read the whole account of an epoch, single examples included, see `load_account`."""
        return load_account(account_path(self.folder, epoch))


def account_path(folder: Path, epoch: int) -> Path:
    """Return the path of the account of an epoch."""
    return folder / f"epoch_{epoch:03d}.safetensors"


def save_account(path: Path, epoch: int, account: EpochAccount) -> None:
    """Write the tensors of an account, and as its header the `AccountedEpoch`; equal accounts give equal bytes."""
    row = AccountedEpoch(epoch, account.model, account.groups, account.parameters)
    save_tensors(path, {name: getattr(account, name) for name in _TENSORS}, row)


def load_account(path: Path) -> EpochAccount:
    """Read what `save_account` wrote.

    Raises:
        ValueError: If the file is damaged or something else; names it.
        OSError: If it cannot be read, such as FileNotFoundError.
    """
    return _load(path)[0]


def _load(path: Path) -> tuple[EpochAccount, AccountedEpoch]:
    tensors, row = load_tensors(path, AccountedEpoch)
    examples = len(tensors["indices"]) if "indices" in tensors else 0
    # older files have no cosines
    tensors = {"example_cosines": torch.full((examples, len(row.groups) + 1), torch.nan), **tensors}
    expected = {
        "example_norms": (torch.float32, (examples, len(row.groups))),
        "example_cosines": (torch.float32, (examples, len(row.groups) + 1)),
        "memorized": (torch.bool, (examples,)),
        "indices": (torch.int64, (examples,)),
    }
    if {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()} != expected:
        raise ValueError(f"{path}: is no account of an epoch: it must hold {', '.join(_TENSORS)} of its examples")
    return EpochAccount(row.model, row.groups, row.parameters, **tensors), row


def accounted_epochs(folder: Path, epochs: int) -> list[AccountedEpoch]:
    """Read the accounts of all epochs of a training; ValueError names one missing, damaged or of another model."""
    table: list[AccountedEpoch] = []
    for epoch in range(1, epochs + 1):
        path = account_path(folder, epoch)
        if not path.is_file():
            raise ValueError(f"{path} is missing; delete {folder.parent} to train again")
        row = _load(path)[1]
        table.append(row)
        names = [[*found.groups, "", *found.parameters] for found in (row, table[0])]
        if row.epoch != epoch or names[0] != names[1]:
            raise ValueError(f"{path}: must be of epoch {epoch}, and of the groups and parameters of epoch 1")
    return table


def accounting_cost(
    model: nn.Module, split: Examples, config: TrainConfig, task: TaskName = "classification"
) -> dict[str, float]:
    """Time plain and accounted training of a copy of a model, a few steps about, on batches drawn at random.

    Each step is that of a training: batch, forward, backward, update. As many are timed together as take turns in what
    is asked of them, the first batches of an epoch. The end of an accounted epoch is timed as well, but for the writing
    of its file. Of several processes the first measures, and by itself, while the others wait for its numbers.

    Returns:
        ``plain_step`` and ``accounted_step``, seconds, medians; ``step_ratio``, the median of the ratios of steps to
        those beside them; ``epoch_end``, seconds; ``ratio``, of an accounted epoch to a plain one, from these;
        ``pairs``, the number of ratios.
    """
    return distributed.once(lambda: _cost(copy.deepcopy(model).train(), split, config, task_of(task)))


def _cost(model: nn.Module, split: Examples, config: TrainConfig, task: Task) -> dict[str, float]:
    with epoch_rng(config.seed, 0, split.device) as generator:
        few = split.subset(torch.randperm(len(split), generator=generator)[: COSINES_EVERY * config.batch_size])
        optimizer = torch.optim.SGD(
            model.parameters(), config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
        )
        scaler = torch.amp.GradScaler(split.device.type, enabled=config.precision == "float16")
        accounted = AccountedBackward(model, split, Path())

        given = (model, few, optimizer, scaler, config, config.epochs, generator)

        def run(backward: Backward) -> None:
            backward.start(1)
            train_epoch(*given, backward, task)

        kinds = [partial(run, backward) for backward in (Backward(), accounted)]
        for kind in kinds:  # the first steps allocate
            kind()
        pairs, start = [], time.perf_counter()
        while len(pairs) < _MIN_PAIRS or (len(pairs) < _MAX_PAIRS and time.perf_counter() - start < _SECONDS):
            pairs.append([timed(kind, split.device) for kind in kinds])
        end = timed(accounted.account, split.device)
    count = len(batch_sizes(model, len(few), config.batch_size))
    plain, full = (statistics.median(times) / count for times in zip(*pairs, strict=True))
    ratio = statistics.median(second / first for first, second in pairs)
    steps = len(batch_sizes(model, len(split), config.batch_size))
    times = {"plain_step": plain, "accounted_step": full, "step_ratio": ratio, "epoch_end": end}
    return {**times, "ratio": ratio + end / (steps * plain), "pairs": len(pairs)}


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that work takes on a device."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start
