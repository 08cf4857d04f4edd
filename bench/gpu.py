"""Build, check and time every CUDA operator, and whole models, in six minutes of a GPU: ``python bench/gpu.py``.

Steps run in groups: a smoke test with the card's ceilings, the goals, the operators, the tests that need a GPU. Each
group has a process of its own, which is replaced when a step hangs or leaves the device unusable; every step has a
limit, and its result is written when it ends, so that a run which is cut short leaves what it had. docs/gpu.md says how
to use it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from bench import slug  # noqa: E402
from bench.gpu_summary import summary  # noqa: E402

MINUTES = 6.0
ENDS = {"smoke": 60, "goals": 215, "operators": 285, "tests": 350}
"""Seconds after the build at which a group ends at the latest; what one leaves is there for the next."""
START_LIMIT = 60
"""Seconds in which a process has to say what it is going to do, or to begin the next step."""
BUILD_LIMIT = 300
TEST_PROCESSES = 4


class Run:
    """What was measured so far, in a folder.

    Args:
        folder: Takes ``gpu.json``, ``summary.txt`` and ``log.txt``.
        **about: What the result file begins with.
    """

    def __init__(self, folder: Path, **about: object) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.lock, self.stopped = folder, threading.Lock(), False
        self.processes: set[subprocess.Popen[bytes]] = set()
        self.log = (folder / "log.txt").open("wb")
        self.result: dict[str, Any] = {**about, "machine": {}, "ceilings": [], "goals": [], "cases": [], "tests": {}}
        self.result |= {"failures": {}, "not_run": {}, "seconds": {}, "step_seconds": {}}

    def write(self) -> None:
        """Write the result and its summary, each whole or not at all."""
        files = {"gpu.json": json.dumps(self.result, indent=1), "summary.txt": summary(self.result) + "\n"}
        for name, text in files.items():
            partial = self.folder / f"{name}.partial"
            partial.write_text(text, encoding="utf-8")
            partial.replace(self.folder / name)

    def add(self, record: dict[str, Any]) -> None:
        """Put a record where it belongs."""
        if "machine" in record:
            self.result |= record
        elif "test" in record:
            self.result["tests"][record["outcome"]] = self.result["tests"].get(record["outcome"], 0) + 1
        else:
            kinds = {"ceiling": "ceilings", "bound": "goals"}
            self.result[next((kinds[key] for key in kinds if key in record), "cases")].append(record)
            print(json.dumps(record), flush=True)

    def fail(self, name: str, why: str) -> None:
        """Note the first thing that went wrong with a step."""
        self.result["failures"].setdefault(name, why)
        print(f"FAILED {name}: {why[-500:]}", flush=True)

    def group(self, name: str, command: Sequence[str], until: float) -> None:
        """Run the steps of a group, in another process after each that had to be stopped.

        Args:
            name: For what went wrong with none of its steps.
            command: Takes the descriptor it tells its steps to as an argument ``{}``, and names of steps on its input.
            until: Time, as of `time.monotonic`, at which it is stopped.
        """
        done: set[str] = set()
        while not self.stopped:
            before = len(done)
            try:
                left = self._attempt(name, command, done, until)
            except Exception:
                left = []
                self.fail(name, traceback.format_exc())
            with self.lock:
                if left and (time.monotonic() >= until or len(done) == before):
                    self.result["not_run"][name] = left
                self.write()
            if not left or name in self.result["not_run"]:
                return

    def _attempt(self, group: str, command: Sequence[str], done: set[str], until: float) -> list[str]:
        """Run a process for the steps that are not done, which it adds to; return what is left then."""
        receive, send = os.pipe()
        process = subprocess.Popen(
            [part.format(send) for part in command],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=self.log,
            pass_fds=[send],
            start_new_session=True,
        )
        os.close(send)
        self.processes.add(process)
        plan, current, began, buffer = list[str](), None, 0.0, b""
        limit, why, deadline = START_LIMIT, "", time.monotonic() + START_LIMIT
        try:
            assert process.stdin is not None
            with process.stdin:
                process.stdin.write(json.dumps(sorted(done)).encode())
            while True:
                wait = min(deadline, until) - time.monotonic()
                if not select.select([receive], [], [], max(wait, 0))[0]:
                    why = f"stopped after its limit of {limit} s" if deadline <= until else "stopped: no time was left"
                    break
                chunk = os.read(receive, 1 << 16)
                if not chunk:
                    break
                *lines, buffer = (buffer + chunk).split(b"\n")
                for message in map(json.loads, lines):
                    with self.lock:
                        match message:
                            case {"plan": plan}:
                                pass
                            case {"begin": current, "limit": limit}:
                                began = time.monotonic()
                                done.add(current)
                            case {"record": record}:
                                self.add(record)
                            case {"failed": text}:
                                self.fail(current or group, text)
                            case {"end": name}:
                                self.result["step_seconds"][name] = round(time.monotonic() - began, 2)
                                current, limit = None, START_LIMIT
                        if "plan" not in message and "begin" not in message:
                            self.write()
                    deadline = time.monotonic() + limit
        except BrokenPipeError:  # it ended before it read what is done
            pass
        finally:
            os.close(receive)
            kill(process, wait=not why)
            self.processes.discard(process)
        left = [name for name in plan if name not in done]
        if not why and (process.returncode or current):
            why = f"its process ended with {process.returncode}; see log.txt"
        told = current in self.result["failures"]  # what broke the device
        if why and not told and not self.stopped and (current or not plan or (left and deadline <= until)):
            with self.lock:
                self.fail(current or group, why)
        return left

    def stop(self, *_: object) -> None:
        """End all processes, and the program."""
        self.stopped = True
        for process in list(self.processes):
            kill(process, wait=False)
        sys.exit("bench.gpu: stopped")


def kill(process: subprocess.Popen[bytes], wait: bool) -> None:
    """End a process and those that it has started; one that has closed its pipe may get some seconds to end itself."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5 if wait else 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)  # the driver lets go of a process whose kernel hangs when it has stopped that


