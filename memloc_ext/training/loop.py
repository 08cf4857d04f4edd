"""Train a model with a checkpoint after every epoch, such that a run that was killed can be continued."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from memloc_ext import distributed
from memloc_ext.batches import device_of
from memloc_ext.borrowing import kept_training_flags
from memloc_ext.examples import Data, digest, examples
from memloc_ext.progress import progress as progress_bar
from memloc_ext.tasks import Task, TaskName, task_of
from memloc_ext.training.checkpoint import Checkpoint, restore, save_checkpoint
from memloc_ext.training.compiled import check_gradients
from memloc_ext.training.config import TrainConfig
from memloc_ext.training.epoch import Backward, batch_sizes, epoch_rng, train_epoch

Evaluate = Callable[[nn.Module], Mapping[str, float]]
_OWN = ("epoch", "loss", "learning_rate")


def train(
    model: nn.Module,
    data: Data,
    config: TrainConfig,
    *,
    checkpoints: str | Path,
    task: TaskName | Task = "classification",
    evaluate: Evaluate | None = None,
    backward: Backward | None = None,
    progress: bool = True,
    tensorboard: str | Path | None = None,
    num_workers: int = 0,
) -> list[dict[str, float]]:
    """Train by SGD on the mean loss of a batch's examples; save the initial model and the one after each epoch.

    If ``checkpoints`` already holds some, the training continues after the newest, whose state replaces the model's; a
    finished one is just loaded. Killed at any moment and continued, a training ends like an unbroken one: on the CPU
    bit for bit, with the same number of threads.

    Called by every process of a `memloc_ext.distributed.process_group`, it takes the same batches in the same order,
    each cut into a slice per process, and follows the gradient of the batch's mean loss: to rounding, the result is
    that of one process, and any number of processes can continue it. Only the first process reads and writes files,
    and its initial weights are everybody's. Without ``backward``, every parameter that requires a gradient must get one
    in each batch, as DistributedDataParallel asks. Two things differ from one process. Standard dropout draws anew in
    each; what is tied to an example does not. And batch norm normalises each slice by itself, unless the model was
    converted to ``torch.nn.SyncBatchNorm``; its running statistics are those of the first process.

    The model is trained in place, all of its modules in training mode. In the end they get their ``training`` flags
    back, the parameters are left without gradients, and the global generators are as they were.

    Args:
        model: Any model, initialised; compiled or not.
        data: The training examples, at least one; see `memloc_ext.examples`. They are shuffled by the seed, whatever
            the order of a ``DataLoader``.
        config: How to train.
        checkpoints: Folder of the ``epoch_<number>.safetensors``; created if missing.
        task: ``classification``, ``tokens``, or an object with ``loss`` and ``right``; see `memloc_ext.tasks`.
        evaluate: Called with ``model`` in evaluation mode at the start and after each epoch; returns numbers by name.
            Called in all processes.
        backward: Takes the place of the plain backward pass, to look at the gradients.
        progress: Show a bar of the epochs if the standard error output is a terminal.
        tensorboard: Folder to log every record to.
        num_workers: Processes that read a data set; a ``DataLoader`` has its own.

    Returns:
        A record per epoch, the initial model's first: ``epoch``, the numbers of ``evaluate``, and from epoch 1 on
        ``loss`` and ``learning_rate`` (see `train_epoch`).

    Raises:
        ValueError: If the model is on several devices, or compiled although ``backward`` is given, there is no example,
            a batch has fewer examples than there are processes, ``evaluate`` uses one of those names, the model has
            wrong gradients once it is compiled, or the newest checkpoint is damaged or comes from another config, model
            or data; no file changes then.
        FloatingPointError: If the loss or a weight is no longer finite; the checkpoints before stay.
        ImportError: If ``progress`` or ``tensorboard`` needs a package that is not installed.
    """
    original = getattr(model, "_orig_mod", model)  # of a compiled model, whose own state dict has other names
    task = task_of(task)
    _check_place(original)
    source = examples("train", data, device_of(original), num_workers=num_workers)
    if len(source) == 0:
        raise ValueError("train: data must hold at least one example, got none")
    _check_slices(min(batch_sizes(original, len(source), config.batch_size)), len(source), config.batch_size)
    if backward is not None and (config.compile or model is not original):
        raise ValueError("train: model must not be compiled if backward is given, which needs the calls of its modules")
    checkpoints, device, seen = Path(checkpoints), source.device, digest(source)
    forward = torch.compile(original) if config.compile else model
    optimizer = torch.optim.SGD(
        original.parameters(), config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
    )
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
    with contextlib.ExitStack() as stack:
        stack.enter_context(kept_training_flags(original))
        stack.callback(original.zero_grad)
        history = restore(checkpoints, original, optimizer, scaler, config, seen)
        distributed.copy_from_first([*original.parameters(), *original.buffers()])
        if forward is not original and len(history) <= config.epochs:
            check_gradients(original, forward, source, config, task)
        if backward is None and distributed.world_size() > 1 and len(history) <= config.epochs:
            forward = DistributedDataParallel(forward)
        backward = backward or Backward()
        reports, is_first = [], distributed.rank() == 0
        if progress and is_first:
            show = stack.enter_context(progress_bar(config.epochs, max(len(history) - 1, 0), "epoch"))
            reports.append(lambda record: show(int(record["epoch"]), {k: v for k, v in record.items() if k != "epoch"}))
        if tensorboard is not None and is_first:
            reports.append(stack.enter_context(_tensorboard(Path(tensorboard), len(history))))
        distributed.once(lambda: checkpoints.mkdir(parents=True, exist_ok=True))
        for epoch in range(len(history), config.epochs + 1):
            record: dict[str, float] = {"epoch": epoch}
            with epoch_rng(config.seed, epoch, device) as generator:
                if epoch > 0:
                    original.train()
                    backward.start(epoch)
                    record |= train_epoch(forward, source, optimizer, scaler, config, epoch, generator, backward, task)
                    distributed.copy_from_first(original.buffers())
                    _check_finite(original, epoch)
                    backward.finish(epoch)
                if evaluate is not None:
                    original.eval()
                    record |= _numbers(evaluate(model))
            history.append(record)
            for report in reports:
                report(record)
            state = (original.state_dict(), optimizer.state_dict(), scaler.state_dict())
            checkpoint = Checkpoint(epoch, *state, history, asdict(config), seen)
            distributed.once(partial(save_checkpoint, checkpoints, checkpoint))
    return history


@contextlib.contextmanager
def _tensorboard(folder: Path, first: int) -> Iterator[Callable[[dict[str, float]], None]]:
    """Write every number of a record as a scalar for TensorBoard, with the epoch as its step.

    What an earlier run logged from the first epoch on is discarded. ImportError if tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("tensorboard is not installed; run: pip install 'memloc_ext[tensorboard]'") from error
    with SummaryWriter(str(folder), purge_step=first) as writer:

        def report(record: dict[str, float]) -> None:
            for name, value in record.items():
                if name != "epoch":
                    writer.add_scalar(name, value, int(record["epoch"]))
            writer.flush()

        yield report


def _check_place(model: nn.Module) -> None:
    device = device_of(model)
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.device != device or value.is_meta:
            rule = "have values" if value.is_meta else f"be on one device, {device} like its first parameter"
            raise ValueError(f"train: model must {rule}, got {name} on {value.device}")


def _check_slices(smallest: int, examples: int, batch_size: int) -> None:
    processes = distributed.world_size()
    if smallest < processes:
        raise ValueError(
            f"train: batch_size must leave an example of every batch to each of {processes} processes, got "
            f"{batch_size}, which leaves {smallest} of {examples} examples for the last batch"
        )


def _check_finite(model: nn.Module, epoch: int) -> None:
    for name, value in model.named_parameters():  # a buffer may be infinite, as attention masks are
        if not value.isfinite().all():  # the loss does not tell after the last step
            raise FloatingPointError(f"train: {name} must be finite, got NaN or an infinity in epoch {epoch}")


def _numbers(evaluated: Mapping[str, float]) -> dict[str, float]:
    for name in _OWN:
        if name in evaluated:
            raise ValueError(f"train: evaluate must not name a number {', '.join(_OWN)}, got {name}")
    return {name: float(value) for name, value in evaluated.items()}  # also of a tensor or numpy scalar
