"""Build, check and time every CUDA operator, and whole models, on this machine's GPU: ``python bench/gpu.py``.

Times are CUDA events, medians, on inputs larger than the L2 cache, beside those of a peer in the same run: the ceiling,
which for a memory-bound operator is a copy on the device, or what one would run without the operator. The result file
is written after every step, so that a run that is cut short leaves what it had.
"""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402

COPY_SHARE = {"example_tied_dropout": 0.85, "channel_saliency": 0.85}
"""Operators that only move bytes, and the share of a copy's bandwidth that they are meant to reach at least."""


def operators(file: Path) -> Iterable[dict[str, Any]]:
    """Time the cases of one ``bench_*.py`` and yield a record of each."""
    from bench.measure import seconds

    cases = getattr(importlib.import_module(f"bench.{file.stem}"), "gpu_cases", tuple)
    for name, ours, our_bytes, peer, peer_bytes in cases():
        (low, taken, high), (_, peer_taken, _) = seconds(ours, "cuda"), seconds(peer, "cuda")
        bandwidth, peers = our_bytes / taken, peer_bytes / peer_taken
        share = next((share for operator, share in COPY_SHARE.items() if name.startswith(operator)), None)
        goal = {} if share is None else {"at_least": share, "met": bandwidth / peers >= share}
        yield {
            "case": name,
            "time_over_peer": round(taken / peer_taken, 3),
            "microseconds": round(1e6 * taken, 1),
            "quartiles": [round(1e6 * low, 1), round(1e6 * high, 1)],
            "bandwidth_GB_per_s": round(bandwidth / 1e9),
            "peer_GB_per_s": round(peers / 1e9),
            "share_of_peer_bandwidth": round(bandwidth / peers, 3),
            **goal,
        }
        torch.cuda.empty_cache()


def steps() -> dict[str, Callable[[], Iterable[dict[str, Any]]]]:
    """Return what is measured, by name: each yields records."""
    from bench import gpu_goals

    def goal(one: Callable[[], gpu_goals.Goal]) -> Iterable[dict[str, Any]]:
        yield one().record()

    def goals(name: str, precision: str) -> Iterable[dict[str, Any]]:
        yield from (goal.record() for goal in gpu_goals.accounting("cuda", name, precision))

    found: dict[str, Callable[[], Iterable[dict[str, Any]]]] = {}
    for name in gpu_goals.MODELS:
        for precision in gpu_goals.PRECISIONS:
            found[f"accounting of {name}, {precision}"] = functools.partial(goals, name, precision)
    found["scan"] = functools.partial(goal, lambda: gpu_goals.scan("cuda"))
    found["search"] = functools.partial(goal, lambda: gpu_goals.search("cuda"))
    for file in sorted(HERE.glob("bench_*.py")):
        found[file.stem] = functools.partial(operators, file)
    return found


def build() -> None:
    """Build the extension for this GPU alone, which takes a part of the time."""
    major, minor = torch.cuda.get_device_capability()
    archs = {"MEMLOC_CUDA": "1", "MEMLOC_CUDA_ARCHS": f"{major}.{minor}{'a' if major >= 9 else ''}"}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=HERE.parent, env={**archs, **os.environ}, check=True)


def main() -> None:
    """Print a line per measurement and write ``results/<gpu>/gpu.json``; exit with 1 if a test or a step fails."""
    if not torch.cuda.is_available():
        sys.exit("bench.gpu: torch sees no CUDA device")
    begin = time.perf_counter()
    build()
    from bench.measure import folder, machine
    from memloc_ext.files import write_json

    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "cuda"],
        cwd=HERE.parent,
        env={**os.environ, "MEMLOC_REQUIRE_CUDA": "1"},
        check=False,
    )
    passed = tests.returncode == 0
    result: dict[str, Any] = {"command": "python bench/gpu.py", "machine": machine(), "tests_passed": passed}
    result |= {"goals": [], "cases": [], "failures": {}, "seconds": {}}
    result["seconds"]["build and tests"] = round(time.perf_counter() - begin, 1)
    path = folder() / "gpu.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, measure in steps().items():
        start = time.perf_counter()
        try:
            for record in measure():
                print(record, flush=True)
                result["goals" if "bound" in record else "cases"].append(record)
        except Exception:  # one that fails leaves the others their time
            result["failures"][name] = traceback.format_exc(limit=-1)
            print(f"FAILED {name}: {traceback.format_exc()}", flush=True)
        result["seconds"][name] = round(time.perf_counter() - start, 1)
        write_json(path, result)
        torch.cuda.empty_cache()
    print(f"written: {path.relative_to(HERE.parent)}, {time.perf_counter() - begin:.0f} s")
    sys.exit(0 if passed and not result["failures"] else 1)


if __name__ == "__main__":
    main()
