"""Several processes at one job, as torchrun starts them: who does what, and how the results come together."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import distributed

T = TypeVar("T")
R = TypeVar("R")
_TIMEOUT = datetime.timedelta(days=1)
"""How long a process waits for the others, whose work may differ; if one dies, torchrun ends all of them at once."""


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started, with gloo on the CPU and NCCL on GPUs; without torchrun, do nothing.

    Args:
        device: Where this process computes.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or distributed.is_initialized():
        yield
        return
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def world_size() -> int:
    """Return the number of processes; 1 without a process group."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0 on."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def local_rank() -> int:
    """Return the number of this process on its machine, which is that of its GPU; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0")) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def spread(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Call a function for each item, every item in one of the processes, and return all results in all of them.

    Args:
        function: Its results must not depend on the process, nor on what it was called for before.
        items: The same in every process.

    Returns:
        A result per item, in the order of the items.
    """
    world = world_size()
    own = [function(item) for item in items[rank() :: world]]
    if world == 1:
        return own
    every: list[Any] = [None] * world
    distributed.all_gather_object(every, own)
    return [every[i % world][i // world] for i in range(len(items))]


def barrier() -> None:
    """Wait until all processes are here."""
    if world_size() > 1:
        distributed.barrier()


def on_first(function: Callable[[], R]) -> R:
    """Call a function in the first process only, and return its result in all of them."""
    if world_size() == 1:
        return function()
    result: list[Any] = [function() if rank() == 0 else None]
    distributed.broadcast_object_list(result)
    return result[0]
