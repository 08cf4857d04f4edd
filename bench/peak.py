"""Peak memory of a training step, in a process of its own: ``python -m bench.peak WORKLOAD [KIND]`` prints MiB."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

# large blocks go back to the system at once, so that what is resident is what is in use
PLAIN_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def peak(workload: str, kind: str = "plain") -> float | None:
    """Return how far a step's memory rises above what the model and its data take, in MiB; None where none can tell.

    Args:
        workload: A name of `bench.workloads.workloads`.
        kind: ``plain``, or a kind of accounting in `bench.workloads.KINDS`.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, "-m", "bench.peak", workload, kind]
    done = subprocess.run(command, env=os.environ | PLAIN_MALLOC, capture_output=True, text=True, check=True)
    return float(done.stdout)


def _resident(field: str) -> float:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) / 1024


def main() -> None:
    """Measure the third step; the ones before it set up what is kept."""
    import torch

    from bench.workloads import KINDS, accounted, workloads

    name, kind = sys.argv[1:]
    torch.manual_seed(0)
    workload = workloads()[name]()
    step = accounted(workload, **KINDS[kind]) if kind in KINDS else lambda: workload.loss().backward()
    for _ in range(2):
        step()
    workload.model.zero_grad()
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    result = step()
    print(_resident("VmHWM") - before)
    del result


if __name__ == "__main__":
    main()
