"""Time alternatives side by side, and say on what machine."""

from __future__ import annotations

import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from bench import slug
from memloc_ext._version import __version__
from memloc_ext.info import build_info

RESULTS = Path(__file__).parent / "results"


def interleaved(
    functions: Mapping[str, Callable[[], object]], rounds: int = 21, before: int = 0
) -> dict[str, list[float]]:
    """Time functions in turn, round after round, so that a slow moment of a shared machine hits all of them.

    Args:
        functions: Name to function; each is called once before the first round.
        rounds: Calls of each that are timed.
        before: Calls of the same function right before each one that is timed, so that it meets the memory that it
            leaves itself, as the steps of a training do, and not that of another.

    Returns:
        Name to its times in seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            for _ in range(before):
                function()
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return times


def ratios(times: Mapping[str, list[float]], ours: str) -> dict[str, dict[str, float]]:
    """Return the time of ``ours`` over that of every other function: the median over rounds, and its quartiles."""
    result = {}
    for name, theirs in times.items():
        if name != ours:
            quotients = [a / b for a, b in zip(times[ours], theirs, strict=True)]
            low, median, high = statistics.quantiles(quotients, n=4)
            result[name] = {"median": round(median, 3), "quartiles": [round(low, 3), round(high, 3)]}
    return result


def cpu_name() -> str:
    """Return the processor's name as the system gives it."""
    try:
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def huge_pages() -> str:
    """Return when the system puts memory on 2 MiB pages: ``always``, ``madvise`` (if a program asks) or ``never``."""
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "unknown"
    match = re.search(r"\[(\w+)\]", text)
    return match[1] if match else "unknown"


def machine() -> dict[str, object]:
    """Return the machine and the versions that a result was measured with."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "instruction_set": build_info().get("cpu_capability", "unknown"),
        "transparent_hugepages": huge_pages(),
        "gpu": gpu,
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "memloc_ext": __version__,
    }


def folder() -> Path:
    """Return the folder for the results of this machine, named after its GPU or its processor."""
    gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if gpu else f"{cpu_name()}-{torch.get_num_threads()}-threads"
    return RESULTS / slug(name)
