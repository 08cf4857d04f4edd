"""Several processes at one job, as torchrun starts them: who does what, and how the results come together.

Every function here that says "all processes" waits for the others: call it in each of them, and in the same order.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")
R = TypeVar("R")
_TIMEOUT = datetime.timedelta(days=1)
"""How long a process waits for the others, whose work may differ; if one dies, torchrun ends all of them at once."""
_alone = ContextVar("_alone", default=False)


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started, with gloo on the CPU and NCCL on GPUs; without torchrun, do nothing.

    An error is passed on at once, after a line that names the process: let it end this process, and torchrun ends the
    others, wherever they wait. This one computes on ``device``, or for ``cuda`` on its `own_device`.

    Raises:
        ValueError: See `own_device`.
        ImportError: If torch was built without gloo, or without NCCL although ``device`` is a GPU.
    """
    if not _torchrun() or distributed.is_initialized():
        yield
        return
    device = own_device(device)
    gpu = device.type == "cuda"
    for name, needed in (("gloo", distributed.is_gloo_available), ("NCCL", distributed.is_nccl_available)):
        if (name == "gloo" or gpu) and not needed():
            raise ImportError(f"torchrun needs a torch that was built with {name} for {device}; start without torchrun")
    # gloo beside NCCL carries what lies in the memory of the host
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    distributed.init_process_group(backend, timeout=_TIMEOUT, device_id=device if gpu else None)
    try:
        yield
    except Exception as error:  # not destroyed: that could wait for those that wait for this process
        who = f"memloc: process {distributed.get_rank()} of {distributed.get_world_size()}"
        print(f"{who}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        raise
    gc.collect()  # wrapped models that are garbage in a cycle hold the group, whose threads must end before the process
    distributed.destroy_process_group()


def own_device(device: torch.device) -> torch.device:
    """Return the GPU of this process if torchrun started it and ``device`` is ``cuda`` without a number; else the same.

    Raises:
        ValueError: If this machine has fewer GPUs than processes, or ``device`` names one GPU for all processes.
    """
    if device.type != "cuda" or not _torchrun():
        return device
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.index is not None and processes > 1:
        raise ValueError(f"device must be cuda without a number under torchrun, whose processes share {device} else")
    if processes > torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"--nproc-per-node must be at most the number of GPUs, {count}, got {processes}")
    return torch.device("cuda", local_rank()) if device.index is None else device


def world_size() -> int:
    """Return the number of processes that work together; 1 without a process group, and inside of `alone`."""
    return 1 if _alone.get() or not distributed.is_initialized() else distributed.get_world_size()


def rank() -> int:
    """Return the number of this process among them, from 0 on."""
    return 0 if world_size() == 1 else distributed.get_rank()


def local_rank() -> int:
    """Return the number of this process on its machine, which is that of its GPU; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0")) if _torchrun() else 0


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Do as if there were no other process inside of the ``with``: nothing in it waits for the others."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def once(function: Callable[[], R]) -> R:
    """Call a function in the first process, `alone`, and return its result in all processes, or raise its exception.

    The result is pickled for the others; a tensor in it should be on the CPU.
    """
    if world_size() == 1:
        return function()
    message: list[Any] = [None, None]
    if rank() == 0:
        try:
            with alone():
                message[0] = function()
        except Exception as error:
            message[1] = error
    distributed.broadcast_object_list(message, src=0)
    result, error = message
    if error is not None:
        raise error
    return result


def spread(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Call a function for each item, every item in one of the processes, and return all results in all processes.

    Args:
        function: Runs `alone`. Its results must not depend on the process, nor on what it was called for before; they
            are pickled for the others, and tensors in them should be on the CPU.
        items: The same in every process.

    Returns:
        A result per item, in the order of the items.
    """
    world = world_size()
    if world == 1:
        return [function(item) for item in items]
    mine = items[rank() :: world]
    with alone():
        own = [function(item) for item in mine]
    every: list[Any] = [None] * world
    distributed.all_gather_object(every, own)
    return [every[i % world][i // world] for i in range(len(items))]


def summed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the sum of each tensor over all processes, the same bits in each; all travel as one message.

    Shapes and dtypes are the same in every process. Without other processes the tensors are the given ones, else new.
    """
    if world_size() == 1 or not tensors:
        return list(tensors)
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    distributed.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace the gradient of each parameter by its sum over all processes.

    A parameter that got none in some processes counts as 0 there; one that got none in any is left without.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if world_size() == 1 or not trained:
        return
    given = torch.tensor([p.grad is not None for p in trained], dtype=torch.float32, device=trained[0].device)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    *sums, counts = summed([*gradients, given])
    for parameter, total, count in zip(trained, sums, counts.tolist(), strict=True):
        parameter.grad = total if count else None


def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Overwrite the tensors of all processes by those of the first, in place and outside of autograd."""
    if world_size() > 1:
        for tensor in tensors:
            value = tensor.detach().contiguous()  # or what is broadcast is not in the order of its elements
            distributed.broadcast(value, src=0)
            tensor.detach().copy_(value)


def _torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ
