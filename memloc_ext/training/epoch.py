"""One epoch of SGD, whose draws depend on the seed and the epoch alone."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from memloc_ext import distributed
from memloc_ext.batches import call
from memloc_ext.examples import Examples
from memloc_ext.nn.example_ids import example_ids
from memloc_ext.tasks import Task, mean_loss
from memloc_ext.training.config import SCHEDULES, TrainConfig


class Backward:
    """The plain backward pass; a subclass can keep an account of the gradients of a training.

    `memloc_ext.training.train` calls ``start`` before an epoch. For each batch it enters ``batch``, in which it runs
    the forward pass and calls ``run``. It calls ``finish`` before it saves the epoch's checkpoint; a training that is
    killed in between runs that epoch again, and calls them again, once it is continued.

    Under torchrun all of it is called in every process, for its slice of each batch; ``train`` adds the gradients up.
    """

    def start(self, epoch: int) -> None:
        """Begin an epoch; the first has number 1."""

    def batch(self) -> contextlib.AbstractContextManager[object]:
        """Return what to enter around the forward and the backward pass of a batch."""
        return contextlib.nullcontext()

    def run(self, loss: Tensor, ids: Tensor, scale: Tensor | None, share: float) -> None:
        """Give the parameters their gradients, as ``loss.backward()`` does.

        Args:
            loss: Of the slice, mean over its B examples, multiplied by ``share`` and by ``scale``; 0-d.
                Over the processes it adds up to the batch's, mean over its examples.
            ids: Numbers of its examples in the data set, ``[B]``, int64.
            scale: What the loss is multiplied by for float16, 0-d, on the device of ``loss``; None for 1.
            share: B over the number of examples in the batch, in ``(0, 1]``; 1 in a single process.
        """
        loss.backward()

    def finish(self, epoch: int) -> None:
        """End an epoch, after its last batch."""


@contextlib.contextmanager
def epoch_rng(seed: int, epoch: int, device: torch.device) -> Iterator[torch.Generator]:
    """Seed PyTorch's generators inside the ``with``, and give them their states back after it.

    What is drawn inside depends on ``seed`` and ``epoch`` alone, so that a training can continue after any epoch. Of
    several processes each draws its own, but for the order of the examples; the first as if it were the only one.
    Besides the CPU's generator that of a CUDA device is seeded. Yields another one for the order of the examples.
    """
    order, draws = (int(word) for word in np.random.SeedSequence((seed, epoch)).generate_state(2, np.uint64))
    if distributed.rank() > 0:
        own = np.random.SeedSequence((seed, epoch), spawn_key=(distributed.rank(),))
        draws = int(own.generate_state(1, np.uint64)[0])
    devices = [device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(devices, device_type="cuda"):
        # not torch.manual_seed, which also seeds the devices that are not given back
        torch.default_generator.manual_seed(draws)
        for index in devices:
            torch.cuda.default_generators[index].manual_seed(draws)
        yield torch.Generator().manual_seed(order)


def batch_sizes(model: object, examples: int, batch_size: int) -> list[int]:
    """Return how many examples each batch of an epoch has.

    The last batch may be smaller. A last batch of a single example, which batch norm cannot normalise in training mode,
    is merged into the one before it if the model holds batch norm.
    """
    sizes, rest = [batch_size] * (examples // batch_size), examples % batch_size
    modules = model.modules() if isinstance(model, nn.Module) else ()
    if rest == 1 and sizes and any(isinstance(module, _BatchNorm) for module in modules):
        sizes[-1] += 1
    elif rest:
        sizes.append(rest)
    return sizes


def train_epoch(
    forward: Callable[..., Any],
    data: Examples,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    config: TrainConfig,
    epoch: int,
    generator: torch.Generator,
    backward: Backward,
    task: Task,
) -> dict[str, float]:
    """Run one step of the optimizer for each batch of the examples, inside ``memloc_ext.example_ids``.

    Of several processes each takes its slice of every batch; the gradients are those of the batch's mean loss in all.

    Args:
        forward: The model. If it is a ``DistributedDataParallel``, it adds up the gradients of the processes, else they
            are added up here.
        data: The training examples, at least one.
        optimizer: Of the model's parameters; the learning rate of its groups is set for each step.
        scaler: Of the gradients; not enabled unless the precision is float16.
        config: Its schedule is spread over ``epochs``.
        epoch: From 1 to ``config.epochs``.
        generator: Shuffles the examples.
        backward: Its ``start`` and ``finish`` are not called here.
        task: Tells the loss.

    Returns:
        ``loss``: mean over the examples of the epoch, each before the step of its batch;
        ``learning_rate``: that of the last step.

    Raises:
        FloatingPointError: If the loss of a batch is not finite, in all processes; the parameters are as before that
            batch.
    """
    device, world = data.device, distributed.world_size()
    is_parallel = isinstance(forward, DistributedDataParallel)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    sizes = batch_sizes(forward, len(data), config.batch_size)
    if sizes[-1] > config.batch_size and epoch == 1 and distributed.rank() == 0:
        warnings.warn(
            f"train: batch_size {config.batch_size} leaves a single one of {len(data)} examples for the last batch, "
            f"which batch norm cannot normalise; it joins the batch before, which has {sizes[-1]} examples",
            stacklevel=2,
        )
    mixed = config.precision != "float32"
    autocast = torch.autocast(device.type, getattr(torch, config.precision), enabled=mixed)
    total, rate = 0.0, 0.0
    slices = data.batches(sizes, generator, shard=(distributed.rank(), world))
    for batch, (examples, (x, y, ids)) in enumerate(zip(sizes, slices, strict=True)):
        # the middle of the step, since at either end of the schedule the rate is 0 and a step would be wasted
        middle = (epoch - 1) * len(sizes) + batch + 0.5
        rate = config.learning_rate * SCHEDULES[config.schedule](middle, config.epochs * len(sizes))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        with example_ids(ids), backward.batch():
            with autocast:
                loss = mean_loss(task, call(forward, x), y, len(ids))
            # the scale as a tensor, since get_scale waits for the device
            scale = scaler.scale(loss.new_ones(())) if scaler.is_enabled() else None
            share = len(ids) / examples
            if world > 1:
                loss = loss * share
            # DistributedDataParallel takes the mean over the processes, not the sum
            backward.run(scaler.scale(loss * world if is_parallel else loss), ids, scale, share)
        if not is_parallel:
            distributed.sum_gradients(parameters)
        # after backward is launched, so that the device does not idle; the same in all processes, to go on or to raise
        value = distributed.summed([loss])[0].item()
        if not math.isfinite(value):
            raise FloatingPointError(f"train: loss must be finite, got {value} in epoch {epoch}, batch {batch}")
        scaler.step(optimizer)
        scaler.update()
        total += value * examples
    return {"loss": total / len(data), "learning_rate": rate}
