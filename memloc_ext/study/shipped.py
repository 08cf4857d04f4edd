"""The model that a study ships: without its memorization channels, exported, with what it costs beside the full one."""

from __future__ import annotations

import copy
import io
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from memloc_ext.batches import Batch, call, with_each_tensor
from memloc_ext.borrowing import evaluating, without_fast_path
from memloc_ext.nn import dropout_mode, without_memorization
from memloc_ext.study.accounting import timed

_MIN_PAIRS, _MAX_PAIRS, _SECONDS = 3, 50, 0.5
"""Least and largest number of timed pairs, and the seconds that they take once there are enough."""


@dataclass(frozen=True)
class Cost:
    """What a model costs: parameters, multiplications with addition per example, seconds of a pass, the median."""

    parameters: int
    multiply_adds: float
    seconds: float


@dataclass(frozen=True)
class Channels:
    """Of a site: its channels, how many were removed, and how many of the others are zero."""

    channels: int
    removed: int
    masked: int


@dataclass(frozen=True)
class Shipped:
    """The model that is shipped beside the one that it was made from.

    Attributes:
        examples: Number of examples in a timed pass.
        full: The model with its memorization channels, off.
        shipped: The model without.
        time_ratio: Median of the ratios of passes to those of the full model beside them.
        sites: Site to what became of its channels.
    """

    examples: int
    full: Cost
    shipped: Cost
    time_ratio: float
    sites: dict[str, Channels]

    def __post_init__(self) -> None:
        amounts = [value for cost in (self.full, self.shipped) for value in (cost.multiply_adds, cost.seconds)]
        if not all(amount > 0 for amount in (self.full.parameters, self.time_ratio, *amounts)):
            raise ValueError("costs must be positive")
        if any(site.removed + site.masked > site.channels for site in self.sites.values()):
            raise ValueError("a site must have the channels that were removed from it or are zero")


def ship(model: nn.Module, batch: Batch) -> tuple[Shipped, bytes]:
    """Return what a model without its memorization channels costs, and its program as ``torch.export`` saves it.

    The program is for the CPU and takes batches of any size, unless the model's code wants this one.

    Args:
        model: With `ExampleTiedDropout`; left as it was.
        batch: Of at least two examples, or the program may take single ones only.
    """
    small = without_memorization(model, batch.x)
    found = {site: Channels(**counts) for site, counts in small.memorization_removed["sites"].items()}  # pyright: ignore
    program = _exported(copy.deepcopy(small).cpu(), with_each_tensor(batch.x, lambda t: t.cpu()))
    with evaluating(model), dropout_mode(model, "drop"), torch.no_grad():
        passes = [partial(call, each, batch.x) for each in (model, small)]
        with without_fast_path():
            counts = [_multiply_adds(work) / len(batch.ids) for work in passes]
        device = batch.ids.device
        pairs, start = [[timed(work, device) for work in passes]], time.perf_counter()  # the first allocates
        while len(pairs) <= _MIN_PAIRS or (len(pairs) <= _MAX_PAIRS and time.perf_counter() - start < _SECONDS):
            pairs.append([timed(work, device) for work in passes])
    medians = [statistics.median(times) for times in zip(*pairs[1:], strict=True)]
    parameters = [sum(p.numel() for p in each.parameters()) for each in (model, small)]
    full, shipped = (Cost(*cost) for cost in zip(parameters, counts, medians, strict=True))
    ratio = statistics.median(second / first for first, second in pairs[1:])
    return Shipped(len(batch.ids), full, shipped, ratio, found), program


def _exported(model: nn.Module, x: Any) -> bytes:
    args, kwargs = ((), dict(x)) if isinstance(x, Mapping) else (x if isinstance(x, tuple) else (x,), {})
    shapes = pytree.tree_map(lambda _: {0: torch.export.Dim.AUTO}, kwargs or args)
    program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def _multiply_adds(work: partial[Any]) -> float:
    counter = FlopCounterMode(display=False)
    with counter:
        work()
    return counter.get_total_flops() / 2
