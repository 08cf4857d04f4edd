"""Time calls on a GPU: in a stream of calls, on the host alone, and the kernels alone."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

MOST_SETS = 64
QUEUED_SECONDS = 4e-3
"""Host time of the calls that are queued at a time: about the 1,000 launches that a stream takes before it blocks."""
SLEEP_CYCLES = 2.2e9
"""Cycles of `torch.cuda._sleep` per second that the queue has to be held up, at the highest clock of any card."""


@dataclass(frozen=True)
class Times:
    """Seconds of a call, medians.

    Attributes:
        wall: In a stream of calls, none of which is waited for: the larger of the other two, about.
        host: Until the call returns.
        device: Of its kernels, when they are queued already: what a graph would take.
    """

    wall: float
    host: float
    device: float

    def over(self, other: Times) -> dict[str, float]:
        """Return the quotients with another's."""
        return {name: round(value / getattr(other, name), 3) for name, value in vars(self).items()}

    def microseconds(self) -> dict[str, float]:
        """Return them for a result file."""
        return {f"{name}_us": round(1e6 * value, 1) for name, value in vars(self).items()}


def synchronize(device: str) -> None:
    """Wait for a device, and raise what its kernels ran into."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def times(calls: Sequence[Callable[[], object]], device: str, budget: float = 0.3) -> Times:
    """Time the same call on several buffers, which are taken in turn.

    Args:
        calls: What is timed; together their buffers are larger than the L2 cache.
        device: On another than a GPU one call is timed, and all three times are its.
        budget: Seconds that it may take, about; a few calls are timed in any case.
    """
    on_gpu, turn = torch.device(device).type == "cuda", itertools.cycle(calls)
    for _ in range(3 if on_gpu else 1):  # loads kernels, and what a library sets up
        next(turn)()
    synchronize(device)
    start = time.perf_counter()
    next(turn)()
    host = time.perf_counter() - start
    synchronize(device)
    wall = time.perf_counter() - start
    if not on_gpu:
        return Times(wall, wall, wall)

    def run(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            next(turn)()
        return (time.perf_counter() - start) / count

    def events(count: int, hold: float) -> tuple[float, float]:
        """Return the seconds of a call on the device and on the host, behind a kernel that sleeps for ``hold``."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        if hold:
            torch.cuda._sleep(int(SLEEP_CYCLES * hold))
        begin.record()
        taken = run(count)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000 / count, taken

    rounds = 5
    many = max(2, min(256, int(budget / 2 / rounds / wall)))
    streamed = statistics.median(events(many, 0.0)[0] for _ in range(rounds))
    few = max(1, min(many, int(QUEUED_SECONDS / host)))
    queued = [events(few, 1.5 * host * few + 1e-3) for _ in range(rounds)]
    device_time, host_time = (statistics.median(pair[i] for pair in queued) for i in (0, 1))
    return Times(streamed, host_time, device_time)


@dataclass(frozen=True)
class GpuCase:
    """An operator on inputs of one kind, beside what it is compared with.

    Attributes:
        name: Begins with that of the operator.
        inputs: Draws a set of inputs, on the device that it is given.
        check: Fails on inputs for which the operator is wrong.
        ours: What is timed, called with the inputs.
        peer: What it is compared with, called with the inputs.
        traffic: Bytes of device memory that ours and the peer move at least, for some inputs.
        operations: Floating-point operations of ours, for some inputs; 0 where traffic is the bound.
        at_least: The share of the peer's bandwidth that is the goal; None without one.
    """

    name: str
    inputs: Callable[[str], tuple[Any, ...]]
    check: Callable[..., object]
    ours: Callable[..., object]
    peer: Callable[..., object]
    traffic: Callable[..., tuple[float, float]]
    operations: Callable[..., float] = lambda *_: 0.0
    at_least: float | None = None

    def records(self, device: str) -> Iterator[dict[str, Any]]:
        """Check it, then time it, on as many sets of inputs as do not fit into the L2 cache together.

        Wrong results raise last: the time of a kernel that is off by a little more than it may be is told all the same.
        """
        first, wrong = self.inputs(device), None
        try:
            self.check(*first)
        except AssertionError as error:
            wrong = error
        with torch.no_grad():
            ours, peer = (self._times(function, first, device) for function in (self.ours, self.peer))
        moved, peer_moved = self.traffic(*first)
        bandwidth, peers = moved / ours.device, peer_moved / peer.device
        record = {
            "case": self.name,
            "time_over_peer": round(ours.device / peer.device, 3),
            **ours.microseconds(),
            "peer_us": round(1e6 * peer.device, 1),
            "GB_per_s": round(bandwidth / 1e9, 1),
            "share_of_peer_bandwidth": round(bandwidth / peers, 3),
        }
        if operations := self.operations(*first):
            record["TFLOP_per_s"] = round(operations / ours.device / 1e12, 2)
        if self.at_least is not None:
            record |= {"at_least": self.at_least, "met": bandwidth / peers >= self.at_least}
        yield record
        if wrong is not None:
            raise wrong

    def _times(self, function: Callable[..., object], first: tuple[Any, ...], device: str) -> Times:
        held = sum(value.nbytes for value in first if isinstance(value, torch.Tensor))
        sets = [first]
        while len(sets) < MOST_SETS and len(sets) * held < 3 * cache_bytes(device):
            sets.append(self.inputs(device))
        return times([lambda given=given: function(*given) for given in sets], device)


def cache_bytes(device: str) -> int:
    """Return the size of a GPU's L2 cache, 0 for another device."""
    return torch.cuda.get_device_properties(device).L2_cache_size if torch.device(device).type == "cuda" else 0


def ceilings(device: str, tiny: bool) -> dict[str, Callable[[], Iterator[dict[str, Any]]]]:
    """Return what measures the bounds of a card, by name: a copy, products of matrices, and an empty call.

    Args:
        device: For example ``"cuda"``.
        tiny: Whether to take little of everything.
    """
    count, side = (1 << 12, 64) if tiny else (1 << 28, 8192)  # 1 GiB of float32

    def copy() -> Iterator[dict[str, Any]]:
        x, y = torch.randn(count, device=device), torch.empty(count, device=device)
        taken = times([lambda: y.copy_(x)], device).device
        yield {"ceiling": "copy", "GB_per_s": round(2 * x.nbytes / taken / 1e9, 1)}

    def product(name: str, dtype: torch.dtype, precision: str) -> Iterator[dict[str, Any]]:
        usual = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
            taken = times([lambda: a @ b], device).device
        finally:
            torch.set_float32_matmul_precision(usual)
        yield {"ceiling": f"{name} product", "TFLOP_per_s": round(2 * math.prod((side, side, side)) / taken / 1e12, 2)}

    def launch() -> Iterator[dict[str, Any]]:
        x = torch.zeros(1, device=device)
        yield {"ceiling": "one-element x.add_(1)", **times([lambda: x.add_(1)], device).microseconds()}

    return {
        "ceiling: copy": copy,
        "ceiling: bfloat16": lambda: product("bfloat16", torch.bfloat16, "highest"),
        "ceiling: TF32": lambda: product("TF32", torch.float32, "high"),
        "ceiling: float32": lambda: product("float32", torch.float32, "highest"),
        "ceiling: launch": launch,
    }
