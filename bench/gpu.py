"""Build, check and time every CUDA operator on this machine's GPU: ``python bench/gpu.py``.

Times are CUDA events, medians, on inputs larger than the L2 cache, beside those of a peer in the same run: the ceiling,
which for a memory-bound operator is a copy on the device, or what one would run without the operator.
"""

from __future__ import annotations

import importlib
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402


def seconds(function: Callable[[], object], rounds: int = 30) -> list[float]:
    """Return the quartiles of the time of a call on the device."""
    for _ in range(3):
        function()
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.quantiles(times, n=4)


def main() -> None:
    """Print a line per case and write ``results/<gpu>/gpu.json``."""
    if not torch.cuda.is_available():
        sys.exit("bench.gpu: torch sees no CUDA device")
    subprocess.run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=HERE.parent, check=True)
    from bench.measure import folder, machine
    from memloc_ext import has_cuda_kernels
    from memloc_ext.files import write_json

    if not has_cuda_kernels:
        sys.exit("bench.gpu: the build has no CUDA kernels; set CUDA_HOME and build with MEMLOC_CUDA=1")
    tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "cuda"], cwd=HERE.parent, check=False)
    cases = []
    for file in sorted(HERE.glob("bench_*.py")):
        gpu_cases = getattr(importlib.import_module(f"bench.{file.stem}"), "gpu_cases", tuple)
        for name, ours, our_bytes, peer, peer_bytes in gpu_cases():
            (low, time, high), (_, peer_time, _) = seconds(ours), seconds(peer)
            bandwidth, peers = our_bytes / time, peer_bytes / peer_time
            cases.append(
                {
                    "case": name,
                    "time_over_peer": round(time / peer_time, 3),
                    "microseconds": round(1e6 * time, 1),
                    "quartiles": [round(1e6 * low, 1), round(1e6 * high, 1)],
                    "bandwidth_GB_per_s": round(bandwidth / 1e9),
                    "peer_GB_per_s": round(peers / 1e9),
                    "share_of_peer_bandwidth": round(bandwidth / peers, 3),
                }
            )
            print(cases[-1], flush=True)
            torch.cuda.empty_cache()
    path = folder() / "gpu.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    passed = tests.returncode == 0
    write_json(path, {"command": "python bench/gpu.py", "machine": machine(), "tests_passed": passed, "cases": cases})
    print(f"written: {path.relative_to(HERE.parent)}")
    sys.exit(tests.returncode)


if __name__ == "__main__":
    main()
