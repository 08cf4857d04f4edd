"""Training that keeps an account of its gradients: the backward pass that does it, its tables, and what it costs."""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memloc_ext import distributed
from memloc_ext.accounting import GradientAccountant
from memloc_ext.data import Split
from memloc_ext.files import write_table
from memloc_ext.marks import marked
from memloc_ext.probes import EpochAccount, GradientAccounting
from memloc_ext.study.accounting_files import ACCOUNTS, MODEL, PARAMETERS, account_path, load_account, save_account
from memloc_ext.tasks import task_of
from memloc_ext.training import Backward, TrainConfig
from memloc_ext.training.epoch import batch_sizes, epoch_rng, train_epoch

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

    def __init__(self, model: nn.Module, split: Split, folder: Path) -> None:
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
            kinds = self._accounting.kinds(ids)
        account = self._accountant.backward(loss, group_ids=kinds, num_groups=2, loss_reduction="mean")
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
        save_account(account_path(self._folder, epoch), self.account())


def write_accounting_tables(folder: Path, epochs: int) -> None:
    """Write the tables of all epochs into the folder of a model, from the files in its ``accounting``.

    Raises:
        ValueError: If the file of an epoch is missing, damaged or of another model than the first; names it.
    """
    first = None
    rows: list[dict[str, Any]] = []
    parameters: list[dict[str, Any]] = []
    for epoch in range(1, epochs + 1):
        path = account_path(folder / ACCOUNTS, epoch)
        if not path.is_file():
            raise ValueError(f"{path} is missing; delete the checkpoints from epoch {epoch} on to train it again")
        account = load_account(path)
        groups = {**account.groups, MODEL: account.model}
        names = [*groups, *account.parameters]
        if names != (first := first or names):
            raise ValueError(f"{path}: must be of the layer groups and parameters of epoch 1, got {', '.join(names)}")
        rows += [{"epoch": epoch, "group": group, **asdict(row)} for group, row in groups.items()]
        parameters += [{"epoch": epoch, "parameter": n, **asdict(row)} for n, row in account.parameters.items()]
    write_table(folder, ACCOUNTS, rows)
    write_table(folder, PARAMETERS, parameters)


def accounting_cost(model: nn.Module, split: Split, config: TrainConfig) -> dict[str, float]:
    """Time plain and accounted training of a copy of a model, step about.

    Each step is that of a training: batch, forward, backward, update, right after another of its kind. The end of an
    accounted epoch is timed as well, but for the writing of its file. Of several processes the first measures, and by
    itself, while the others wait for its numbers.

    Args:
        model: Stays as it is.
        split: Its examples; the batches are one of them, drawn at random.
        config: Of the training.

    Returns:
        ``plain_step`` and ``accounted_step``, seconds, medians; ``step_ratio``, the median of the ratios of a step to
        the one beside it; ``epoch_end``, seconds; ``ratio``, of an accounted epoch to a plain one, from these;
        ``pairs``, the number of ratios.
    """
    return distributed.once(lambda: _cost(model, split, config))


def _cost(model: nn.Module, split: Split, config: TrainConfig) -> dict[str, float]:
    model, task = copy.deepcopy(model).train(), task_of("classification")
    with epoch_rng(config.seed, 0, split.device) as generator:
        batch = split.subset(torch.randperm(len(split), generator=generator)[: config.batch_size])
        optimizer = torch.optim.SGD(
            model.parameters(), config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
        )
        scaler = torch.amp.GradScaler(split.device.type, enabled=config.precision == "float16")
        accounted = AccountedBackward(model, split, Path())

        def step(backward: Backward) -> Callable[[], object]:
            return lambda: train_epoch(
                model, batch, optimizer, scaler, config, config.epochs, generator, backward, task
            )

        kinds = step(Backward()), step(accounted)
        for kind in kinds:  # the first steps allocate
            kind()
        pairs, start = [], time.perf_counter()
        while len(pairs) < _MIN_PAIRS or (len(pairs) < _MAX_PAIRS and time.perf_counter() - start < _SECONDS):
            pair = []
            for kind in kinds:
                kind()  # in a training, a step follows one of its kind and meets the memory that it left
                pair.append(_seconds(kind, split.device))
            pairs.append(pair)
        end = _seconds(accounted.account, split.device)
    plain, full = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(second / first for first, second in pairs)
    steps = len(batch_sizes(model, len(split), config.batch_size))
    return {
        "plain_step": plain,
        "accounted_step": full,
        "step_ratio": ratio,
        "epoch_end": end,
        "ratio": ratio + end / (steps * plain),
        "pairs": len(pairs),
    }


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
