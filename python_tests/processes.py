"""Processes that start with torch and this package loaded: forks of one that has loaded them, which takes no time."""

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["memloc_ext.study.command_line", "memloc_ext.study.report", "sklearn.model_selection"])
SECONDS = 300
"""A process that takes longer is killed."""
TWO = LaunchConfig(
    min_nodes=1,
    max_nodes=1,
    nproc_per_node=2,
    run_id="test",
    rdzv_backend="c10d",
    rdzv_endpoint="localhost:0",
    start_method="forkserver",
    max_restarts=0,
    monitor_interval=0.1,
)


@dataclass
class Ended:
    """The exit status of a process, or minus the number of the signal that killed it, and what was printed."""

    status: int
    stdout: str
    stderr: str


def run(function: Callable[..., Any], *arguments: Any) -> Ended:
    """Run a function in a process."""
    with tempfile.TemporaryDirectory() as folder:
        process = FORKED.Process(target=_logged, args=(Path(folder), function, arguments))
        process.start()
        process.join(SECONDS)
        process.kill()
        process.join()
        assert process.exitcode is not None
        return Ended(process.exitcode, *_printed(Path(folder)))


def torchrun(function: Callable[..., Any], *arguments: Any) -> Ended:
    """Run a function in each of two processes, as ``torchrun --nproc-per-node=2`` does a script."""
    changed = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    handlers = {number: signal.getsignal(number) for number in changed}
    failure = ""
    with tempfile.TemporaryDirectory() as folder:
        TWO.logs_specs = DefaultLogsSpecs(folder, redirects=Std.ALL)
        faulthandler.dump_traceback_later(SECONDS, exit=True)  # processes that wait for each other never end
        try:
            elastic_launch(TWO, _on_one_thread)(function, arguments)
        except ChildFailedError as error:
            failure = str(error)
        finally:
            faulthandler.cancel_dump_traceback_later()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        stdout, stderr = _printed(Path(folder))
    return Ended(int(bool(failure)), stdout, stderr + failure)


def start_torchrun(*arguments: str | Path) -> Ended:
    """Run a script, or ``-m`` and a module, by the command itself, which takes seconds to start."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", *map(str, arguments)]
    paths = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, env={**os.environ, **paths}, capture_output=True, text=True, timeout=SECONDS)
    return Ended(done.returncode, done.stdout, done.stderr)


def start_two(function: Callable[..., Any], *arguments: Any) -> None:
    """Run ``function(rank, *arguments)`` in two processes; what one of them raises is raised here."""
    torch.multiprocessing.start_processes(function, arguments, nprocs=2, start_method="forkserver")


def _printed(folder: Path) -> tuple[str, str]:
    logs = [sorted(folder.rglob(f"{name}.log")) for name in ("stdout", "stderr")]
    stdout, stderr = ("".join(log.read_text() for log in found) for found in logs)
    return stdout, stderr


def _logged(folder: Path, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT), number)
    _on_one_thread(function, arguments)


def _on_one_thread(function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    function(*arguments)
