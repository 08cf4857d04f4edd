"""The process that runs a group of steps for `bench.gpu`, and tells it of each as it goes.

A step that hangs is stopped by `bench.gpu`; one that leaves the device unusable ends the process. Either way a new one
runs what is left.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

Step = tuple[float, Callable[[], Iterable[dict[str, Any]]]]
"""Seconds that it may take, and what yields its records."""
Tell = Callable[..., None]


def teller(descriptor: int) -> Tell:
    """Return what writes its named arguments to a file descriptor, as a line of JSON."""

    def tell(**message: object) -> None:
        os.write(descriptor, json.dumps(message).encode() + b"\n")

    return tell


def work(steps: Mapping[str, Step], done: Collection[str], tell: Tell, broken: Callable[[], bool]) -> None:
    """Run steps, but for those that are done; end the process when one has left the device unusable.

    Args:
        steps: By name.
        done: Names of those that an earlier process has begun.
        tell: Takes what happens.
        broken: Whether the device does not answer any more.
    """
    left = [name for name in steps if name not in done]
    tell(plan=left)
    for name in left:
        limit, measure = steps[name]
        tell(begin=name, limit=limit)
        try:
            for record in measure():
                tell(record=record)
        except Exception as error:  # one that fails leaves the others their time
            tell(failed=f"{error!r:.600} {traceback.format_exc(limit=-3):.3000}")
            if broken():
                os._exit(3)
        tell(end=name)


class Tests:
    """A plugin of pytest that tells of each test what `work` tells of a step."""

    def __init__(self, done: Collection[str], tell: Tell, broken: Callable[[], bool], limit: float) -> None:
        self.done, self.tell, self.broken, self.limit = done, tell, broken, limit
        self.outcome = "passed"

    def pytest_collectreport(self, report: Any) -> None:
        """Tell of a file that cannot be imported."""
        if report.failed:
            self.tell(failed=f"{report.longreprtext[-3000:]}")

    def pytest_collection_finish(self, session: Any) -> None:
        """Leave out what is done, and tell what is left."""
        session.items[:] = [item for item in session.items if item.nodeid not in self.done]
        self.tell(plan=[item.nodeid for item in session.items])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Tell that a test begins."""
        self.outcome = "passed"
        self.tell(begin=nodeid, limit=self.limit)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Keep how a test went, and tell why it failed."""
        if report.failed:
            self.tell(failed=report.longreprtext[-3000:])
        if report.outcome != "passed":
            self.outcome = report.outcome

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Tell that a test ended; end the process if the device does not answer any more."""
        self.tell(record={"test": nodeid, "outcome": self.outcome})
        if self.outcome == "failed" and self.broken():
            os._exit(3)
        self.tell(end=nodeid)


def smoke(device: str) -> dict[str, Step]:
    """Return steps of a second each: the machine, the kernels' first calls, a step with an account, and the ceilings.

    Args:
        device: For example ``"cuda"``.
    """
    import torch

    from bench import gpu_goals, gpu_time, workloads
    from bench.measure import machine
    from memloc_ext._libraries import has_cuda_kernels

    sys.path.insert(0, str(HERE.parent / "python_tests" / "ops"))
    tests = importlib.import_module("test_devices")

    def about() -> Iterable[dict[str, Any]]:
        if device == "cuda":
            torch.cuda.init()
            assert has_cuda_kernels, "the CUDA kernels did not load"
        yield {"machine": machine()}

    def operator(name: str) -> Iterable[dict[str, Any]]:
        values, moved = tests.arguments(name, device)
        tests.check(name, tests.call(name, moved), values, device)
        return ()

    def account() -> Iterable[dict[str, Any]]:
        build, batch = gpu_goals.TINY["ResNet-9"]
        if wrong := gpu_goals.wrong_norms(workloads.classifier(build(), batch).to(device)):
            raise AssertionError(wrong)
        return ()

    steps: dict[str, Step] = {"machine": (30, about)}
    steps |= {f"smoke: {name}": (20, functools.partial(operator, name)) for name in tests.NAMES}
    steps["smoke: a step with an account"] = (30, account)
    return steps | {name: (15, step) for name, step in gpu_time.ceilings(device, device == "cpu").items()}