def card(query: str) -> str:
    """Return what the driver's tool says of the first GPU, or an empty text."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def build(run: Run) -> None:
    """Build the extension for this GPU alone, which takes a part of the time."""
    capability = card("compute_cap")
    suffix = "a" if capability.split(".")[0] == "9" else ""
    archs = {"MEMLOC_CUDA_ARCHS": capability + suffix} if capability else {}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    environment = {"MEMLOC_CUDA": "1", **archs, **os.environ}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=run.log, stderr=run.log, start_new_session=True
    )
    run.processes.add(process)
    try:
        code = process.wait(BUILD_LIMIT)
    except subprocess.TimeoutExpired:
        code = f"no result in {BUILD_LIMIT} s"
    kill(process, wait=False)
    run.processes.discard(process)
    if code != 0:  # an earlier build may be there, and is measured then
        run.fail("build", f"setup.py ended with {code}; see log.txt")


def shards(dry_run: bool) -> list[list[str]]:
    """Return arguments of pytest for each of the processes that run the tests."""
    if dry_run:
        return [["python_tests/ops/test_threads.py"]]
    files = [file for file in sorted((ROOT / "python_tests").rglob("test_*.py")) if "mark.cuda" in file.read_text()]
    files += [file for file in sorted((ROOT / "python_tests/ops").glob("test_*.py")) if file not in files]
    files.sort(key=lambda file: ("ops" not in file.parts, -file.stat().st_size))
    return [["-m", "cuda", *map(str, files[first::TEST_PROCESSES])] for first in range(TEST_PROCESSES)]


def main() -> None:
    """Print a line per measurement and a summary; exit with 1 if a test or a step fails or is left out."""
    parser = argparse.ArgumentParser(prog="python bench/gpu.py", description=__doc__)
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: bench/results/<the card's name>")
    parser.add_argument("--no-build", action="store_true", help="measure the libraries that are there")
    parser.add_argument("--dry-run", action="store_true", help="every step on tiny inputs, on the CPU, without a build")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="in all, after the build; %(default)g by default"
    )
    options = parser.parse_args()
    device = "cpu" if options.dry_run else "cuda"
    usual = ROOT / "build" / "gpu-dry-run" if options.dry_run else HERE / "results" / slug(card("name") or "gpu")
    run = Run(options.output or usual, command=f"python bench/gpu.py {' '.join(sys.argv[1:])}".strip())
    signal.signal(signal.SIGTERM, run.stop)
    signal.signal(signal.SIGINT, run.stop)
    if not options.dry_run:
        os.environ["MEMLOC_REQUIRE_CUDA"] = "1"
    worker = [sys.executable, str(HERE / "gpu_worker.py")]
    try:
        begin = time.monotonic()
        if not (options.no_build or options.dry_run):
            build(run)
            run.result["seconds"]["build"] = round(time.monotonic() - begin, 1)
        begin = time.monotonic()
        for group, seconds in ENDS.items():
            start, until = time.monotonic(), begin + seconds * options.minutes / MINUTES
            if group == "tests":
                parts = shards(options.dry_run)
                names = [f"tests {i + 1} of {len(parts)}" for i in range(len(parts))]
                commands = [[*worker, name, device, "{}", *files] for name, files in zip(names, parts, strict=True)]
                with ThreadPoolExecutor(len(parts)) as pool:
                    list(pool.map(run.group, names, commands, [until] * len(parts)))
            else:
                run.group(group, [*worker, group, device, "{}"], until)
            run.result["seconds"][group] = round(time.monotonic() - start, 1)
    finally:
        run.write()
        print(f"\n{summary(run.result)}\nwritten: {run.folder}", flush=True)
    sys.exit(1 if run.result["failures"] or run.result["not_run"] else 0)


if __name__ == "__main__":
    main()