def goals(device: str) -> dict[str, Step]:
    """Return the steps that time whole models, those expected to be worst first."""
    from bench import gpu_goals

    tiny = device == "cpu"

    def records(goals: Callable[[], Iterable[gpu_goals.Goal]]) -> Iterable[dict[str, Any]]:
        yield from (goal.record() for goal in goals())

    def account(precision: str) -> dict[str, Step]:
        made = {
            name: functools.partial(gpu_goals.accounting, device, name, precision, tiny) for name in gpu_goals.MODELS
        }
        return {
            f"accounting of {name}, {precision}": (40, functools.partial(records, one)) for name, one in made.items()
        }

    scan = {"batch": 2, "forward_batch": 4, "width": 0.25} if tiny else {}
    search = {"examples": 20, "reference": 16, "trained_on": 400, "epochs": 6, "width": 0.125} if tiny else {}
    return {
        **account("bf16 autocast"),
        "scan": (40, lambda: records(functools.partial(gpu_goals.scan, device, **scan))),
        **account("TF32"),
        "search": (120, lambda: records(functools.partial(gpu_goals.search, device, **search))),
    }


def operators(device: str) -> dict[str, Step]:
    """Return the steps that time operators: the first case of each ``bench_*.py``, then the second, and so on."""
    found: list[tuple[int, str, Step]] = []
    for file in sorted(HERE.glob("bench_*.py")):
        try:
            module = importlib.import_module(f"bench.{file.stem}")
            cases = list(module.gpu_cases(device == "cpu")) if hasattr(module, "gpu_cases") else []
        except Exception:  # a package that is missing here
            found.append(
                (0, f"import of bench.{file.stem}", (1, functools.partial(fail, traceback.format_exc(limit=-1))))
            )
            continue
        found += [(i, case.name, (15, functools.partial(case.records, device))) for i, case in enumerate(cases)]
    return {name: step for _, name, step in sorted(found, key=lambda one: one[0])}


def fail(message: str) -> Iterable[dict[str, Any]]:
    """Raise a message."""
    raise RuntimeError(message)


def is_broken(device: str) -> bool:
    """Whether a device does not compute any more; what a failed step held is given back."""
    import torch

    gc.collect()
    if device == "cpu":
        return False
    try:
        torch.cuda.empty_cache()
        torch.zeros(1, device=device).add_(1).item()
    except RuntimeError:
        return True
    return False


def settled(step: Step, device: str) -> Step:
    """Return a step that ends when its kernels have, with the memory given back."""
    limit, measure = step

    def measured() -> Iterable[dict[str, Any]]:
        import torch

        yield from measure()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    return limit, measured


def main() -> None:
    """Run a group: ``gpu_worker.py GROUP DEVICE DESCRIPTOR [ARGUMENT OF PYTEST ...]``; stdin has what is done."""
    group, device, descriptor, *arguments = sys.argv[1:]
    tell, done, broken = teller(int(descriptor)), set(json.load(sys.stdin)), functools.partial(is_broken, device)
    try:
        if group.startswith("tests"):
            import pytest

            plugin = Tests(done, tell, broken, 40)
            code = pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:benchmark", *arguments], plugins=[plugin])
            if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
                tell(failed=f"pytest ended with {code!r}; see log.txt")
        else:
            steps = {"smoke": smoke, "goals": goals, "operators": operators}[group](device)
            work({name: settled(step, device) for name, step in steps.items()}, done, tell, broken)
    except Exception:
        tell(failed=traceback.format_exc(limit=-3)[-3000:])
        raise


if __name__ == "__main__":
    main()
